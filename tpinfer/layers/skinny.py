"""Which product runs where: own kernels for few rows, torch's for more, by what each takes on this
device for each weight's shape.

Ranks of one run may choose differently where their clocks do: products differ in their last bits
then, as they do between cards, but every rank uses one choice for all steps.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from tpinfer.layers.matmul import MatMul
from tpinfer.layers.product_tiles import (
    MOST_ROWS,
    TILES,
    SplitSpace,
    Tile,
    split_space,
    tiles_for,
)
from tpinfer.layers.triton_linear import (
    launches_dependent,
    one_row_product,
    skinny_product,
)

Time = Callable[[Sequence[Callable[[], object]]], float]
"""Seconds of one of some calls that run one behind the other, as in a recorded step."""
_SAMPLED_ROWS = (1, 4, 16, 64)
_REPEATS = 5
_APART_BYTES = 128 << 20
"""Weights read in turn that together take this much are in no cache when it is their turn again."""
_LEAST_CALLS, _MOST_COPIES = 6, 16
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True, slots=True)
class SkinnyMatMul:
    """The product with one weight, of any number of rows."""

    weight: torch.Tensor
    """[N, K]."""
    bias: torch.Tensor | None
    by_rows: tuple[Tile | None, ...]
    """How it is cut for each number of rows up to MOST_ROWS; None where torch is as fast."""
    dependent: bool
    """Launched dependent."""
    space: SplitSpace | None = None
    """Of this shape."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, K] -> [T, N]."""
        tile = self.by_rows[len(x)] if len(x) <= MOST_ROWS else None
        if tile is None:
            return F.linear(x, self.weight, self.bias)
        return skinny_product(x, self.weight, self.bias, tile, self.space, dependent=self.dependent)

    @property
    def fuses(self) -> bool:
        """Whether one row may go through `normed`, `gated` and `add_to`."""
        return self.by_rows[1] is not None

    def normed(self, x_1K: torch.Tensor, norm: tuple[torch.Tensor, float]) -> torch.Tensor:
        """The product [1, N] of rms_norm(x) * weight; `norm` is (weight [K], eps)."""
        out = x_1K.new_empty(1, self.weight.shape[0])
        self._run(x_1K, out, norm)
        return out

    def gating_rows(self) -> frozenset[int]:
        """Numbers of rows that may go through `gated_rows`: those whose tile fits the device with
        its gate, which reads two weights at once. Tries each tile with the most rows it has."""
        own = {rows: tile for rows, tile in enumerate(self.by_rows) if tile and rows > 1}
        most = {tile: rows for rows, tile in own.items()}
        fits = {tile: self._can_gate(rows) for tile, rows in most.items()}
        return frozenset(rows for rows, tile in own.items() if fits[tile])

    def _can_gate(self, num_rows: int) -> bool:
        try:
            self.gated_rows(self.weight.new_zeros(num_rows, self.weight.shape[1]))
        except Exception:  # the compiler's own: too much shared memory, and the like
            return False
        return True

    def gated_rows(self, x_TK: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up [T, N / 2] of the product, the gate's columns first."""
        tile = self.by_rows[len(x_TK)]
        assert tile is not None, "whoever calls has asked `gating_rows`"
        return skinny_product(
            x_TK, self.weight, self.bias, tile, self.space, gates=True, dependent=self.dependent
        )

    def gated(self, x_1K: torch.Tensor, norm: tuple[torch.Tensor, float] | None) -> torch.Tensor:
        """`gated_rows` of one row; `norm` as for `normed`, None where x is normed already."""
        out = x_1K.new_empty(1, self.weight.shape[0] // 2)
        self._run(x_1K, out, norm, gates=True)
        return out

    def add_to(self, residual_1N: torch.Tensor, x_1K: torch.Tensor) -> None:
        """residual += the product, rounded before it is added."""
        self._run(x_1K, residual_1N, None, adds=True)

    def _run(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        norm: tuple[torch.Tensor, float] | None,
        *,
        adds: bool = False,
        gates: bool = False,
    ) -> None:
        tile = self.by_rows[1]
        assert tile is not None, "whoever calls has asked `fuses`"
        one_row_product(
            x if x.stride(1) == 1 else x.contiguous(), self.weight, self.bias, tile, out, norm,
            adds=adds, gates=gates, dependent=self.dependent,
        )  # fmt: skip


@dataclass(slots=True)
class SkinnyProducts:
    """Binds products; what was measured for a shape is kept for weights of the same shape."""

    time: Time
    dependent: bool = False
    """Kernels are launched dependent."""
    chosen: dict[tuple[int, int, int], Tile | None] = field(default_factory=dict)
    """(N, K, least rows it is for) -> the fastest tile, or None where torch is as fast."""
    spaces: dict[int, SplitSpace] = field(default_factory=dict)
    """N -> what products of one shape share, which run one behind the other."""
    faster: list[float] = field(default_factory=list)
    """Torch's time over the own one, of each case that was measured."""

    def bind(self, weight: torch.Tensor, bias: torch.Tensor | None) -> MatMul:
        """The product with a weight [N, K], of any number of rows."""
        tiles = {rows: self._tile(weight, rows) for rows in _SAMPLED_ROWS}
        by_rows = tuple(_of_rows(tiles, rows) for rows in range(MOST_ROWS + 1))
        return SkinnyMatMul(weight, bias, by_rows, self.dependent, self._space(weight))

    def words(self) -> str:
        """What was chosen, for people."""
        own = sum(tile is not None for tile in self.chosen.values())
        gain = f"; {statistics.median(self.faster):.2f} times torch's rate" if own else ""
        return f"own kernels in {own} of {len(self.chosen)} cases of up to {MOST_ROWS} rows{gain}"

    def _tile(self, weight: torch.Tensor, rows: int) -> Tile | None:
        key = weight.shape[0], weight.shape[1], rows
        if key not in self.chosen:
            try:
                self.chosen[key] = self._fastest(weight, rows)
            except torch.OutOfMemoryError:  # no room for what is measured: torch needs none
                self.chosen[key] = None
        return self.chosen[key]

    def _fastest(self, weight: torch.Tensor, rows: int) -> Tile | None:
        x = torch.ones(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
        x *= torch.arange(rows, device=x.device, dtype=x.dtype).unsqueeze(1) + 1
        expected = F.linear(x, weight)
        bound = _TOLERANCES[weight.dtype] * float(expected.abs().max())
        weights = in_turn(weight)
        torch_s = best_s = self.time([partial(F.linear, x, one) for one in weights])
        best: Tile | None = None
        for tile in tiles_for(rows, weight.shape[0]):
            if not self._error(x, weight, tile, expected) <= bound:
                continue
            tile_s = self.time([partial(self._own, x, one, tile) for one in weights])
            if tile_s < best_s:
                best, best_s = tile, tile_s
        if best is not None:
            self.faster.append(torch_s / best_s)
        return best

    def _error(
        self, x: torch.Tensor, weight: torch.Tensor, tile: Tile, expected: torch.Tensor
    ) -> float:
        """Largest; infinite where the tile does not fit the device."""
        try:
            return _error(self._own(x, weight, tile), expected)
        except Exception:  # the compiler's own: too much shared memory, and the like
            return float("inf")

    def _own(self, x: torch.Tensor, weight: torch.Tensor, tile: Tile) -> torch.Tensor:
        space = self._space(weight)
        return skinny_product(x, weight, None, tile, space, dependent=self.dependent)

    def _space(self, weight: torch.Tensor) -> SplitSpace:
        count = weight.shape[0]
        if count not in self.spaces:
            self.spaces[count] = split_space(count, weight.device)
        return self.spaces[count]


def in_turn(weight: torch.Tensor) -> list[torch.Tensor]:
    """The weight and copies of it, in an order in which no cache holds the next one."""
    num_apart = min(_MOST_COPIES, -(-_APART_BYTES // weight.nbytes))
    apart = [weight, *(weight.clone() for _ in range(num_apart - 1))]
    return [apart[i % num_apart] for i in range(max(_LEAST_CALLS, num_apart))]


def _of_rows(tiles: Mapping[int, Tile | None], rows: int) -> Tile | None:
    """Of the sampled number of rows that is at least `rows`."""
    if not rows:
        return None
    return tiles[next(count for count in _SAMPLED_ROWS if count >= rows)]


def device_timer(device: torch.device) -> Time:
    """Times calls in a recorded graph, as steps replay them, by device events behind a write that
    leaves nothing of the weights in L2. Where they cannot be recorded, as they are launched."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    stream = torch.cuda.Stream(device)

    def time(calls: Sequence[Callable[[], object]]) -> float:
        def run() -> None:
            for call in calls:
                call()

        run()  # what is compiled or tuned at a first call
        torch.cuda.synchronize(device)
        graph, again = torch.cuda.CUDAGraph(), run
        try:
            # Not torch.cuda.graph, which empties torch's cache of memory each time.
            with torch.cuda.stream(stream):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    run()
                finally:
                    graph.capture_end()
            again = graph.replay
        except RuntimeError:
            torch.cuda.synchronize(device)
        again()
        found = []
        for _ in range(_REPEATS):
            flush.zero_()
            events[0].record()
            again()
            events[1].record()
            events[1].synchronize()
            found.append(events[0].elapsed_time(events[1]) * 1e-3)
        return statistics.median(found) / len(calls)

    return time


def load_skinny(
    device: torch.device, *, is_alone: bool = True
) -> tuple[SkinnyProducts | None, str]:
    """(products, ""), or (None, why not): the kernels are tried once on a small weight. They are
    launched dependent where no other rank's kernels stand between them: beside NCCL's it has not
    been measured."""
    try:
        dependent = is_alone and launches_dependent(device)
        space = split_space(64, device)
        for rows in (1, 2, 24):
            x, weight = _small(device, rows, 128), _small(device, 64, 128)
            # The least of them: those that do not fit are left out weight by weight.
            tile = tiles_for(rows)[-1 if rows > 16 else 2]
            found = skinny_product(x, weight, None, tile, space, dependent=dependent)
            if _error(found, F.linear(x, weight)) > 1e-3:
                return None, f"the kernel for {rows} rows is wrong here"
            gated = skinny_product(x, weight, None, tile, space, gates=True, dependent=dependent)
            gate, up = F.linear(x, weight).chunk(2, -1)
            if _error(gated, F.silu(gate) * up) > 1e-3:
                return None, f"the gated kernel for {rows} rows is wrong here"
        if _why_fused_wrong(device, dependent=dependent) > 1e-3:
            return None, "the kernel for one row and the ops around it is wrong here"
    except Exception as failure:  # the compiler's own, the driver's, whatever ptxas says
        first = (str(failure).splitlines() or [type(failure).__name__])[0]
        return None, f"the kernel for few rows does not run here: {first[:160]}"
    return SkinnyProducts(device_timer(device), dependent), ""


def _why_fused_wrong(device: torch.device, *, dependent: bool) -> float:
    """Largest error of norm, gate, and addition around products of one row: an MLP."""
    gate_up, down = _small(device, 96, 128), _small(device, 128, 48)
    residual, weight = _small(device, 1, 128), _small(device, 1, 128)[0]
    tiles: tuple[Tile | None, ...] = (None, TILES[0])
    hidden = F.rms_norm(residual, weight.shape, weight, 1e-5)
    gate, up = F.linear(hidden, gate_up).chunk(2, -1)
    expected = residual + F.linear(F.silu(gate) * up, down)
    made = [SkinnyMatMul(part, None, tiles, dependent) for part in (gate_up, down)]
    made[1].add_to(residual, made[0].gated(residual, (weight, 1e-5)))
    return _error(residual, expected)


def _small(device: torch.device, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.rand(shape, generator=generator).sub_(0.5).to(device)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference; infinite where something is not a number."""
    return float((found - expected).abs().nan_to_num(float("inf")).max())
