"""Which backend sums messages of which size, by each one's time over sizes. Pure.

Times come from what was measured of each backend, else from the links that the topology file
describes for it. At most two backends are opened: one for the small sums of decode steps and one
for the large ones of prompts, and two only where that is worth a second one's memory.
"""

from collections.abc import Collection
from dataclasses import dataclass

from tpinfer.config.backend_links import link_fit
from tpinfer.config.measured import CollectiveFit
from tpinfer.config.topology import Place, Topology
from tpinfer.config.units import format_size

LEAST_GAIN_S, LEAST_GAIN = 2e-6, 0.1
"""What a second backend must win on a message, in seconds and as a share of the first's time:
below that the two are within what repeated measurements differ by."""
_PLANNED_BYTES = 1 << 10, 8 << 20
"""The range of sizes that plans look at before their steps are known."""
_COSTS = {
    "deepspeed": "70 MB of /dev/shm a rank",
    "gloo": "a thread and a connection to each rank",
    "shared_memory": "8 MB of /dev/shm",
}
"""What a backend takes while it is open."""


@dataclass(frozen=True, slots=True)
class CollectiveCurves:
    """Times of the backends of one group, and the sizes of its messages."""

    num_ranks: int
    row_bytes: int
    """The smallest message: one token of a decode step."""
    step_bytes: int
    """The largest: a step full of prompt tokens."""
    fits: tuple[CollectiveFit, ...]
    origin: str
    """`measured 2026-11-25`, or the file whose links say it."""

    def names(self) -> tuple[str, ...]:
        """The backends whose times are known."""
        return tuple(fit.by for fit in self.fits)

    def seconds(self, name: str, message_bytes: float) -> float:
        """Of one sum by one backend. Raises KeyError for one that is not known."""
        fits = {fit.by: fit for fit in self.fits}
        sent = 2 * (self.num_ranks - 1) / self.num_ranks * message_bytes
        return fits[name].seconds(sent, self.num_ranks)


@dataclass(frozen=True, slots=True)
class SizedCollective:
    """What to open."""

    small: str
    large: str | None
    """Backend of messages of `from_bytes` and more; None where one backend carries all."""
    from_bytes: int
    reason: str


def collective_curves(
    topology: Topology, num_ranks: int, row_bytes: int, step_bytes: int
) -> CollectiveCurves | None:
    """What is known of all-reduces over the first group of `num_ranks`; None for less than two
    backends, of which there is nothing to choose."""
    if num_ranks < 2:
        return None
    fits, origin = _known(topology, topology.groups(num_ranks)[0])
    if len(fits) < 2:
        return None
    ordered = tuple(fits[name] for name in sorted(fits))
    return CollectiveCurves(num_ranks, row_bytes, max(row_bytes, step_bytes), ordered, origin)


def collective_by_size(curves: CollectiveCurves, usable: Collection[str]) -> SizedCollective | None:
    """What carries sums, of the backends that are `usable`; None where none of them is known."""
    names = [name for name in curves.names() if name in usable]
    if not names:
        return None
    row, step = curves.row_bytes, curves.step_bytes
    small = min(names, key=lambda name: (curves.seconds(name, row), name))
    large = min(names, key=lambda name: (curves.seconds(name, step), name))
    if small == large:
        return SizedCollective(small, None, 0, _one(curves, small, names))
    if not _is_real(curves, small, large, row):
        return SizedCollective(large, None, 0, _one(curves, large, names))
    if not _is_real(curves, large, small, step):
        return SizedCollective(small, None, 0, _one(curves, small, names))
    start = _crossover(curves, small, large)
    return SizedCollective(small, large, start, _two(curves, small, large, start))


def planned_fits(
    topology: Topology, group: tuple[Place, ...]
) -> tuple[tuple[CollectiveFit, ...], str]:
    """(times of the backends that a run on `group` would open, where they come from). Of the
    quickest where one alone was timed; nothing where none was and the file names no two links."""
    fits, origin = _known(topology, group)
    if not fits:
        return (), ""
    if len(fits) < 2:
        best = topology.collective_fit(group)
        return (() if best is None else (best,)), origin
    curves = CollectiveCurves(len(group), *_PLANNED_BYTES, tuple(fits.values()), origin)
    chosen = collective_by_size(curves, curves.names())
    assert chosen is not None, "all known backends are usable"
    return tuple(fit for fit in curves.fits if fit.by in (chosen.small, chosen.large)), origin


def _known(topology: Topology, group: tuple[Place, ...]) -> tuple[dict[str, CollectiveFit], str]:
    """(fits by backend, where they come from): measured, else by two links or more."""
    names = sorted({fit.by for fit in topology.collective_fits(group)})
    found = {name: topology.collective_fit(group, by=name) for name in names}
    fits = {name: fit for name, fit in found.items() if fit is not None}
    if not fits:
        by_links = _by_links(topology, group)
        return (by_links if len(by_links) > 1 else {}), f"links of {topology.file}"
    assert topology.measured is not None, "fits were measured"
    is_scaled = any(topology.is_rescaled(group, name) for name in fits)
    scaled = " and scaled as --set says" if is_scaled else ""
    return fits, f"measured {topology.measured.date[:10]}{scaled}"


def _by_links(topology: Topology, group: tuple[Place, ...]) -> dict[str, CollectiveFit]:
    """Backends with a link of their own between the ranks of one host's cores."""
    found = {}
    if topology.host(group[0][0]).computes_on_cpu and len({host for host, _ in group}) == 1:
        for name in ("shared_memory", "gloo"):
            links = topology.links_of(group, name)
            if links:
                slowest = min(links, key=lambda link: link.bytes_per_s * link.attainable)
                found[name] = link_fit(name, slowest)
    return found


def _is_real(curves: CollectiveCurves, better: str, worse: str, message_bytes: int) -> bool:
    """Whether `better` wins more on a message than measurements differ by."""
    slow = curves.seconds(worse, message_bytes)
    gain = slow - curves.seconds(better, message_bytes)
    return gain > LEAST_GAIN_S and gain > LEAST_GAIN * slow


def _crossover(curves: CollectiveCurves, small: str, large: str) -> int:
    """The size from which on `large` is quicker than `small`, up to that of a full step."""
    low, high = curves.row_bytes, curves.step_bytes  # small wins at low, large at high
    while high - low > 1:
        middle = (low + high) // 2
        if curves.seconds(large, middle) < curves.seconds(small, middle):
            high = middle
        else:
            low = middle
    return high


def _one(curves: CollectiveCurves, name: str, names: list[str]) -> str:
    row = curves.row_bytes
    others = sorted((curves.seconds(other, row), other) for other in names if other != name)
    against = "".join(f", {seconds * 1e6:.1f} by {other}" for seconds, other in others)
    took = f"{curves.seconds(name, row) * 1e6:.1f} us for a sum of {format_size(row)}"
    return f"{took}{against}; {curves.origin}"


def _two(curves: CollectiveCurves, small: str, large: str, start: int) -> str:
    parts = []
    for size in (curves.row_bytes, curves.step_bytes):
        times = [f"{curves.seconds(name, size) * 1e6:.1f}" for name in (small, large)]
        parts.append(f"{format_size(size)} {times[0]} against {times[1]} us")
    figures = f"{parts[0]} by {large}, {parts[1]}"
    # DeepSpeed's op is built around our ring, which is there anyway.
    second = "deepspeed" if {small, large} == {"deepspeed", "shared_memory"} else large
    return (
        f"{figures}; {curves.origin}; two are open, and {second} takes "
        f"{_COSTS.get(second, 'memory of its own')}"
    )
