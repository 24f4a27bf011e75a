"""How the own products of few rows are cut: what is tried for a number of rows, and the room that
programs need which share the inner dimension."""

from dataclasses import dataclass

import torch

MOST_ROWS = 64
"""Rows that these kernels take."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut."""

    columns: int
    """Columns of output of a program."""
    inner: int
    """Elements of the inner dimension that it reads at once."""
    num_warps: int
    num_stages: int = 3
    num_splits: int = 1
    """Programs that share the inner dimension of some columns."""


TILES = (Tile(8, 1024, 4), Tile(16, 512, 4), Tile(16, 256, 8), Tile(32, 256, 4))
"""What is tried on a device for up to 16 rows."""
MANY_TILES = (
    Tile(64, 128, 4, 4), Tile(128, 64, 8, 4), Tile(64, 128, 4, 4, 2), Tile(64, 128, 4, 4, 4),
    Tile(128, 64, 8, 4, 2), Tile(128, 64, 8, 4, 4),
)  # fmt: skip
"""What is tried for more. Wide tiles read the input less often: at 64 rows of bfloat16 a tile of 64
columns reads as much of it from L2 as of the weight."""
_MOST_SPLIT_COLUMNS = 16384
"""Columns beyond which the programs of one split fill every device."""


def tiles_for(num_rows: int, num_columns: int = 1) -> tuple[Tile, ...]:
    """What is tried on a device for a number of rows and columns of output."""
    if num_rows <= 16:
        return TILES
    return tuple(t for t in MANY_TILES if t.num_splits == 1 or num_columns <= _MOST_SPLIT_COLUMNS)


@dataclass(frozen=True, slots=True)
class SplitSpace:
    """What split programs leave to the one that adds, for products of one shape that run one behind
    the other."""

    parts: torch.Tensor
    """float32, room for every part of every split."""
    arrived: torch.Tensor
    """int32 [programs of a split], 0 between launches."""


def split_space(num_columns: int, device: torch.device) -> SplitSpace:
    """Room for any of the tiles."""
    tiles = [tile for tile in tiles_for(MOST_ROWS, num_columns) if tile.num_splits > 1]
    padded = num_columns + max((tile.columns for tile in tiles), default=0)
    most = max((tile.num_splits for tile in tiles), default=0)
    parts = torch.empty(padded * most * MOST_ROWS if most else 1, device=device)
    return SplitSpace(parts, torch.zeros(padded, dtype=torch.int32, device=device))
