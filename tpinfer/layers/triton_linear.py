"""Products of a few rows with a weight, at the rate at which the weight can be read.

One row is multiplied element by element and summed; 2 to 16 rows go through the tensor cores,
padded to 16. A program has some columns of the output for itself and walks their whole inner
dimension, so sums have one order whatever else runs: no atomics, the same bits every time.

Letters: T rows, N columns of output, K of input.
"""

# Annotations and operators are Triton's own language, which type checkers cannot follow.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

MOST_ROWS = 16
"""Rows that these kernels take."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut."""

    columns: int
    """Columns of output of a program."""
    inner: int
    """Elements of the inner dimension that it reads at once."""
    num_warps: int


TILES = (Tile(8, 1024, 4), Tile(16, 512, 4), Tile(16, 256, 8), Tile(32, 256, 4))
"""What is tried on a device, for one row and for more."""


@triton.jit
def one_row(
    x, weight, bias, out, num_columns, num_inner,
    COLUMNS: tl.constexpr, INNER: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """out [N] = x [K] @ weight [N, K].T + bias [N]. Grid: (N / COLUMNS)."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < num_columns
    rows = weight + columns.to(tl.int64)[:, None] * num_inner
    places = tl.arange(0, INNER)
    total = tl.zeros([COLUMNS, INNER], tl.float32)
    for start in tl.range(0, num_inner, INNER):
        here = start + places
        mask = here < num_inner
        part = tl.load(
            rows + here[None, :], mask=inside[:, None] & mask[None, :], other=0.0,
            eviction_policy="evict_first",
        )  # fmt: skip
        value = tl.load(x + here, mask=mask, other=0.0).to(tl.float32)
        total += part.to(tl.float32) * value[None, :]
    found = tl.sum(total, 1)
    if HAS_BIAS:
        found += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + columns, found.to(out.dtype.element_ty), mask=inside)


@triton.jit
def few_rows(
    x, weight, bias, out, num_rows, num_columns, num_inner, x_stride,
    COLUMNS: tl.constexpr, INNER: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [T, N] = x [T, K] @ weight [N, K].T + bias [N] for T up to 16. Grid: (N / COLUMNS)."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    lines = tl.arange(0, 16)
    inside, is_row = columns < num_columns, lines < num_rows
    rows = weight + columns.to(tl.int64)[:, None] * num_inner
    tokens = x + lines.to(tl.int64)[:, None] * x_stride
    places = tl.arange(0, INNER)
    total = tl.zeros([COLUMNS, 16], tl.float32)
    for start in tl.range(0, num_inner, INNER):
        here = start + places
        mask = here < num_inner
        part = tl.load(
            rows + here[None, :], mask=inside[:, None] & mask[None, :], other=0.0,
            eviction_policy="evict_first",
        )  # fmt: skip
        value = tl.load(tokens + here[None, :], mask=is_row[:, None] & mask[None, :], other=0.0)
        total = tl.dot(part, tl.trans(value), total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[:, None]
    target = out + lines.to(tl.int64)[None, :] * num_columns + columns[:, None]
    tl.store(target, total.to(out.dtype.element_ty), mask=inside[:, None] & is_row[None, :])


def skinny_product(
    x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, tile: Tile
) -> torch.Tensor:
    """[T, N] in x's dtype, for T from 1 to MOST_ROWS; the weight is contiguous, float32 inside."""
    num_rows, num_inner = x_TK.shape
    num_columns = weight_NK.shape[0]
    if x_TK.stride(1) != 1:
        x_TK = x_TK.contiguous()
    out_TN = x_TK.new_empty(num_rows, num_columns)
    bias = out_TN if bias_N is None else bias_N
    if num_rows == 1:
        columns = tile.columns
        one_row[(-(-num_columns // columns),)](
            x_TK, weight_NK, bias, out_TN, num_columns, num_inner, COLUMNS=columns,
            INNER=tile.inner, HAS_BIAS=bias_N is not None,
            num_warps=tile.num_warps,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
        return out_TN
    columns = max(16, tile.columns)  # least of a tensor core's tile
    exact = x_TK.dtype is torch.float32
    few_rows[(-(-num_columns // columns),)](
        x_TK, weight_NK, bias, out_TN, num_rows, num_columns, num_inner, x_TK.stride(0),
        COLUMNS=columns, INNER=min(tile.inner, 512), HAS_BIAS=bias_N is not None,
        PRECISION="ieee" if exact else "tf32",
        num_warps=tile.num_warps,  # pyright: ignore[reportCallIssue]
        num_stages=3,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return out_TN
