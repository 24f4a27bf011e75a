"""What a made-up run is like: ranks, steps, clocks, who is late, what the recorder loses.

A `Scenario` and its seed decide every nanosecond of a run; nothing else does.
"""

from dataclasses import dataclass

from tpinfer.config.ceilings import Ceilings, MemoryLevel
from tpinfer.config.dtypes import DType

CEILINGS = Ceilings(
    memory=(MemoryLevel("HBM", 80 << 30, 2e12),),
    flops_per_s={DType.BFLOAT16: 5e14},
    kernel_floor_s=2e-6,
    collective_latency_s=5e-6,
    collective_bytes_per_s=3e11,
    origin="made up for generated traces",
)
"""What generated kernels are judged by: one memory level, so that no working set is in doubt."""
NUM_SMS = 132


@dataclass(frozen=True, slots=True)
class Clock:
    """How a rank's clock reads the true time: local = true + offset + drift * true."""

    offset_ns: int = 0
    drift_ppm: int = 0

    def local(self, true_ns: int) -> int:
        """What this clock shows at `true_ns`, in whole ns; later never shows less."""
        return true_ns + self.offset_ns + true_ns * self.drift_ppm // 1_000_000


@dataclass(frozen=True, slots=True)
class Delay:
    """One rank is made late: its host, or the kernel right before a collective."""

    rank: int
    ns: int
    where: str = "host"
    """`host`: before the launch of the collective; `kernel`: the kernel before it runs longer.
    A replayed graph is launched once: there a late host holds up the first layer's and with it
    the whole replay."""
    step: int | None = None
    """None for every step."""
    layer: int | None = None
    """None for every layer."""

    def strikes(self, rank: int, step: int, layer: int) -> bool:
        """Whether it holds here."""
        return rank == self.rank and self.step in (None, step) and self.layer in (None, layer)


@dataclass(frozen=True, slots=True)
class Damage:
    """What the recorder did to one rank's rows of one step."""

    kind: str
    """`lost`: rows are missing; `zero`: a row has time 0; `backwards`: a row ends before it
    starts; `endless`: a row lasts for seconds."""
    rank: int
    step: int
    first: int = 4
    """Device row of the step (0 is its first) that is hit."""
    count: int = 1
    """Rows hit from there on; 0 for all that follow."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One run. Step 0 is a prefill, the others are decode steps."""

    name: str
    num_ranks: int = 2
    num_steps: int = 4
    num_layers: int = 2
    seed: int = 0
    clocks: tuple[Clock, ...] = ()
    """Per rank; missing ones are true."""
    delays: tuple[Delay, ...] = ()
    damages: tuple[Damage, ...] = ()
    is_graph: bool = False
    """Decode steps are one launch of a captured graph."""
    is_async: bool = False
    """Step n is launched before the tokens of step n-1 are read; its annotation ends with its
    launches."""
    is_hidden: bool = False
    """The all-reduce after attention runs on its own stream beside independent work."""
    collective: str = "nccl"
    """`nccl`, `custom` (a kernel of the engine's own) or `fused` (reduce and norm in one, for the
    all-reduce after attention; the others stay NCCL's)."""
    overlap_ns: int = 0
    """Programmatic dependent launch: how long before its predecessor's end a kernel may start."""
    queue_gap_ns: int = 0
    """Pause of a stream between two kernels that were both launched long before."""
    event_latency_ns: int = 0
    """How long after an event a stream that waits for it goes on."""
    late_start_ns: int = 0
    """How long a device leaves the first kernel of each layer lying though nothing is before it."""
    has_broadcast: bool = False
    """Each decode step begins with a broadcast of rank 0, which waits for nobody."""
    group_size: int = 0
    """Ranks of one tensor-parallel group; 0 for all ranks."""
    device_shift_ns: int = 0
    """Error of the recorder: how much too late (too early, where negative) it says that everything
    on devices was."""
    exit_jitter_ns: int = 0
    """Ranks leave a collective up to so much after each other."""
    launch_ns: int = 3000
    """Typical time of one launch call."""
    operator_ns: int = 600
    """Typical time of the host in an operator before it launches."""
    batch: int = 8
    prompt_tokens: int = 2048

    @property
    def tp(self) -> int:
        """Ranks that share a model."""
        return self.group_size or self.num_ranks

    def group(self, rank: int) -> list[int]:
        """Ranks of the group of `rank`."""
        first = rank // self.tp * self.tp
        return list(range(first, first + self.tp))

    def clock(self, rank: int) -> Clock:
        """Of one rank."""
        return self.clocks[rank] if rank < len(self.clocks) else Clock()
