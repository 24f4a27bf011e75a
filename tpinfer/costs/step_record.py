"""What a rank records of a step without a profiler: when each op ran and what the host did in
between.

All times are on the host's monotonic clock in ns, which the ranks of a host share.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tpinfer.costs.ops import StepAggregates


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of one rank."""

    step_id: int
    kind: str
    """`prefill`, `decode` or `mixed`."""
    aggregates: StepAggregates
    start_ns: int
    end_ns: int
    ops_start_ns: int
    """When the first op could start."""
    op_ends_ns: list[int]
    """End of each op, in program order."""
    op_starts_ns: list[int] | None = None
    """Start of each op where ops leave gaps (GPU ranks); None where they tile the time."""
    waits_ns: Mapping[int, int] | None = None
    """Op index -> ns a collective measured itself waiting for its last peer, where it does."""


@dataclass(frozen=True, slots=True)
class HostSpan:
    """Something the host did outside the ops."""

    part: str
    """`schedule`, `plan_wait`, `prepare`, `sample`, `detokenize`, `python`, `ipc`, or
    `recorder`: a profiler starting and stopping."""
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True)
class Measurements:
    """What one rank recorded over a stretch of time."""

    rank: int
    records: list[StepRecord]
    spans: list[HostSpan]
    recorded_from_ns: int = 0
    """Records older than this were let go to bound memory; 0 where none were."""
