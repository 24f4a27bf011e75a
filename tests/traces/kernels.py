"""What the device rows of a made-up model are: sizes, durations, and their true class.

Only matrix products have a model of their cost; the class follows from the specification's rules
and `CEILINGS`, and a shape near any of the rules' borders is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from types import MappingProxyType

from tests.traces.scenario import CEILINGS, NUM_SMS, Scenario
from tpinfer.config.dtypes import DType

COMPUTE_STREAM, COMM_STREAM = 7, 20
HIDDEN, INTERMEDIATE, VOCABULARY = 8192, 28672, 32768
ELEMENT_BYTES = 2
"""bf16."""
FULL_GRID = 2 * NUM_SMS


@dataclass(frozen=True, slots=True)
class DeviceWork:
    """One row that a device will execute."""

    role: str
    """`qkv`, `norm`, `all_reduce`, `h2d`, ...: writers find its name by it."""
    duration_ns: int
    """Work alone: of a collective, the transfer behind the last arrival."""
    leaf: str
    """Where its time belongs; for collectives the leaf of the part behind the last arrival."""
    stream: int = COMPUTE_STREAM
    num_blocks: int = FULL_GRID
    layer: int = -1
    product: tuple[int, int, int] | None = None
    """(M, K, N) of a matrix product."""
    collective: str = ""
    """`allreduce`, `allgather`, `broadcast`; empty for anything else."""
    num_bytes: int = 0
    """Message of a collective, bytes of a copy."""
    gap_ns: int = 0
    """Least pause behind its predecessor on the stream."""
    overlap_ns: int = 0
    """How long before its predecessor's end it may start."""
    late_ns: int = 0
    """The device leaves it lying so long though it could start."""

    @property
    def is_copy(self) -> bool:
        """Whether a copy engine does it."""
        return self.role in ("h2d", "d2h")


@dataclass(frozen=True, slots=True)
class Product:
    """Matrix products of one role: (K, N) of one rank and how well they are written."""

    depth: int
    width: int
    efficiency: float = 0.8
    num_blocks: int = FULL_GRID


def products(tp: int) -> Mapping[str, Product]:
    """By role. `router` is too small for either ceiling, `thin` is slow and fills few SMs."""
    return MappingProxyType(
        {
            "qkv": Product(HIDDEN, 10240 // tp),
            "out": Product(HIDDEN // tp, HIDDEN),
            "gate_up": Product(HIDDEN, 2 * INTERMEDIATE // tp),
            "down": Product(INTERMEDIATE // tp, HIDDEN),
            "shared": Product(HIDDEN, 4096),
            "router": Product(256, 64, 0.02, 16),
            "thin": Product(HIDDEN, 768, 0.2, 12),
            "head": Product(HIDDEN, VOCABULARY // tp),
        }
    )


def roofs_ns(product: tuple[int, int, int]) -> tuple[float, float]:
    """(least time by arithmetic, by memory) of a bf16 product: each tensor touched once."""
    m, k, n = product
    moved = ELEMENT_BYTES * (m * k + k * n + m * n)
    flops = 2 * m * k * n
    rate = CEILINGS.flops_per_s[DType.BFLOAT16]
    return flops / rate * 1e9, moved / CEILINGS.memory[-1].bytes_per_s * 1e9


def class_of(product: tuple[int, int, int], duration_ns: int, num_blocks: int) -> str:
    """`compute`, `memory` or `latency` by the specification's rules.

    Raises ValueError within a fifth of any border, where two right readings could differ.
    """
    by_arithmetic, by_memory = roofs_ns(product)
    roof = max(by_arithmetic, by_memory)
    floor = CEILINGS.kernel_floor_s * 1e9
    share = roof / duration_ns
    borders = [by_arithmetic / by_memory / 1.25, by_memory / by_arithmetic / 1.25, roof / floor]
    if num_blocks < NUM_SMS and roof > floor:
        borders.append(share / 0.3)
    if any(0.8 < ratio < 1.25 for ratio in borders):
        raise ValueError(f"{product} for {duration_ns} ns is too near a border: {borders}")
    if roof < floor or (num_blocks < NUM_SMS and share < 0.3):
        return "latency"
    return "compute" if by_arithmetic >= by_memory else "memory"


class WorkFactory:
    """Makes the rows of one rank: the same kind of row takes a little longer or shorter each
    time."""

    def __init__(self, scenario: Scenario, rank: int) -> None:
        self._scenario = scenario
        self._random = Random(f"{scenario.seed}/{rank}")
        self._products = products(scenario.tp)

    def between(self, least: int, most: int) -> int:
        """A whole number, uniformly."""
        return self._random.randint(least, most)

    def product(self, role: str, tokens: int, layer: int, more_ns: int = 0) -> DeviceWork:
        """A matrix product of `tokens` rows; `more_ns` longer than usual."""
        kind = self._products[role]
        shape = (tokens, kind.depth, kind.width)
        usual = max(*roofs_ns(shape), 40.0) / kind.efficiency
        duration = round(usual * self._random.uniform(1.0, 1.08))
        leaf = class_of(shape, duration, kind.num_blocks)
        return DeviceWork(
            role,
            duration + more_ns,
            leaf,
            num_blocks=kind.num_blocks,
            layer=layer,
            product=shape,
            overlap_ns=self._scenario.overlap_ns,
            gap_ns=self._scenario.queue_gap_ns,
        )

    def plain(self, role: str, tokens: int, layer: int = -1) -> DeviceWork:
        """A kernel nobody has a cost model for."""
        usual = 2500 + 8 * tokens
        return DeviceWork(
            role,
            round(usual * self._random.uniform(0.9, 1.3)),
            "unmodelled",
            layer=layer,
            overlap_ns=self._scenario.overlap_ns,
            gap_ns=self._scenario.queue_gap_ns,
        )

    def collective(self, op: str, role: str, num_bytes: int, layer: int = -1) -> DeviceWork:
        """A collective. Its transfer is the same on every rank, so it follows from the bytes."""
        ranks = self._scenario.tp
        factor = {"allreduce": 2, "allgather": 1}.get(op, ranks / (ranks - 1)) * (ranks - 1) / ranks
        least = CEILINGS.collective_latency_s + factor * num_bytes / CEILINGS.collective_bytes_per_s
        return DeviceWork(
            role,
            round(least * 1.3e9),
            "fused_comm" if role == "fused_all_reduce" else "comm_transfer",
            num_blocks=16,
            layer=layer,
            collective=op,
            num_bytes=num_bytes,
            overlap_ns=self._scenario.overlap_ns,
            gap_ns=self._scenario.queue_gap_ns,
        )

    def copy(self, role: str, num_bytes: int) -> DeviceWork:
        """`h2d` or `d2h`."""
        return DeviceWork(role, self.between(1400, 2600), "copy", num_blocks=0, num_bytes=num_bytes)
