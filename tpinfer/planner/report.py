"""Plans as text of at most 100 columns: a table of what each does with its interval, one of where
the time goes, and sentences about the best."""

import math
import textwrap
from collections.abc import Callable, Sequence

from tpinfer.config.units import format_size
from tpinfer.planner.outcome import PERCENTILES, as_words
from tpinfer.planner.pictures import PrefillLaw
from tpinfer.planner.plan import Plan
from tpinfer.planner.search import Found
from tpinfer.planner.split import Split

COLUMNS_WIDE = 100
_MOST_MISFITS, _MOST_SHOWN, _MOST_OF_ONE = 4, 10, 2
_WORDS = ("compute", "memory", "comm.", "small k.", "host", "queue")
NAMES = {
    "compute": "compute",
    "memory": "memory",
    "communication": "communication",
    "small_kernels": "small kernels",
    "host": "host",
    "queue": "queue",
    "kv_capacity": "KV capacity",
    "max_num_seqs": "max-num-seqs",
    "weights": "weights",
    "heads": "heads",
    "layers": "layers",
    "devices": "devices",
    "links": "links",
}
"""What bounds a plan, as people write it."""


def render_plans(title: str, found: Found, law: PrefillLaw | None) -> str:
    """The whole report."""
    shown = _shown(found)
    blocks = [_wrapped(title)]
    if shown:
        blocks += [_speeds(shown), _splits(shown), *_notes(found, shown, law)]
    blocks += _misfits([plan for plan in found.plans if not plan.fits])
    return "\n".join(blocks)


def _shown(found: Found) -> list[Plan]:
    """The best plan and those that no other beats, a few of each placement."""
    counts: dict[tuple[int, int, int], int] = {}
    shown: list[Plan] = []
    for place, plan in enumerate(found.plans):
        if not plan.fits or (place and place not in found.front):
            continue
        sizes = plan.tp, plan.pp, plan.dp
        counts[sizes] = counts.get(sizes, 0) + 1
        if counts[sizes] <= _MOST_OF_ONE and len(shown) < _MOST_SHOWN:
            shown.append(plan)
    return shown


def _speeds(plans: Sequence[Plan]) -> str:
    """One line a plan, its interval below."""
    head = (
        f"{'tp':>3}{'pp':>3}{'dp':>3}{'TTFT ms':>16}{'TPOT ms':>15}{'tokens/s':>15}"
        f"{'USD/Mtok':>16}{'KV tokens':>12}  bound by"
    )
    lines = [head, f"mode{'seqs x tokens':>79}"]
    for plan in plans:
        cells = (
            f"{_sizes(plan)}{_ms(plan.ttft_s):>16}"
            f"{_ms(plan.tpot_s or None):>15}{_count(plan.output_tokens_per_s):>15}"
            f"{_count(plan.cost_per_mtok):>16}{plan.kv_capacity_tokens:>12}  "
            f"{NAMES.get(plan.binding, plan.binding)}"
        )
        lines += [cells, _interval_line(plan)]
    return "\n".join(lines)


def _sizes(plan: Plan) -> str:
    return f"{plan.tp:>3}{plan.pp:>3}{plan.dp:>3}"


def _interval_line(plan: Plan) -> str:
    intervals = plan.intervals()
    cost = intervals.get("cost_per_mtok")
    marks = "" if plan.keeps_up else "  overloaded"
    if plan.slo_misses and not marks:
        marks = f"  misses {', '.join(plan.slo_misses)}"
    tpot = _pair(intervals["tpot_s"], _ms) if plan.tpot_s else "-"  # one token alone has none
    step = f"{plan.settings.max_num_seqs} x {plan.settings.max_num_batched_tokens}"
    return (
        f"{plan.mode:<9}{_pair(intervals['ttft_s'], _ms):>16}{tpot:>15}"
        f"{_pair(intervals['output_tokens_per_s'], _count):>15}"
        f"{_pair(cost, _count) if cost else '':>16}{step:>12}{marks}"
    ).rstrip()


def _splits(plans: Sequence[Plan]) -> str:
    """Where the time of a first and of each later token goes; rows sum to their total."""
    head = f"{'tp':>3}{'pp':>3}{'dp':>3}  {'ms':<12}{'total':>10}" + "".join(
        f"{word:>11}" for word in _WORDS
    )
    lines = ["Where the time goes", head]
    for plan in plans:
        sizes = f"{_sizes(plan)}  "
        lines.append(sizes + _split_row("first token", plan.ttft_split))
        lines.append(" " * len(sizes) + _split_row("output token", plan.tpot_split))
    return "\n".join(lines)


def _split_row(name: str, split: Split) -> str:
    cells = "".join(f"{_ms(value) if value else '-':>11}" for value in as_words(split).values())
    return f"{name:<12}{_ms(split.total):>10}{cells}"


def _notes(found: Found, plans: Sequence[Plan], law: PrefillLaw | None) -> list[str]:
    best = plans[0]
    notes = []
    if found.num_estimated:
        notes.append(
            f"{found.num_estimated} plans were estimated and {found.num_simulated} simulated. "
            f"{len(found.front)} of them no other beats in TTFT, TPOT, throughput and cost at "
            "once; --json has all. Best first: those that keep up and keep the promises, by device "
            "time for a token."
        )
        notes.append(f"The first is tp={best.tp} pp={best.pp} dp={best.dp}, {_settings(best)}.")
    else:
        notes.append(f"It runs with {_settings(best)}.")
    if best.slo_misses:
        fitting = [plan for plan in found.plans if plan.fits]
        ttft_s = min(plan.ttft_s or 0.0 for plan in fitting)
        tpot_s = min(plan.tpot_s or 0.0 for plan in fitting)
        notes.append(
            f"None that keeps up keeps all promises: the least TTFT of any is {_ms(ttft_s)} ms, "
            f"the least TPOT {_ms(tpot_s)} ms."
        )
    for name, spread in (("TTFT", best.ttft), ("TPOT", best.tpot)):
        if spread is not None:
            values = ", ".join(
                f"p{p} {_ms(value)}"
                for p, value in zip(PERCENTILES, spread.percentiles, strict=True)
            )
            notes.append(f"{name} over requests: mean {_ms(spread.mean)} ms, {values}.")
    if best.num_preemptions:
        notes.append(f"{best.num_preemptions} times a request was preempted for want of KV blocks.")
    notes.append(f"Weights take {format_size(best.weight_bytes)} on the fullest rank.")
    if law is not None:
        notes.append(prefill_sentence(law))
    low, high = best.relative
    notes.append(
        f"Mode {best.mode}: 80 of 100 measurements should lie from {100 * low:.0f} % below to "
        f"{100 * high:.0f} % above a time. Numbers from {best.origin}."
    )
    return [_wrapped(note) for note in notes]


def prefill_sentence(law: PrefillLaw) -> str:
    """Prefill time as linear and quadratic in context."""
    fixed, linear, quadratic = law.parts_s(law.input_len)
    return (
        f"Prefill of n tokens alone: {_ms(law.fixed_s)} ms + {law.linear_s * 1e6:.3g} us * n + "
        f"{law.quadratic_s * 1e9:.3g} ns * n^2; at {law.input_len} tokens {_ms(fixed)} fixed, "
        f"{_ms(linear)} linear, {_ms(quadratic)} quadratic."
    )


def _settings(plan: Plan) -> str:
    return (
        f"--max-num-seqs {plan.settings.max_num_seqs} and --max-num-batched-tokens "
        f"{plan.settings.max_num_batched_tokens}"
    )


def _misfits(plans: Sequence[Plan]) -> list[str]:
    """One line for each reason."""
    reasons: dict[str, list[Plan]] = {}
    for plan in plans:
        reasons.setdefault(plan.reason, []).append(plan)
    lines = []
    for reason, members in list(reasons.items())[:_MOST_MISFITS]:
        first = members[0]
        more = f" (and {len(members) - 1} more)" if len(members) > 1 else ""
        sizes = f"tp={first.tp} pp={first.pp} dp={first.dp}{more}"
        lines.append(_wrapped(f"{sizes} does not fit: {reason}"))
    left = len(reasons) - len(lines)
    if left:
        lines.append(
            f"{left} more reason{'' if left == 1 else 's'} why others do not fit; see --json."
        )
    return lines


def _wrapped(text: str) -> str:
    return textwrap.fill(
        text, COLUMNS_WIDE, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _pair(pair: tuple[float, float], form: Callable[[float], str]) -> str:
    return f"[{form(pair[0])}, {form(pair[1])}]"


def _ms(seconds: float | None) -> str:
    """Milliseconds in three digits or more."""
    if seconds is None:
        return "-"
    value = seconds * 1e3
    return digits(value)


def _count(value: float | None) -> str:
    return "-" if value is None else digits(value)


def digits(value: float) -> str:
    """Three significant digits, no exponent; thousands from 99950 on."""
    if not math.isfinite(value):
        return "endless"
    if abs(value) >= 99_950:
        return f"{value / 1e3:.0f}k"
    if abs(value) >= 99.95 or value == 0:
        return f"{value:.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
