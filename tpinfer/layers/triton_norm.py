"""RMSNorm behind the addition of what the layer before produced, and the gated SiLU, as one kernel
each. Imported only where Triton is chosen.

Where they lead, the product behind them, which is launched dependent, may begin while they run: it
fetches weights until they are over. They themselves begin when all is over in front of them.

Shapes: T tokens, R logit rows, M hidden size, F columns of the MLP.
"""

# Kernels are not Python to a type checker.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

_MOST_WARPS = 16
_ACTIVATION_BLOCK = 1024


@triton.jit
def norm_rows(
    residual_ptr, delta_ptr, rows_ptr, weight_ptr, hidden_ptr, width, eps,
    ADDS: tl.constexpr, KEEPS: tl.constexpr, GATHERS: tl.constexpr, LEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """hidden[i] = rms_norm(residual[row] + delta[row]) * weight, one program a row.

    The sum is rounded to the residual's dtype as torch rounds it, and KEEPS stores it in place;
    everything behind it is float32. GATHERS takes row i from rows_ptr (int64).
    """
    if LEADS:
        gdc_launch_dependents()
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + place) if GATHERS else place
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(residual_ptr + row * width + columns, mask=inside, other=0.0)
    if ADDS:
        delta = tl.load(delta_ptr + row * width + columns, mask=inside, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
        if KEEPS:
            tl.store(residual_ptr + row * width + columns, x, mask=inside)
    wide = x.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(hidden_ptr + place * width + columns, wide * factor * weight, mask=inside)


@triton.jit
def gate_rows(gate_up_ptr, gated_ptr, width, LEADS: tl.constexpr, BLOCK: tl.constexpr):
    """gated = silu(gate) * up over [T, 2 * width], gate first; silu is rounded before the
    product."""
    if LEADS:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up_ptr + row * 2 * width + columns, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * width + width + columns, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    silu = tl.div_rn(wide, 1.0 + tl.exp(-wide)).to(gate.dtype)
    product = silu.to(tl.float32) * up.to(tl.float32)
    tl.store(gated_ptr + row * width + columns, product, mask=inside)


def add_norm(
    residual_TM: torch.Tensor,
    delta_TM: torch.Tensor | None,
    weight_M: torch.Tensor,
    eps: float,
    *,
    leads: bool = False,
) -> torch.Tensor:
    """hidden [T, M] of residual, to which delta (where there is one) is added in place. All are
    contiguous and of one float dtype. `leads`: the next kernel may be launched dependent."""
    hidden = torch.empty_like(residual_TM)
    adds = delta_TM is not None
    delta = residual_TM if delta_TM is None else delta_TM
    flags = {"ADDS": adds, "KEEPS": adds, "LEADS": leads}
    _launch(residual_TM, delta, None, weight_M, hidden, eps, flags)
    return hidden


def gather_norm(
    residual_TM: torch.Tensor,
    delta_TM: torch.Tensor | None,
    rows_R: torch.Tensor,
    weight_M: torch.Tensor,
    eps: float,
    *,
    leads: bool = False,
) -> torch.Tensor:
    """rms_norm(residual + delta) of some rows (int64 [R]), [R, M]; changes neither. Without delta
    of the residual alone. `leads` as for `add_norm`."""
    hidden = residual_TM.new_empty(rows_R.shape[0], residual_TM.shape[1])
    adds = delta_TM is not None
    delta = residual_TM if delta_TM is None else delta_TM
    flags = {"ADDS": adds, "KEEPS": False, "LEADS": leads}
    _launch(residual_TM, delta, rows_R, weight_M, hidden, eps, flags)
    return hidden


def gate(gate_up_T2F: torch.Tensor, *, leads: bool = False) -> torch.Tensor:
    """silu(gate) * up, [T, F], of a contiguous [T, 2F] with the gate's columns first. `leads` as
    for `add_norm`."""
    num_rows, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    gated = gate_up_T2F.new_empty(num_rows, width)
    if gated.numel():
        block = min(_ACTIVATION_BLOCK, triton.next_power_of_2(width))
        grid = num_rows, triton.cdiv(width, block)
        gate_rows[grid](gate_up_T2F, gated, width, LEADS=leads, BLOCK=block)
    return gated


def _launch(
    residual: torch.Tensor, delta: torch.Tensor, rows: torch.Tensor | None, weight: torch.Tensor,
    hidden: torch.Tensor, eps: float, flags: dict[str, bool],
) -> None:  # fmt: skip
    if not hidden.shape[0]:
        return
    width = residual.shape[1]
    block = triton.next_power_of_2(width)
    norm_rows[hidden.shape[0],](
        residual, delta, hidden if rows is None else rows, weight, hidden, width, eps,
        **flags, GATHERS=rows is not None, BLOCK=block,
        num_warps=max(1, min(_MOST_WARPS, block // 512)),
    )  # fmt: skip
