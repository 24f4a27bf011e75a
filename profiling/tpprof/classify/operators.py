"""Models of framework operators: (name, shapes of inputs) -> FLOPs and bytes.

Attention over as many queries as keys is taken as causal, as decoders are; its pairs are
sq * sk - sq * (sq - 1) / 2. Operators that only make another view of their input cost nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod

from tpinfer.config.dtypes import DType
from tpprof.classify.shapes import MOST, ShapeCost, Tensor, parse_shapes

Model = Callable[[list[Tensor]], ShapeCost]


def cost_of(name: str, shapes: str) -> ShapeCost | None:
    """Cost of the operator `name` with inputs as in `Trace.shapes` ("" where not recorded); None
    without a model of it, or for shapes that do not fit it."""
    space, _, operator = name.rpartition("::")
    model = (_MODELS if space in ("", "aten", "mkldnn", "mkl") else _ENGINES).get(operator)
    if model is None:
        return None
    if model is _view:
        return ShapeCost(0, 0, DType.FLOAT32)
    tensors = parse_shapes(shapes) if shapes else []
    if not tensors:
        return None
    try:
        found = model(tensors)
    except (IndexError, ValueError, ZeroDivisionError):
        return None
    return found if max(found.flops, found.num_bytes) <= MOST else None


def is_view(name: str) -> bool:
    """Whether an operator does nothing itself; what it calls may do much (`aten::to`)."""
    return _MODELS.get(name.removeprefix("aten::")) is _view


def _product(left: Tensor, right: Tensor, flops: int, out: int, out_bytes: int = 0) -> ShapeCost:
    """out: elements; out_bytes: of one of them, 0 for the left input's."""
    moved = left.num_bytes + right.num_bytes + out * (out_bytes or left.element_bytes)
    return ShapeCost(flops, moved, left.dtype)


def _mm(inputs: Sequence[Tensor], out_bytes: int = 0) -> ShapeCost:
    left, right = inputs[0], inputs[1]
    (rows, depth), (other, columns) = left.dims, right.dims
    if depth != other:
        raise ValueError("inner dims differ")
    return _product(left, right, 2 * rows * depth * columns, rows * columns, out_bytes)


def _scaled_mm(inputs: list[Tensor]) -> ShapeCost:
    """Eight-bit inputs; what comes out has two bytes. Scales are small."""
    return _mm(inputs, 2)


def _int_mm(inputs: list[Tensor]) -> ShapeCost:
    return _mm(inputs, 4)


def _out_scaled_mm(inputs: list[Tensor]) -> ShapeCost:
    """Engines' form: the output comes first."""
    return _mm(inputs[1:], inputs[0].element_bytes)


def _addmm(inputs: list[Tensor]) -> ShapeCost:
    found = _mm(inputs[1:])
    return ShapeCost(found.flops, found.num_bytes + inputs[0].num_bytes, found.dtype)


def _bmm(inputs: Sequence[Tensor]) -> ShapeCost:
    left, right = inputs[0], inputs[1]
    (batch, rows, depth), (batches, other, columns) = left.dims, right.dims
    if depth != other or batch != batches:
        raise ValueError("dims differ")
    return _product(left, right, 2 * batch * rows * depth * columns, batch * rows * columns)


def _baddbmm(inputs: list[Tensor]) -> ShapeCost:
    found = _bmm(inputs[1:])
    return ShapeCost(found.flops, found.num_bytes + inputs[0].num_bytes, found.dtype)


def _linear(inputs: list[Tensor]) -> ShapeCost:
    left, weight = inputs[0], inputs[1]
    columns, depth = weight.dims
    if left.dims[-1] != depth:
        raise ValueError("inner dims differ")
    rows = left.num_elements // depth
    found = _product(left, weight, 2 * rows * depth * columns, rows * columns)
    bias = inputs[2].num_bytes if len(inputs) > 2 else 0
    return ShapeCost(found.flops, found.num_bytes + bias, found.dtype)


def _matmul(inputs: list[Tensor]) -> ShapeCost:
    """numpy's rules: leading dims broadcast, and a side of one dim is a vector."""
    left, right = inputs[0], inputs[1]
    depth = left.dims[-1]
    if depth != right.dims[-2 if len(right.dims) > 1 else 0]:
        raise ValueError("inner dims differ")
    batch = prod(_broadcast([left.dims[:-2], right.dims[:-2]]))
    rows = left.dims[-2] if len(left.dims) > 1 else 1
    columns = right.dims[-1] if len(right.dims) > 1 else 1
    out = batch * rows * columns
    return _product(left, right, 2 * out * depth, out)


def _broadcast(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Dims of the result; raises ValueError where they do not fit."""
    length = max((len(dims) for dims in shapes), default=0)
    found = [1] * length
    for dims in shapes:
        for place, size in enumerate(dims, length - len(dims)):
            if size != 1 and found[place] not in (1, size):
                raise ValueError("dims do not broadcast")
            found[place] = size if found[place] == 1 else found[place]
    return tuple(found)


def _attention(inputs: Sequence[Tensor], heads_dim: int) -> ShapeCost:
    """heads_dim: 1 for [B, H, S, D], 2 for [B, S, H, D]."""
    query, key, value = inputs[:3]
    if not len(query.dims) == len(key.dims) == len(value.dims) == 4:
        raise ValueError("packed sequences tell their lengths in values, not in shapes")
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
    return _attention(inputs, 1)


def _attention_heads_last(inputs: list[Tensor]) -> ShapeCost:
    return _attention(inputs, 2)


def _embedding(inputs: list[Tensor]) -> ShapeCost:
    weight, ids = inputs[0], inputs[1]
    row = weight.dims[-1] * weight.element_bytes
    return ShapeCost(0, ids.num_bytes + 2 * ids.num_elements * row, weight.dtype)


def _index_select(inputs: list[Tensor]) -> ShapeCost:
    """Rows that the ids name are read and written."""
    source, ids = inputs[0], inputs[1]
    row = source.num_bytes // source.dims[0] if source.dims[0] else 0
    return ShapeCost(0, ids.num_bytes + 2 * ids.num_elements * row, source.dtype)


def _index(inputs: list[Tensor]) -> ShapeCost:
    """source[a, b, ...] with a tensor per leading dim."""
    source, ids = inputs[0], inputs[1:]
    if not ids or any(one.dtype is DType.BOOL for one in ids):
        raise ValueError("how much a mask chooses is told by values, not by shapes")
    chosen = prod(_broadcast([one.dims for one in ids]))
    moved = 2 * chosen * prod(source.dims[len(ids) :]) * source.element_bytes
    return ShapeCost(0, sum(8 * one.num_elements for one in ids) + moved, source.dtype)


def _gather(inputs: list[Tensor]) -> ShapeCost:
    """The ids are mostly one column, expanded, so they are not counted."""
    source, ids = inputs[0], inputs[1]
    return ShapeCost(0, 2 * ids.num_elements * source.element_bytes, source.dtype)


def _write_some(inputs: list[Tensor]) -> ShapeCost:
    """What is put into the first input: it is read from the others and written once."""
    values = inputs[-1]
    others = sum(one.num_bytes for one in inputs[1:-1] if not one.in_list)
    others += sum(8 * one.num_elements for one in inputs[1:-1] if one.in_list)
    return ShapeCost(0, others + 2 * values.num_bytes, values.dtype)


def _pointwise(per_element: int) -> Model:
    def cost(inputs: list[Tensor]) -> ShapeCost:
        out = prod(_broadcast([one.dims for one in inputs]))
        largest = max(inputs, key=lambda one: (one.num_elements, one.element_bytes))
        moved = sum(one.num_bytes for one in inputs) + out * largest.element_bytes
        return ShapeCost(per_element * out, moved, largest.dtype)

    return cost


def _normalise(inputs: list[Tensor]) -> ShapeCost:
    """The first input is read and written, weights are read."""
    first = inputs[0]
    moved = sum(one.num_bytes for one in inputs) + first.num_bytes
    return ShapeCost(5 * first.num_elements, moved, first.dtype)


def _joined(inputs: list[Tensor]) -> ShapeCost:
    """cat and stack."""
    return ShapeCost(0, 2 * sum(one.num_bytes for one in inputs), inputs[0].dtype)


def _copied(inputs: list[Tensor]) -> ShapeCost:
    """As many values written as read, in the same format."""
    return ShapeCost(0, 2 * inputs[0].num_bytes, inputs[0].dtype)


def _in_place(inputs: list[Tensor]) -> ShapeCost:
    """copy_, fill_ and the like: the first input is written, the others read."""
    return ShapeCost(0, sum(one.num_bytes for one in inputs), inputs[0].dtype)


def _reduction(inputs: list[Tensor]) -> ShapeCost:
    first = inputs[0]
    return ShapeCost(first.num_elements, first.num_bytes, first.dtype)


def _rotate(inputs: list[Tensor]) -> ShapeCost:
    """Engines' rotary embedding: positions, queries, keys; turned in place, angles are few."""
    turned = inputs[1:3]
    elements = sum(one.num_elements for one in turned)
    moved = inputs[0].num_bytes + 2 * sum(one.num_bytes for one in turned)
    return ShapeCost(3 * elements, moved, inputs[1].dtype)


def _add_norm(inputs: list[Tensor]) -> ShapeCost:
    """Engines' residual += delta and norm: both written back, weights read."""
    delta, residual = inputs[0], inputs[1]
    moved = 2 * (delta.num_bytes + residual.num_bytes)
    moved += sum(one.num_bytes for one in inputs[2:])
    return ShapeCost(5 * delta.num_elements, moved, delta.dtype)


def _gate(inputs: list[Tensor]) -> ShapeCost:
    """Engines' act(gate) * up into the first input."""
    return ShapeCost(5 * inputs[0].num_elements, sum(one.num_bytes for one in inputs[:2]),
                     inputs[0].dtype)  # fmt: skip


def _out_normalise(inputs: list[Tensor]) -> ShapeCost:
    """Engines' form: the output comes first."""
    moved = sum(one.num_bytes for one in inputs)
    return ShapeCost(5 * inputs[0].num_elements, moved, inputs[0].dtype)


def _view(inputs: list[Tensor]) -> ShapeCost:
    return ShapeCost(0, 0, inputs[0].dtype)


_PRODUCTS: dict[str, Model] = {
    "mm": _mm, "addmm": _addmm, "bmm": _bmm, "baddbmm": _baddbmm, "linear": _linear,
    "matmul": _matmul, "_scaled_mm": _scaled_mm, "_int_mm": _int_mm, "embedding": _embedding,
    "index_select": _index_select, "index": _index, "gather": _gather, "_linear_pointwise": _linear,
    "mkldnn_linear": _linear, "_mkl_linear": _linear, "mkl_linear": _linear, "cat": _joined,
    "stack": _joined, "clone": _copied, "contiguous": _copied, "_to_copy": _copied, "roll": _copied,
}  # fmt: skip
_BY_MODEL: dict[Model, str] = {
    _attention_heads_first: "scaled_dot_product_attention _scaled_dot_product_flash_attention "
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math "
    "_scaled_dot_product_fused_attention_overrideable _cudnn_attention_forward",
    _attention_heads_last: "_flash_attention_forward _flash_attn_forward "
    "_efficient_attention_forward",
    _pointwise(1): "add add_ mul mul_ sub sub_ rsub div div_ neg relu relu_ exp rsqrt sqrt pow "
    "pow_ clamp clamp_ clamp_min clamp_max masked_fill masked_fill_ where lt le gt ge eq ne cos "
    "sin abs bitwise_or bitwise_and bitwise_not logical_and logical_or logical_not __or__ __and__ "
    "__xor__ cumsum addcmul tril triu isin pad constant_pad_nd maximum minimum reciprocal "
    "remainder floor floor_divide square log",
    _pointwise(5): "silu silu_ gelu sigmoid tanh addcdiv softplus",
    _normalise: "rms_norm _fused_rms_norm layer_norm native_layer_norm softmax _softmax "
    "log_softmax _log_softmax",
    _in_place: "copy_ fill_ zero_ normal_ uniform_ random_ exponential_ ones_like zeros_like "
    "full_like",
    _write_some: "index_copy_ index_put_ _index_put_impl_ scatter_ index_add_",
    _reduction: "sum mean amax amin max min argmax argmin any all topk sort item equal nonzero "
    "_local_scalar_dense is_nonzero multinomial",
    _view: "view reshape _reshape_alias transpose transpose_ t numpy_T permute expand expand_as "
    "slice select unsqueeze unsqueeze_ squeeze narrow as_strided detach detach_ empty empty_like "
    "empty_strided new_empty resize_ resize_as_ unbind split split_with_sizes chunk unflatten "
    "flatten alias lift_fresh _unsafe_view result_type to type_as set_ resolve_conj resolve_neg "
    "view_as dropout diff movedim swapaxes numel is_pinned",
}  # fmt: skip
_MODELS: Mapping[str, Model] = _PRODUCTS | {
    name: model for model, names in _BY_MODEL.items() for name in names.split()
}
"""torch's operators, without their namespace."""
_ENGINES: Mapping[str, Model] = {
    "cutlass_scaled_mm": _out_scaled_mm, "rms_norm": _out_normalise, "rmsnorm": _out_normalise,
    "fused_add_rms_norm": _add_norm, "fused_add_rmsnorm": _add_norm, "silu_and_mul": _gate,
    "gelu_and_mul": _gate, "gelu_tanh_and_mul": _gate, "rotary_embedding": _rotate,
}  # fmt: skip
"""Operators that engines register under names of their own (`_C::silu_and_mul`)."""
