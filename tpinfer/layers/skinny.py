"""Which product runs where: own kernels for few rows, torch's for more, by what each takes on this
device for each weight's shape.

Ranks of one run may choose differently where their clocks do: products differ in their last bits
then, as they do between cards, but every rank uses one choice for all steps.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from tpinfer.layers.matmul import MatMul
from tpinfer.layers.triton_linear import MOST_ROWS, TILES, Tile, skinny_product

Time = Callable[[Callable[[], object]], float]
"""Seconds of one call whose weights are not in a cache."""
_SAMPLED_ROWS = (1, 4, 16)
_REPEATS = 5
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(slots=True)
class SkinnyProducts:
    """Binds products; what was measured for a shape is kept for weights of the same shape."""

    time: Time
    chosen: dict[tuple[int, int, int], Tile | None] = field(default_factory=dict)
    """(N, K, least rows it is for) -> the fastest tile, or None where torch is as fast."""
    faster: list[float] = field(default_factory=list)
    """Torch's time over the own one, of each case that was measured."""

    def bind(self, weight: torch.Tensor, bias: torch.Tensor | None) -> MatMul:
        """The product with a weight [N, K], of any number of rows."""
        tiles = {rows: self._tile(weight, rows) for rows in _SAMPLED_ROWS}
        by_rows = [_of_rows(tiles, rows) for rows in range(MOST_ROWS + 1)]

        def matmul(x: torch.Tensor) -> torch.Tensor:
            tile = by_rows[len(x)] if len(x) <= MOST_ROWS else None
            if tile is None:
                return F.linear(x, weight, bias)
            return skinny_product(x, weight, bias, tile)

        return matmul

    def words(self) -> str:
        """What was chosen, for people."""
        own = sum(tile is not None for tile in self.chosen.values())
        gain = f"; {statistics.median(self.faster):.2f} times torch's rate" if own else ""
        return f"own kernels in {own} of {len(self.chosen)} cases of up to {MOST_ROWS} rows{gain}"

    def _tile(self, weight: torch.Tensor, rows: int) -> Tile | None:
        key = weight.shape[0], weight.shape[1], rows
        if key not in self.chosen:
            self.chosen[key] = self._fastest(weight, rows)
        return self.chosen[key]

    def _fastest(self, weight: torch.Tensor, rows: int) -> Tile | None:
        x = torch.ones(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
        x *= torch.arange(rows, device=x.device, dtype=x.dtype).unsqueeze(1) + 1
        expected = F.linear(x, weight)
        bound = _TOLERANCES[weight.dtype] * float(expected.abs().max())
        torch_s = best_s = self._typical(lambda: F.linear(x, weight))
        best: Tile | None = None
        for tile in TILES:
            error = float((skinny_product(x, weight, None, tile) - expected).abs().max())
            if not error <= bound:
                continue
            tile_s = self._typical(lambda tile=tile: skinny_product(x, weight, None, tile))
            if tile_s < best_s:
                best, best_s = tile, tile_s
        if best is not None:
            self.faster.append(torch_s / best_s)
        return best

    def _typical(self, call: Callable[[], object]) -> float:
        call()
        return statistics.median(self.time(call) for _ in range(_REPEATS))


def _of_rows(tiles: Mapping[int, Tile | None], rows: int) -> Tile | None:
    """Of the sampled number of rows that is at least `rows`."""
    if not rows:
        return None
    return tiles[next(count for count in _SAMPLED_ROWS if count >= rows)]


def device_timer(device: torch.device) -> Time:
    """Times by device events, each behind a write that leaves nothing of the weights in L2."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def time(call: Callable[[], object]) -> float:
        flush.zero_()
        events[0].record()
        call()
        events[1].record()
        events[1].synchronize()
        return events[0].elapsed_time(events[1]) * 1e-3

    return time


def load_skinny(device: torch.device) -> tuple[SkinnyProducts | None, str]:
    """(products, ""), or (None, why not): the kernels are tried once on a small weight."""
    try:
        weight = torch.ones(64, 128, dtype=torch.float32, device=device)
        for rows in (1, 2):
            found = skinny_product(weight[:rows], weight, None, TILES[0])
            if float((found - 128).abs().max()) > 1e-3:
                return None, "the kernel for few rows is wrong here"
    except Exception as failure:  # the compiler's own, the driver's, whatever ptxas says
        first = (str(failure).splitlines() or [type(failure).__name__])[0]
        return None, f"the kernel for few rows does not run here: {first[:160]}"
    return SkinnyProducts(device_timer(device)), ""
