"""A rank's device clock in words: how fast it ran, why not faster, and what that lost."""

from tpinfer.config.clock_samples import NO_REASON
from tpprof.report.wording import duration, percent, plural, printable
from tpprof.results import DeviceClock

_MOST_REASONS = 3


def describe_lost_to_clocks(one: DeviceClock) -> str:
    """What of the lost time is the clocks' and why, in a sentence."""
    head = f"Of {duration(one.lost_ns)} lost where a floor is known, "
    if not one.clocks_ns:
        return f"{head}none is the device's clock: {_speed(one) or 'no clock is known'}."
    return (
        f"{head}{duration(one.clocks_ns)} ({percent(one.clocks_ns, one.lost_ns)}) is the device's "
        f"clock ({reasons_of(one)}): {_speed(one)}. The rest is {duration(rest_of(one))}."
    )


def rest_of(one: DeviceClock) -> int:
    """Lost for other causes than the clock, ns."""
    return one.lost_ns - one.clocks_ns


def reasons_of(one: DeviceClock) -> str:
    """`power cap 80%, thermal 20%`; the reason alone where there is one."""
    shown = list(one.reasons_ns.items())[:_MOST_REASONS]
    if len(shown) < 2:
        return printable(shown[0][0]) if shown else NO_REASON
    return ", ".join(f"{printable(name)} {percent(ns, one.clocks_ns)}" for name, ns in shown)


def describe_clock(one: DeviceClock) -> str:
    """What was sampled on one rank."""
    facts = [_speed(one) or "no clock is known"]
    if one.power_w is not None:
        limit = f" of {one.power_limit_w:.0f}" if one.power_limit_w is not None else ""
        facts.append(f"{one.power_w:.0f}{limit} W")
    if one.temperature_c is not None:
        facts.append(f"at most {one.temperature_c:.0f} C")
    known = f"of kernel time {percent(one.coverage, 1)} with a clock"
    samples = f"{plural(one.num_samples, 'sample')} with work, {known}"
    return f"rank {one.rank}, {printable(one.device)}: {', '.join(facts)} ({samples})"


def _speed(one: DeviceClock) -> str:
    """`SM at 1410 of 1980 MHz, memory at 2619 of 2619 MHz`."""
    unit = "SM" if one.kind == "gpu" else "core"
    parts = [
        f"{name} at {mean:.0f}{f' of {full:.0f}' if full is not None else ''} MHz"
        for name, mean, full in (
            (unit, one.compute_mhz, one.full_compute_mhz),
            ("memory", one.memory_mhz, one.full_memory_mhz),
        )
        if mean is not None
    ]
    return ", ".join(parts)
