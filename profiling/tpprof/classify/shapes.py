"""What a framework operator costs, from the shapes of its inputs.

FLOPs count a multiply-add as two. Bytes are each input read once and the output written once, with
nothing kept in a cache between them. Attention over as many queries as keys is taken as causal, as
decoders are; its pairs are sq * sk - sq * (sq - 1) / 2.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from tpinfer.config.dtypes import DType

_DTYPES = {
    "float": (DType.FLOAT32, 4), "double": (DType.FLOAT32, 8), "c10::half": (DType.FLOAT16, 2),
    "half": (DType.FLOAT16, 2), "c10::bfloat16": (DType.BFLOAT16, 2), "int": (DType.INT32, 4),
    "bfloat16": (DType.BFLOAT16, 2), "c10::float8_e4m3fn": (DType.FLOAT8_E4M3, 1),
    "c10::float8_e4m3fnuz": (DType.FLOAT8_E4M3, 1), "c10::float8_e5m2": (DType.FLOAT8_E4M3, 1),
    "long int": (DType.INT64, 8), "long": (DType.INT64, 8), "int64": (DType.INT64, 8),
    "signed char": (DType.INT8, 1), "char": (DType.INT8, 1), "unsigned char": (DType.UINT8, 1),
    "bool": (DType.BOOL, 1), "float32": (DType.FLOAT32, 4), "float16": (DType.FLOAT16, 2),
    "int32": (DType.INT32, 4), "float8_e4m3fn": (DType.FLOAT8_E4M3, 1), "int8": (DType.INT8, 1),
}  # fmt: skip
"""Names recorders use -> (dtype to judge by, bytes of an element)."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input."""

    dims: tuple[int, ...]
    dtype: DType
    element_bytes: int

    @property
    def num_elements(self) -> int:
        return prod(self.dims)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.element_bytes


@dataclass(frozen=True, slots=True)
class ShapeCost:
    """What one call does."""

    flops: int
    num_bytes: int
    dtype: DType


def cost_of(name: str, shapes: str) -> ShapeCost | None:
    """Cost of the operator `name` with inputs as in `Trace.shapes`; None without a model of it, or
    for shapes that do not fit it."""
    operator = name.rpartition("::")[2]
    model = _MODELS.get(operator)
    if model is None:
        return None
    tensors = parse_shapes(shapes)
    if not tensors:
        return ShapeCost(0, 0, DType.FLOAT32) if model is _view else None
    try:
        return model(tensors)
    except (IndexError, ValueError):
        return None


def parse_shapes(shapes: str) -> list[Tensor]:
    """Tensors among the inputs, in order; lists of tensors are laid flat. Empty for damage."""
    try:
        dims, types = json.loads(shapes)
        pairs = list(zip(dims, types, strict=True))
    except (ValueError, TypeError):
        return []
    found = []
    for sizes, named in pairs:
        dtype = _DTYPES.get(str(named).lower())
        many = isinstance(sizes, list) and sizes and all(isinstance(one, list) for one in sizes)
        for one in sizes if many else [sizes]:
            if _is_dims(one) and (dtype is not None or many):
                kind, size = dtype or (DType.FLOAT32, 4)
                found.append(Tensor(tuple(one), kind, size))
    return found


def _is_dims(sizes: object) -> bool:
    if not isinstance(sizes, list) or not sizes:
        return False
    return all(type(size) is int and size >= 0 for size in sizes)


def _product(left: Tensor, right: Tensor, flops: int, out_elements: int) -> ShapeCost:
    moved = left.num_bytes + right.num_bytes + out_elements * left.element_bytes
    return ShapeCost(flops, moved, left.dtype)


def _mm(inputs: list[Tensor]) -> ShapeCost:
    left, right = inputs[0], inputs[1]
    (rows, depth), (other, columns) = left.dims, right.dims
    if depth != other:
        raise ValueError("inner dims differ")
    return _product(left, right, 2 * rows * depth * columns, rows * columns)


def _addmm(inputs: list[Tensor]) -> ShapeCost:
    found = _mm(inputs[1:])
    return ShapeCost(found.flops, found.num_bytes + inputs[0].num_bytes, found.dtype)


def _bmm(inputs: list[Tensor]) -> ShapeCost:
    left, right = inputs[0], inputs[1]
    (batch, rows, depth), (_, other, columns) = left.dims, right.dims
    if depth != other:
        raise ValueError("inner dims differ")
    return _product(left, right, 2 * batch * rows * depth * columns, batch * rows * columns)


def _linear(inputs: list[Tensor]) -> ShapeCost:
    left, weight = inputs[0], inputs[1]
    columns, depth = weight.dims
    if left.dims[-1] != depth:
        raise ValueError("inner dims differ")
    rows = left.num_elements // depth if depth else 0
    found = _product(left, weight, 2 * rows * depth * columns, rows * columns)
    bias = inputs[2].num_bytes if len(inputs) > 2 else 0
    return ShapeCost(found.flops, found.num_bytes + bias, found.dtype)


def _matmul(inputs: list[Tensor]) -> ShapeCost:
    left, right = inputs[0], inputs[1]
    depth = left.dims[-1]
    if len(right.dims) == 1:
        out = left.num_elements // depth if depth else 0
    elif len(left.dims) == 1:
        out = right.num_elements // depth if depth else 0
    elif len(right.dims) == 2:
        out = (left.num_elements // depth if depth else 0) * right.dims[-1]
    else:
        heads = max(prod(left.dims[:-2]), prod(right.dims[:-2]))
        out = heads * left.dims[-2] * right.dims[-1]
    return _product(left, right, 2 * out * depth, out)


def _attention(query: Tensor, key: Tensor, value: Tensor, heads_dim: int) -> ShapeCost:
    """heads_dim: 1 for [B, H, S, D], 2 for [B, S, H, D]."""
    place = 3 - heads_dim
    batch, heads, width = query.dims[0], query.dims[heads_dim], query.dims[-1]
    num_queries, num_keys = query.dims[place], key.dims[place]
    pairs = num_queries * num_keys
    if num_queries == num_keys:
        pairs -= num_queries * (num_queries - 1) // 2
    flops = 2 * batch * heads * pairs * (width + value.dims[-1])
    out = batch * heads * num_queries * value.dims[-1] * query.element_bytes
    moved = query.num_bytes + key.num_bytes + value.num_bytes + out
    return ShapeCost(flops, moved, query.dtype)


def _attention_heads_first(inputs: list[Tensor]) -> ShapeCost:
    return _attention(inputs[0], inputs[1], inputs[2], 1)


def _attention_heads_last(inputs: list[Tensor]) -> ShapeCost:
    if len(inputs[0].dims) != 4:
        raise ValueError("packed sequences tell their lengths in values, not in shapes")
    return _attention(inputs[0], inputs[1], inputs[2], 2)


def _embedding(inputs: list[Tensor]) -> ShapeCost:
    weight, ids = inputs[0], inputs[1]
    row = weight.dims[-1] * weight.element_bytes
    return ShapeCost(0, ids.num_bytes + 2 * ids.num_elements * row, weight.dtype)


def _index_select(inputs: list[Tensor]) -> ShapeCost:
    source, ids = inputs[0], inputs[1]
    row = source.num_bytes // source.dims[0] if source.dims[0] else 0
    return ShapeCost(0, ids.num_bytes + 2 * ids.num_elements * row, source.dtype)


def _pointwise(per_element: int) -> Callable[[list[Tensor]], ShapeCost]:
    def cost(inputs: list[Tensor]) -> ShapeCost:
        largest = max(inputs, key=lambda one: one.num_elements)
        moved = sum(one.num_bytes for one in inputs) + largest.num_bytes
        return ShapeCost(per_element * largest.num_elements, moved, largest.dtype)

    return cost


def _in_place(inputs: list[Tensor]) -> ShapeCost:
    """copy_, fill_ and the like: the first input is written, the others read."""
    moved = sum(one.num_bytes for one in inputs)
    return ShapeCost(0, moved, inputs[0].dtype)


def _reduction(inputs: list[Tensor]) -> ShapeCost:
    first = inputs[0]
    return ShapeCost(first.num_elements, first.num_bytes, first.dtype)


def _view(inputs: list[Tensor]) -> ShapeCost:
    return ShapeCost(0, 0, inputs[0].dtype)


def _models() -> Mapping[str, Callable[[list[Tensor]], ShapeCost]]:
    found: dict[str, Callable[[list[Tensor]], ShapeCost]] = {
        "mm": _mm, "addmm": _addmm, "bmm": _bmm, "linear": _linear, "matmul": _matmul,
        "_scaled_mm": _mm, "_int_mm": _mm, "embedding": _embedding, "index_select": _index_select,
        "mkldnn_linear": _linear, "_linear_pointwise": _linear, "mkl_linear": _linear,
    }  # fmt: skip
    found["baddbmm"] = lambda inputs: _bmm(inputs[1:])
    for name in (
        "scaled_dot_product_attention", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math",
        "_scaled_dot_product_fused_attention_overrideable",
    ):  # fmt: skip
        found[name] = _attention_heads_first
    for name in ("_flash_attention_forward", "_flash_attn_forward", "_efficient_attention_forward"):
        found[name] = _attention_heads_last
    for name in ("add", "add_", "mul", "mul_", "sub", "sub_", "div", "div_", "neg", "relu", "exp",
                 "rsqrt", "sqrt", "pow", "clamp", "clamp_", "masked_fill", "masked_fill_", "where",
                 "lt", "le", "gt", "ge", "eq", "ne", "bitwise_or", "bitwise_and", "logical_and",
                 "roll", "cat", "clone", "contiguous", "_to_copy", "cumsum", "cos", "sin", "index",
                 "gather", "scatter_", "index_put_", "_index_put_impl_", "addcmul", "tril", "triu",
                 "__or__", "__and__", "bitwise_not", "logical_or", "isin", "pad",
                 "constant_pad_nd"):  # fmt: skip
        found[name] = _pointwise(1)
    for name in ("silu", "silu_", "gelu", "sigmoid", "tanh", "rms_norm", "_fused_rms_norm",
                 "layer_norm", "native_layer_norm", "softmax", "_softmax", "log_softmax",
                 "_log_softmax", "addcdiv"):  # fmt: skip
        found[name] = _pointwise(5)
    for name in ("copy_", "fill_", "zero_", "index_copy_", "ones_like", "zeros_like", "zeros",
                 "ones", "normal_", "uniform_", "random_", "arange", "full"):  # fmt: skip
        found[name] = _in_place
    for name in ("sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "any", "all",
                 "topk", "sort", "item", "_local_scalar_dense", "equal", "is_nonzero"):  # fmt: skip
        found[name] = _reduction
    for name in ("view", "reshape", "_reshape_alias", "transpose", "t", "permute", "expand",
                 "slice", "select", "unsqueeze", "squeeze", "narrow", "as_strided", "detach",
                 "detach_", "empty", "empty_strided", "empty_like", "resize_", "unbind", "split",
                 "split_with_sizes", "chunk", "unflatten", "flatten", "alias", "lift_fresh",
                 "_unsafe_view", "result_type", "to", "set_", "numpy_T", "resolve_conj",
                 "resolve_neg", "view_as", "expand_as", "new_empty", "dropout"):  # fmt: skip
        found[name] = _view
    return found


_MODELS = _models()
