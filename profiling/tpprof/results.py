"""What an analysis finds: plain records that become the JSON report as they stand.

The keys of `Report` down to `format_version` are kept stable; the others may grow. Every mapping of
leaves sums to the `wall_ns` beside it, in integers.
"""

from dataclasses import dataclass, field

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Split:
    """A stretch of one rank's wall time by leaf."""

    rank: int
    wall_ns: int
    leaves: dict[str, int]
    """Leaves of zero are left out."""
    rollup: dict[str, int]
    """All six words."""
    host_parts: dict[str, int] = field(default_factory=dict)
    """What the leaf `host` was spent on; sums to it."""
    comm_hidden_ns: int = 0
    """Communication that ran under compute: beside the sum, not in it."""


@dataclass(frozen=True, slots=True)
class Window:
    """One wall interval that was asked about, on every rank."""

    label: str
    """`all`, `step 12 decode`, `ttft request 0`, ..."""
    start_ns: int
    """On rank_shown's clock."""
    end_ns: int
    ranks: list[Split]


@dataclass(frozen=True, slots=True)
class Group:
    """One row of a `--by` table; the rows of a rank sum to its wall."""

    key: str
    """`(unattributed)` where a piece belongs to none."""
    rank: int
    wall_ns: int
    leaves: dict[str, int]
    num_events: int = 0


@dataclass(frozen=True, slots=True)
class CollectiveResult:
    """One collective matched over its ranks, or several of one kind added up."""

    name: str
    bytes: int
    """Message bytes of one rank; -1 where unknown."""
    ranks: list[int]
    wait_ns: list[int]
    """Per entry of `ranks`."""
    transfer_ns: list[int]
    """Per entry of `ranks`."""
    busbw_gbps: float | None
    """10**9 bytes a second, of the transfer part; None where bytes are unknown."""
    last_rank: int
    """Who came last; -1 where it could not be told."""
    last_rank_was: str = ""
    """What the last rank did while the others waited."""
    start_ns: int = 0
    method: str = "matched"
    """`matched`, or `estimated` from one rank's file and a ceiling."""


@dataclass(frozen=True, slots=True)
class OpResult:
    """Kernel time of one op or kernel name against what the ceilings allow."""

    key: str
    rank: int
    time_ns: int
    floor_ns: int
    """Least time the ceilings allow, summed; 0 where unmodelled."""
    lost_ns: int
    """time_ns - floor_ns."""
    bound: str
    """`compute`, `memory`, `balanced`, `latency`, `communication`, `unmodelled`."""
    count: int
    flops: int = 0
    bytes: int = 0
    ceilings_ns: dict[str, int] = field(default_factory=dict)
    """The vector: least time under each ceiling alone."""
    lost_to: dict[str, int] = field(default_factory=dict)
    """What lost_ns went to, summing to it: `clocks`, because the device ran below the clock that
    the ceilings are of, and the `rest`. Empty where nobody sampled clocks."""


@dataclass(frozen=True, slots=True)
class DeviceClock:
    """How fast one rank's device was clocked while its kernels ran, and what that lost."""

    rank: int
    kind: str
    """`gpu` or `cpu`."""
    device: str
    num_samples: int
    """Taken while the device had work."""
    coverage: float
    """Share (0..1) of kernel time whose clock is known."""
    compute_mhz: float | None
    """Mean over kernel time."""
    full_compute_mhz: float | None
    """What the arithmetic ceilings are of."""
    memory_mhz: float | None
    full_memory_mhz: float | None
    power_w: float | None
    """Median."""
    power_limit_w: float | None
    temperature_c: float | None
    """The highest."""
    lost_ns: int
    """Of kernels with a floor, as in `OpResult`."""
    clocks_ns: int
    """The part of it that full clocks would give back."""
    reasons_ns: dict[str, int] = field(default_factory=dict)
    """clocks_ns by why the clock was not higher, in words; sums to it, the largest first."""


@dataclass(frozen=True, slots=True)
class Alignment:
    """One rank's clock against the reference rank's: t_ref = t + offset_ns + drift * (t - t0), with
    t0 the rank's first recorded moment."""

    offset_ns: int
    drift_ppm: float
    residual_ns: int
    accepted: bool
    num_samples: int = 0
    reason: str = ""
    """Why it was not accepted."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """Shares (0..1) of device time that each statement of the report rests on."""

    layer: float
    flop_model: float
    comm_bytes: float
    matched_ranks: float
    launch_link: float
    explained: float
    """Share of wall in leaves other than idle_unexplained, comm_unsplit, unmodelled, unrecorded."""


@dataclass(frozen=True, slots=True)
class Report:
    """The whole finding."""

    wall_ns: int
    """Of `rank_shown`; so are leaves and rollup."""
    leaves: dict[str, int]
    rollup: dict[str, int]
    ranks: list[Split]
    collectives: list[CollectiveResult]
    coverage: Coverage
    clock_alignment: dict[str, Alignment]
    """By rank, as text."""
    dilation: float | None
    """Profiled over unprofiled wall; None where nobody measured it."""
    warnings: list[str]
    format_version: int = FORMAT_VERSION
    method: str = "trace"
    rank_shown: int = 0
    """Lowest rank present: where tokens reach the host."""
    residual_ns: int = 0
    """Wall minus the sum of leaves; always 0, published so that anybody can see it."""
    windows: list[Window] = field(default_factory=list)
    by: str = ""
    groups: list[Group] = field(default_factory=list)
    ops: list[OpResult] = field(default_factory=list)
    ceilings: dict[str, object] = field(default_factory=dict)
    """Rates used, and `origin`."""
    sources: list[str] = field(default_factory=list)
    device_clocks: list[DeviceClock] = field(default_factory=list)
    """Of ranks whose clocks were sampled while they were recorded."""
    advice: list[str] = field(default_factory=list)
    """Sentences: what to do first, with the ns it would give back."""
    emulation: str = ""
    """Where ranks shared a GPU: its words. No cause is named then."""
