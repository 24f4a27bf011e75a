"""Products of a few rows with a weight, at the rate at which the weight can be read.

One row is multiplied element by element and summed; 2 to 64 rows go through the tensor cores,
padded to 16, 32 or 64. A program has some columns of the output for itself and walks their whole
inner dimension; or several programs walk a part of it each, and the last of them to arrive adds
what all left behind. Sums have one order whatever else runs: the same bits every time.

The kernel of one row takes the ops around it along, each of which would be a launch of its own that
reads next to nothing: the RMSNorm of its input in front, the addition to the residual or the gated
SiLU behind. That of several rows takes the gate.

From sm_90 on the kernels are launched dependent (programmatic dependent launch): one begins while
the kernel before it ends, and reads its first weights, which no kernel writes, before it waits:
into registers for one row, into L2 for several.

Letters: T rows, N columns of output, K of input.
"""

# Annotations and operators are Triton's own language, which type checkers cannot follow.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tpinfer.layers.product_tiles import SplitSpace, Tile

_LINE_BYTES = 128


def launches_dependent(device: torch.device) -> bool:
    """Whether kernels can be launched dependent there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def _gated(gate, up, kind: tl.constexpr):
    """silu(gate) * up of float32, rounded to `kind` where ops of their own would round."""
    wide = gate.to(kind).to(tl.float32)
    silu = tl.div_rn(wide, 1.0 + tl.exp(-wide)).to(kind)
    return silu.to(tl.float32) * up.to(kind).to(tl.float32)


@triton.jit
def _product(
    x, weight, bias, norm, out, num_columns, num_inner, eps,
    COLUMNS: tl.constexpr, INNER: tl.constexpr, HAS_BIAS: tl.constexpr, NORMS: tl.constexpr,
    ADDS: tl.constexpr, GATES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out [N] = x [K] @ weight [N, K].T + bias [N]. Grid: (N / COLUMNS).

    NORMS: of rms_norm(x) * norm [K], whose factor is taken out of the sum. ADDS: added to what is
    in out. GATES: weight [2N, K] and bias [2N], silu of the product with the first half times that
    with the second. Rounds where ops of their own would, but behind the norm.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < num_columns
    rows = weight + columns.to(tl.int64)[:, None] * num_inner
    others = rows + num_columns.to(tl.int64) * num_inner
    places = tl.arange(0, INNER)
    read = inside[:, None] & (places < num_inner)[None, :]
    at = places[None, :]
    part = tl.load(rows + at, mask=read, other=0.0, eviction_policy="evict_first")
    if GATES:
        second = tl.load(others + at, mask=read, other=0.0, eviction_policy="evict_first")
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros([COLUMNS, INNER], tl.float32)
    up = tl.zeros([COLUMNS, INNER], tl.float32)
    squares = tl.zeros([INNER], tl.float32)
    for start in tl.range(0, num_inner, INNER):
        here = start + places
        mask = here < num_inner
        value = tl.load(x + here, mask=mask, other=0.0).to(tl.float32)
        if NORMS:
            squares += value * value
            value *= tl.load(norm + here, mask=mask, other=0.0).to(tl.float32)
        total += part.to(tl.float32) * value[None, :]
        following = here + INNER
        read = inside[:, None] & (following < num_inner)[None, :]
        at = following[None, :]
        part = tl.load(rows + at, mask=read, other=0.0, eviction_policy="evict_first")
        if GATES:
            up += second.to(tl.float32) * value[None, :]
            second = tl.load(others + at, mask=read, other=0.0, eviction_policy="evict_first")
    kind = out.dtype.element_ty
    found = tl.sum(total, 1)
    if NORMS:
        factor = tl.rsqrt(tl.sum(squares, 0) / num_inner + eps)
        found *= factor
    if HAS_BIAS:
        found += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if GATES:
        product = tl.sum(up, 1)
        if NORMS:
            product *= factor
        if HAS_BIAS:
            product += tl.load(bias + num_columns + columns, mask=inside, other=0.0).to(tl.float32)
        found = _gated(found, product, kind)
    if ADDS:
        before = tl.load(out + columns, mask=inside, other=0.0).to(tl.float32)
        found = before + found.to(kind).to(tl.float32)
    tl.store(out + columns, found.to(kind), mask=inside)


@triton.jit
def one_row(
    x, weight, bias, norm, out, num_columns, num_inner, eps,
    COLUMNS: tl.constexpr, INNER: tl.constexpr, HAS_BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The product alone. Each has a name of its own, by which recordings tell them apart."""
    _product(
        x, weight, bias, norm, out, num_columns, num_inner, eps, COLUMNS, INNER, HAS_BIAS,
        False, False, False, DEPENDENT,
    )  # fmt: skip


@triton.jit
def one_row_normed(
    x, weight, bias, norm, out, num_columns, num_inner, eps,
    COLUMNS: tl.constexpr, INNER: tl.constexpr, HAS_BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """With the norm in front."""
    _product(
        x, weight, bias, norm, out, num_columns, num_inner, eps, COLUMNS, INNER, HAS_BIAS,
        True, False, False, DEPENDENT,
    )  # fmt: skip


@triton.jit
def one_row_added(
    x, weight, bias, norm, out, num_columns, num_inner, eps,
    COLUMNS: tl.constexpr, INNER: tl.constexpr, HAS_BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """With the addition behind."""
    _product(
        x, weight, bias, norm, out, num_columns, num_inner, eps, COLUMNS, INNER, HAS_BIAS,
        False, True, False, DEPENDENT,
    )  # fmt: skip


@triton.jit
def one_row_gated(
    x, weight, bias, norm, out, num_columns, num_inner, eps,
    COLUMNS: tl.constexpr, INNER: tl.constexpr, HAS_BIAS: tl.constexpr, NORMS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """With the gate behind, and the norm in front where NORMS."""
    _product(
        x, weight, bias, norm, out, num_columns, num_inner, eps, COLUMNS, INNER, HAS_BIAS,
        NORMS, False, True, DEPENDENT,
    )  # fmt: skip


@triton.jit
def _fetch_ahead(
    weight, columns, num_columns, num_inner, first, LINE: tl.constexpr, INNER: tl.constexpr
):  # fmt: skip
    """Ask L2 for INNER elements from `first` of some columns, LINE elements at a time. Places
    beyond the weight are those of its last line."""
    lines = first + tl.arange(0, INNER // LINE) * LINE
    lines = tl.minimum(lines, num_inner - 1)
    rows = weight + tl.minimum(columns, num_columns - 1).to(tl.int64)[:, None] * num_inner
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [(rows + lines[None, :]).to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _product_of_rows(
    x, weight, bias, out, parts, arrived, num_rows, num_columns, num_inner, x_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr, GATES: tl.constexpr, LINE: tl.constexpr, PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out [T, N] = x [T, K] @ weight [N, K].T + bias [N] for T up to ROWS. Grid: (N / COLUMNS *
    SPLITS). parts float32 [N / COLUMNS, SPLITS, COLUMNS, ROWS] and arrived int32 [N / COLUMNS], 0
    before and after, are used where SPLITS > 1.

    GATES: weight [2N, K] and bias [2N], silu of the product with the first half times that with
    the second, rounded where an op of its own would; parts then hold both.
    """
    block, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    mine = tl.arange(0, COLUMNS)
    columns = block * COLUMNS + mine
    lines = tl.arange(0, ROWS)
    inside, is_row = columns < num_columns, lines < num_rows
    rows = weight + columns.to(tl.int64)[:, None] * num_inner
    others = rows + num_columns.to(tl.int64) * num_inner
    tokens = x + lines.to(tl.int64)[:, None] * x_stride
    places = tl.arange(0, INNER)
    each = tl.cdiv(tl.cdiv(num_inner, INNER), SPLITS) * INNER
    total = tl.zeros([COLUMNS, ROWS], tl.float32)
    up = tl.zeros([COLUMNS, ROWS], tl.float32)
    if DEPENDENT:
        gdc_launch_dependents()
        _fetch_ahead(weight, columns, num_columns, num_inner, split * each, LINE, INNER * 4)
        if GATES:
            second = weight + num_columns.to(tl.int64) * num_inner
            _fetch_ahead(second, columns, num_columns, num_inner, split * each, LINE, INNER * 4)
        gdc_wait()
    for start in tl.range(split * each, tl.minimum(split * each + each, num_inner), INNER):
        here = start + places
        mask = here < num_inner
        read = inside[:, None] & mask[None, :]
        part = tl.load(rows + here[None, :], mask=read, other=0.0, eviction_policy="evict_first")
        value = tl.load(tokens + here[None, :], mask=is_row[:, None] & mask[None, :], other=0.0)
        turned = tl.trans(value)
        total = tl.dot(part, turned, total, input_precision=PRECISION)
        if GATES:
            part = tl.load(
                others + here[None, :], mask=read, other=0.0, eviction_policy="evict_first"
            )
            up = tl.dot(part, turned, up, input_precision=PRECISION)
    if SPLITS > 1:
        halves: tl.constexpr = 2 if GATES else 1
        size: tl.constexpr = COLUMNS * ROWS
        corner = parts + block.to(tl.int64) * SPLITS * halves * size
        at = mine[:, None] * ROWS + lines[None, :]
        tl.store(corner + split * halves * size + at, total, cache_modifier=".cg")
        if GATES:
            tl.store(corner + (split * halves + 1) * size + at, up, cache_modifier=".cg")
        tl.debug_barrier()  # the count is one thread's: the others' stores come before it
        before = tl.atomic_add(arrived + block, 1, sem="acq_rel", scope="gpu")
        if before < SPLITS - 1:
            return
        tl.store(arrived + block, 0)
        tl.debug_barrier()
        total = tl.zeros([COLUMNS, ROWS], tl.float32)
        up = tl.zeros([COLUMNS, ROWS], tl.float32)
        for other in tl.static_range(SPLITS):
            total += tl.load(corner + other * halves * size + at, cache_modifier=".cg")
            if GATES:
                up += tl.load(corner + (other * halves + 1) * size + at, cache_modifier=".cg")
    kind = out.dtype.element_ty
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[:, None]
    if GATES:
        if HAS_BIAS:
            of_up = tl.load(bias + num_columns + columns, mask=inside, other=0.0)
            up += of_up.to(tl.float32)[:, None]
        total = _gated(total, up, kind)
    target = out + lines.to(tl.int64)[None, :] * num_columns + columns[:, None]
    tl.store(target, total.to(kind), mask=inside[:, None] & is_row[None, :])


@triton.jit
def few_rows(
    x, weight, bias, out, parts, arrived, num_rows, num_columns, num_inner, x_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr, LINE: tl.constexpr, PRECISION: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The product alone."""
    _product_of_rows(
        x, weight, bias, out, parts, arrived, num_rows, num_columns, num_inner, x_stride, ROWS,
        COLUMNS, INNER, SPLITS, HAS_BIAS, False, LINE, PRECISION, DEPENDENT,
    )  # fmt: skip


@triton.jit
def few_rows_gated(
    x, weight, bias, out, parts, arrived, num_rows, num_columns, num_inner, x_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr, LINE: tl.constexpr, PRECISION: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """With the gate behind."""
    _product_of_rows(
        x, weight, bias, out, parts, arrived, num_rows, num_columns, num_inner, x_stride, ROWS,
        COLUMNS, INNER, SPLITS, HAS_BIAS, True, LINE, PRECISION, DEPENDENT,
    )  # fmt: skip


def skinny_product(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    tile: Tile,
    space: SplitSpace | None = None,
    *,
    gates: bool = False,
    dependent: bool = False,
) -> torch.Tensor:
    """[T, N] in x's dtype, for T from 1 to MOST_ROWS; the weight is contiguous, float32 inside.
    `gates`: [T, N / 2], silu of the first half of the product times the second. Tiles of several
    splits need a `space` for the shape."""
    num_rows, num_inner = x_TK.shape
    num_columns = weight_NK.shape[0] // 2 if gates else weight_NK.shape[0]
    if x_TK.stride(1) != 1:
        x_TK = x_TK.contiguous()
    out_TN = x_TK.new_empty(num_rows, num_columns)
    if num_rows == 1:
        one_row_product(x_TK, weight_NK, bias_N, tile, out_TN, gates=gates, dependent=dependent)
        return out_TN
    # 16 is the least of a tensor core's tile.
    columns = max(16, tile.columns // 2 if gates else tile.columns)
    exact = x_TK.dtype is torch.float32
    lines = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64
    splits = tile.num_splits if space is not None else 1
    parts, arrived = (out_TN, out_TN) if space is None else (space.parts, space.arrived)
    kernel = few_rows_gated if gates else few_rows
    kernel[(-(-num_columns // columns) * splits,)](
        x_TK, weight_NK, out_TN if bias_N is None else bias_N, out_TN, parts, arrived, num_rows,
        num_columns, num_inner, x_TK.stride(0), ROWS=lines, COLUMNS=columns,
        INNER=min(tile.inner, 512), SPLITS=splits, HAS_BIAS=bias_N is not None,
        LINE=_LINE_BYTES // x_TK.element_size(), PRECISION="ieee" if exact else "tf32",
        DEPENDENT=dependent,
        num_warps=tile.num_warps,  # pyright: ignore[reportCallIssue]
        num_stages=tile.num_stages,  # pyright: ignore[reportCallIssue]
        **_launch(dependent),
    )  # fmt: skip
    return out_TN


def one_row_product(
    x_1K: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    tile: Tile,
    out_1N: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None = None,
    *,
    adds: bool = False,
    gates: bool = False,
    dependent: bool = False,
) -> None:
    """out = x @ weight.T + bias, of one contiguous row, all in one dtype. `norm` (weight [K], eps):
    of rms_norm(x) * weight. `adds`, without a norm: out += it. `gates`: weight [2N, K], out =
    silu(first) * second."""
    num_columns, columns = out_1N.shape[1], tile.columns // 2 if gates else tile.columns
    norm_K, eps = (x_1K, 0.0) if norm is None else norm
    kernel, more = one_row, {}
    if gates:
        kernel, more = one_row_gated, {"NORMS": norm is not None}
    elif adds:
        kernel = one_row_added
    elif norm is not None:
        kernel = one_row_normed
    kernel[(-(-num_columns // columns),)](
        x_1K, weight_NK, out_1N if bias_N is None else bias_N, norm_K, out_1N, num_columns,
        x_1K.shape[1], eps, COLUMNS=columns, INNER=tile.inner, HAS_BIAS=bias_N is not None,
        DEPENDENT=dependent, **more,
        num_warps=tile.num_warps,  # pyright: ignore[reportCallIssue]
        **_launch(dependent),
    )  # fmt: skip


def _launch(dependent: bool) -> dict[str, bool]:
    """Options of a launch that older compilers and the interpreter need not know."""
    return {"launch_pdl": True} if dependent else {}
