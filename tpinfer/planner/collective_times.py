"""How long a collective takes: the smallest of a few affine curves over its message, one for short
messages (all peers at once, or a low-latency protocol) and one for long ones."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tpinfer.config.ceilings import Ceilings
from tpinfer.config.measured import OpTime


@dataclass(frozen=True, slots=True)
class Curve:
    """`latency + wire bytes / rate`."""

    latency_s: float
    bytes_per_s: float
    is_one_shot: bool = False
    """Each rank reads all peers' messages, (n - 1) S bytes, rather than 2 (n - 1) / n S."""


@dataclass(frozen=True, slots=True)
class CollectiveTimes:
    """Collectives of one group of ranks."""

    num_ranks: int
    curves: tuple[Curve, ...]
    """Of an all-reduce; empty for a rank alone."""
    transfer_latency_s: float = 10e-6
    """Between two pipeline stages."""
    transfer_bytes_per_s: float = float("inf")
    origin: str = ""
    ops: Mapping[str, OpTime] = field(default_factory=dict)
    """Kinds of op as they ran in steps of this runtime, where that was measured: they go before
    `curves`, which are those of collectives alone."""

    def all_reduce_s(self, message_bytes: float) -> float:
        """Of `message_bytes` on each rank; 0 for nothing, or a rank alone."""
        if not message_bytes or self.num_ranks == 1:
            return 0.0
        return min(latency + message_bytes * per for latency, per in self.affine())

    def affine(self) -> list[tuple[float, float]]:
        """(seconds, seconds per message byte) of each curve."""
        n = self.num_ranks
        return [
            (one.latency_s, (n - 1 if one.is_one_shot else 2 * (n - 1) / n) / one.bytes_per_s)
            for one in self.curves
        ]


def collective_times(ceilings: Ceilings, num_ranks: int) -> CollectiveTimes:
    """One curve from a group's ceilings: least latency and bus bandwidth."""
    if num_ranks == 1:
        return CollectiveTimes(1, (), origin="one rank")
    curve = Curve(ceilings.collective_latency_s, ceilings.collective_bytes_per_s)
    return CollectiveTimes(num_ranks, (curve,), origin=ceilings.origin)
