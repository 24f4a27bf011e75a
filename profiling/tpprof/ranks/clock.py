"""Each rank's clock against a reference rank's, from collectives that all leave together.

No rank leaves an all-reduce before the last one came, so ends lie close together in true time:
what is left of their difference is the clocks. Fitted as a line, because GPU clocks drift by 10 to
100 ppm. Slopes by Theil and Sen (Sen 1968, median over pairs), so that late tails do not pull it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tpprof.ranks.match import Matched
from tpprof.results import Alignment

LEAST_SAMPLES = 8
MOST_RESIDUAL = 0.2
"""Of the median duration of the collectives fitted on."""
_MOST_PAIRED = 400
"""Samples that slopes are taken between; their number grows with the square."""


_SHARED = "ranks of one host share its clock"


@dataclass(frozen=True, slots=True)
class Clock:
    """t_reference = t + offset_ns + drift * (t - start_ns)."""

    rank: int
    start_ns: int
    """First moment of the rank's recording, on its own clock."""
    offset_ns: int = 0
    """At start_ns. An integer, because clocks may count from moments decades apart."""
    drift: float = 0.0
    residual_ns: int = 0
    """Median distance of the samples from the line."""
    accepted: bool = True
    """Whether it may be compared with the lowest rank's."""
    num_samples: int = 0
    reason: str = ""
    reference: int = -1
    """Rank whose clock `to_reference` gives; its own for a reference."""
    fitted: bool = True
    """Whether it may be compared with that rank's."""

    def to_reference(self, times_ns: np.ndarray) -> np.ndarray:
        """int64: moments of this rank's clock on the reference clock."""
        drifted = np.rint(self.drift * (times_ns - self.start_ns)).astype(np.int64)
        return times_ns + self.offset_ns + drifted

    def from_reference(self, times_ns: np.ndarray) -> np.ndarray:
        """int64: moments of the reference clock on this rank's."""
        since = (times_ns - (self.start_ns + self.offset_ns)) / (1 + self.drift)
        return times_ns - self.offset_ns - np.rint(self.drift * since).astype(np.int64)

    def alignment(self) -> Alignment:
        """For the report."""
        return Alignment(
            offset_ns=self.offset_ns,
            drift_ppm=self.drift * 1e6,
            residual_ns=self.residual_ns,
            accepted=self.accepted,
            num_samples=self.num_samples,
            reason=self.reason,
        )


def fit_clocks(
    ranks: Sequence[int],
    starts_ns: Sequence[int],
    matched: Matched,
    ends_ns: np.ndarray,
    durations_ns: np.ndarray,
    shared: Sequence[frozenset[int]] = (),
) -> list[Clock]:
    """One clock per rank; the lowest rank is the reference.

    Args:
        ranks, starts_ns: per column of `matched`, its rank and first recorded moment.
        ends_ns, durations_ns: int64 [m, R], of each rank's part; any value where it has none.
        shared: sets of ranks that read one clock; of one set nothing is fitted.

    A rank that meets the reference in no collective is fitted to the lowest rank that it does
    meet: good for waits among themselves, but not accepted.
    """
    clocks: dict[int, Clock] = {}
    order = sorted(range(len(ranks)), key=lambda column: ranks[column])
    usable = np.flatnonzero(matched.synchronising) if len(matched) else np.empty(0, np.int64)
    for column in order:
        alone = Clock(ranks[column], starts_ns[column], reference=ranks[column])
        clocks[column] = alone
        meets = 0
        for other in order[: order.index(column)]:
            base = clocks[other]
            if not base.fitted:
                continue
            if any({ranks[column], ranks[other]} <= same for same in shared):
                clocks[column] = replace(base, rank=ranks[column], num_samples=0, reason=_SHARED)
                break
            rows = usable[(matched.work[usable][:, [column, other]] >= 0).all(1)]
            meets = max(meets, len(rows))
            if len(rows) >= LEAST_SAMPLES:
                rows = _largest(rows, matched.num_bytes)
                clocks[column] = _fit(
                    alone, base, ends_ns[rows][:, [column, other]],
                    durations_ns[rows][:, [column, other]],
                )  # fmt: skip
                break
        else:
            if column != order[0]:
                clocks[column] = _refused(alone, meets, ranks[order[0]])
    return [clocks[column] for column in range(len(ranks))]


def _refused(alone: Clock, num_samples: int, reference: int) -> Clock:
    reason = (
        f"{num_samples} collectives are matched with rank {reference}, {LEAST_SAMPLES} are needed;"
        " record more steps, on all ranks"
    )
    return Clock(
        alone.rank, alone.start_ns, accepted=False, num_samples=num_samples, reason=reason,
        reference=alone.rank,
    )  # fmt: skip


def _largest(rows: np.ndarray, num_bytes: np.ndarray) -> np.ndarray:
    """Rows of at least median size, where sizes are known and enough remain: small collectives
    may let ranks go before all peers are done."""
    size = num_bytes[rows]
    large = rows[size >= np.median(size)]
    return large if (size >= 0).all() and len(large) >= LEAST_SAMPLES else rows


def _fit(alone: Clock, base: Clock, ends_ns: np.ndarray, durations_ns: np.ndarray) -> Clock:
    """Columns: this rank, then the one it is fitted to."""
    since = (ends_ns[:, 0] - alone.start_ns).astype(float)
    whole = base.to_reference(ends_ns[:, 1]) - ends_ns[:, 0]
    apart = (whole - whole[0]).astype(float)
    drift, offset = _line(since, apart)
    residual = float(np.median(np.abs(apart - offset - drift * since)))
    typical = float(np.median(durations_ns.min(1)))
    reason = base.reason
    fitted = residual <= MOST_RESIDUAL * typical
    if not fitted:
        reason = (
            f"ends of collectives stay {residual / 1e3:.1f} us apart, more than "
            f"{MOST_RESIDUAL:.0%} of their median duration of {typical / 1e3:.1f} us"
        )
    elif not base.accepted:
        reason = f"aligned to rank {base.reference} only, which is not aligned: {base.reason}"
    return Clock(
        rank=alone.rank,
        start_ns=alone.start_ns,
        offset_ns=int(whole[0]) + round(offset),
        drift=drift,
        residual_ns=round(residual),
        accepted=fitted and base.accepted,
        num_samples=len(since),
        reason="" if fitted and base.accepted else reason,
        reference=base.reference,
        fitted=fitted,
    )


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(slope, value at x = 0). A slope that its own scatter could explain is taken as 0."""
    some = np.unique(np.linspace(0, len(x) - 1, min(len(x), _MOST_PAIRED)).astype(np.int64))
    first, second = np.triu_indices(len(some), 1)
    dx = x[some][second] - x[some][first]
    apart = np.abs(dx) > 0
    slope = 0.0
    if apart.any():
        dy = y[some][second] - y[some][first]
        slope = float(np.median(dy[apart] / dx[apart]))
        scatter = float(np.median(np.abs(y - slope * x - np.median(y - slope * x))))
        error = 1.5 * scatter / (float(np.std(x)) * np.sqrt(len(x)))
        if abs(slope) < 3 * error:
            slope = 0.0
    return slope, float(np.median(y - slope * x))
