"""Products with a rank's weights, each bound once to its weight in the layout that is fastest here.

Shapes: T rows of input, N columns of output, K of input.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

MatMul = Callable[[torch.Tensor], torch.Tensor]
"""[T, K] -> [T, N]: x @ weight.T (+ bias)."""
BindMatMul = Callable[[torch.Tensor, torch.Tensor | None], MatMul]
"""(weight [N, K], bias [N] or None) -> the product with it."""
_LINEARS = (".qkv", ".out", ".gate_up", ".down")


def plain_matmul(weight: torch.Tensor, bias: torch.Tensor | None) -> MatMul:
    """torch's own, over the weight as it lies."""

    def matmul(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight, bias)

    return matmul


def packed_matmul(weight: torch.Tensor, bias: torch.Tensor | None) -> MatMul:
    """oneDNN's over a copy of the weight in blocks, made once: without it every call makes one, and
    a single row is multiplied by one thread alone. The results are the same bits."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    call = torch.ops.mkldnn._linear_pointwise.default

    def matmul(x: torch.Tensor) -> torch.Tensor:
        return call(x, packed, bias, "none", [], "")

    return matmul


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch and processor multiply `dtype` from packed weights. The names are torch's
    own for its compiler, so they are tried rather than trusted."""
    if device.type != "cpu" or dtype is not torch.bfloat16:
        return False
    try:
        if (
            not torch.backends.mkldnn.is_available()
            or not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        ):
            return False
        weight = torch.ones(16, 16, dtype=dtype)
        found = packed_matmul(weight, None)(torch.ones(1, 16, dtype=dtype))
        return torch.equal(found, torch.full((1, 16), 16, dtype=dtype))
    except (AttributeError, RuntimeError):
        return False


def bind_matmuls(parameters: dict[str, torch.Tensor], bind: BindMatMul) -> dict[str, MatMul]:
    """The linears by the names of their ops, and `head`.

    Takes their weights out of `parameters`, so that one which was copied is not kept twice; only an
    embedding that is the head too stays.
    """
    names = [name.removesuffix(".weight") for name in parameters if name.endswith(".weight")]
    found: dict[str, MatMul] = {}
    for name in names:
        if name.endswith(_LINEARS):
            bias = parameters.pop(f"{name}.bias", None)
            # Empty where another rank owns the bias of a partial sum.
            owned = bias if bias is not None and bias.numel() else None
            found[name] = bind(parameters.pop(f"{name}.weight"), owned)
    tied = parameters["embed.weight"]
    found["head"] = bind(parameters.pop("head.weight", tied), None)
    return found
