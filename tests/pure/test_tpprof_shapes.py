"""Costs of operators from their shapes: hand counts, loops that count one by one, and damage."""

import itertools
import json
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tpprof.classify.operators import cost_of, is_view
from tpprof.classify.shapes import ShapeCost, parse_shapes

from tpinfer.config.dtypes import DType

BF16, F32, F8, LONG = "c10::BFloat16", "float", "c10::Float8_e4m3fn", "long int"


def told(*inputs: tuple[list, str]) -> str:
    """Shapes as a trace has them, of (dims, dtype) each."""
    return json.dumps([[dims for dims, _ in inputs], [dtype for _, dtype in inputs]])


def cost(name: str, *inputs: tuple[list, str]) -> tuple[int, int] | None:
    """(FLOPs, bytes)."""
    found = cost_of(name, told(*inputs))
    return None if found is None else (found.flops, found.num_bytes)


SCALAR = ([], "Scalar")
HAND = {
    "mm": ("aten::mm", [([3, 5], F32), ([5, 7], F32)], 210, 4 * (15 + 35 + 21)),
    "addmm": (
        "aten::addmm",
        [([7], BF16), ([3, 5], BF16), ([5, 7], BF16), SCALAR, SCALAR],
        210,
        2 * (7 + 15 + 35 + 21),
    ),
    "bmm": ("aten::bmm", [([2, 3, 5], F32), ([2, 5, 7], F32)], 420, 4 * 2 * (15 + 35 + 21)),
    "baddbmm": (
        "aten::baddbmm",
        [([2, 3, 7], F32), ([2, 3, 5], F32), ([2, 5, 7], F32), SCALAR, SCALAR],
        420,
        4 * 2 * (21 + 15 + 35 + 21),
    ),
    "linear": (
        "aten::linear",
        [([2, 3, 5], BF16), ([7, 5], BF16), ([7], BF16)],
        420,
        2 * (30 + 35 + 7 + 42),
    ),
    "linear without bias": (
        "aten::linear", [([3, 5], BF16), ([7, 5], BF16), ([], "")], 210, 2 * (15 + 35 + 21)
    ),
    "vector times matrix": ("aten::matmul", [([5], F32), ([5, 7], F32)], 70, 4 * (5 + 35 + 7)),
    "matrix times vector": ("aten::matmul", [([3, 5], F32), ([5], F32)], 30, 4 * (15 + 5 + 3)),
    "matmul that broadcasts": (
        "aten::matmul", [([2, 1, 3, 5], F32), ([4, 5, 7], F32)], 8 * 210, 4 * (30 + 140 + 168)
    ),
    "eight-bit product": (
        "aten::_scaled_mm",
        [([3, 16], F8), ([16, 7], F8), ([], F32), ([], F32)],
        2 * 3 * 16 * 7,
        48 + 112 + 2 * 21,
    ),
    "int8 product": (
        "aten::_int_mm", [([3, 16], "signed char"), ([16, 7], "signed char")],
        2 * 3 * 16 * 7, 48 + 112 + 4 * 21,
    ),
    "vLLM's eight-bit product": (
        "_C::cutlass_scaled_mm",
        [([3, 7], BF16), ([3, 16], F8), ([16, 7], F8), ([1], F32), ([1], F32)],
        2 * 3 * 16 * 7,
        48 + 112 + 2 * 21,
    ),
    "decode attention": (
        "aten::_scaled_dot_product_flash_attention",
        [([2, 8, 1, 16], BF16), ([2, 2, 100, 16], BF16), ([2, 2, 100, 16], BF16)],
        2 * 2 * 8 * 100 * 32,
        2 * (256 + 6400 + 6400 + 256),
    ),
    "prefill attention, causal": (
        "aten::_flash_attention_forward",
        [([1, 4, 8, 16], BF16), ([1, 4, 2, 16], BF16), ([1, 4, 2, 16], BF16)],
        2 * 8 * 10 * 32,
        2 * (512 + 128 + 128 + 512),
    ),
    "embedding": (
        "aten::embedding", [([1000, 8], BF16), ([2, 3], LONG)], 0, 8 * 6 + 2 * 6 * 8 * 2
    ),
    "index_select": (
        "aten::index_select", [([1000, 8], F32), SCALAR, ([3], LONG)], 0, 8 * 3 + 2 * 3 * 8 * 4
    ),
    "index by rows": ("aten::index", [([1000, 8], F32), ([[3]], "TensorList")], 0, 24 + 192),
    "gather": ("aten::gather", [([4, 100], F32), SCALAR, ([4, 1], LONG)], 0, 2 * 4 * 4),
    "cache write": (
        "aten::index_copy_",
        [([1, 2, 100000, 8], BF16), SCALAR, ([3], LONG), ([1, 2, 3, 8], BF16)],
        0,
        24 + 2 * 48 * 2,
    ),
    "cache write by index_put_": (
        "aten::index_put_",
        [([100000, 8], BF16), ([[3]], "TensorList"), ([3, 8], BF16), SCALAR],
        0,
        24 + 2 * 24 * 2,
    ),
    "add that broadcasts": (
        "aten::add", [([3, 1], F32), ([1, 5], F32), SCALAR], 15, 4 * (3 + 5 + 15)
    ),
    "compare with a number": ("aten::lt", [([10], LONG), SCALAR], 10, 160),
    "cat": ("aten::cat", [([[2, 3], [4, 3]], "TensorList"), SCALAR], 0, 2 * 2 * 18),
    "copy_ converts": ("aten::copy_", [([10], BF16), ([10], F32), SCALAR], 0, 20 + 40),
    "silu": ("aten::silu", [([10], BF16)], 50, 40),
    "layer_norm": (
        "aten::layer_norm", [([3, 8], F32), ([], ""), ([8], F32), ([8], F32)], 120,
        4 * (24 * 2 + 16),
    ),
    "sum": ("aten::sum", [([3, 8], F32), ([], "")], 24, 96),
    "vLLM's norm": (
        "_C::rms_norm", [([3, 8], BF16), ([3, 8], BF16), ([8], BF16)], 120, 2 * (24 + 24 + 8)
    ),
    "vLLM's add and norm": (
        "_C::fused_add_rms_norm", [([3, 8], BF16), ([3, 8], BF16), ([8], BF16)], 120, 2 * (96 + 8)
    ),
    "vLLM's gate": ("_C::silu_and_mul", [([3, 8], BF16), ([3, 16], BF16)], 120, 2 * (24 + 48)),
    "vLLM's rotation": (
        "_C::rotary_embedding",
        [([3], LONG), ([3, 16], BF16), ([3, 4], BF16), SCALAR, ([40960, 8], BF16)],
        3 * 60,
        24 + 2 * 2 * 60,
    ),
    "view": ("aten::view", [([3, 8], F32)], 0, 0),
}  # fmt: skip


@pytest.mark.parametrize("case", HAND)
def test_hand_counts(case: str) -> None:
    name, inputs, flops, moved = HAND[case]
    assert cost(name, *inputs) == (flops, moved)


@given(st.lists(st.integers(1, 5), max_size=2), *[st.integers(1, 5)] * 3, st.booleans())
def test_products_counted_one_by_one(
    batch: list[int], rows: int, depth: int, columns: int, is_shared: bool
) -> None:
    """Every multiply-add of the plain loops, every element once."""
    left, right = [*batch, rows, depth], [*([] if is_shared else batch), depth, columns]
    flops = out = 0
    for _ in itertools.product(*map(range, [*batch, rows, columns])):
        out += 1
        for _ in range(depth):
            flops += 2
    expected = flops, 4 * (prod(left) + prod(right) + out)
    assert cost("aten::matmul", (left, F32), (right, F32)) == expected
    if is_shared:
        assert cost("aten::linear", (left, F32), ([columns, depth], F32)) == expected
    if len(batch) == 1 and not is_shared:
        assert cost("aten::bmm", (left, F32), (right, F32)) == expected


@given(*[st.integers(1, 5)] * 5, st.booleans())
def test_attention_counted_one_by_one(
    batch: int, heads: int, num_keys: int, width: int, value_width: int, is_prefill: bool
) -> None:
    num_queries = num_keys if is_prefill else 1
    flops = 0
    for _, _, query in itertools.product(range(batch), range(heads), range(num_queries)):
        seen = [key for key in range(num_keys) if key <= query or not is_prefill]
        flops += sum(2 * width + 2 * value_width for _ in seen)
    shapes = [
        ([batch, heads, num_queries, width], F32),
        ([batch, heads, num_keys, width], F32),
        ([batch, heads, num_keys, value_width], F32),
    ]
    moved = sum(prod(dims) for dims, _ in shapes) + batch * heads * num_queries * value_width
    assert cost("aten::scaled_dot_product_attention", *shapes) == (flops, 4 * moved)
    last = [([dims[0], dims[2], dims[1], dims[3]], dtype) for dims, dtype in shapes]
    assert cost("aten::_flash_attention_forward", *last) == (flops, 4 * moved)


def test_what_is_judged_by_which_rate() -> None:
    for dtype, expected in [(F8, DType.FLOAT8_E4M3), ("c10::Half", DType.FLOAT16),
                            ("double", DType.FLOAT32), ("signed char", DType.INT8)]:  # fmt: skip
        found = cost_of("aten::mm", told(([2, 2], dtype), ([2, 2], dtype)))
        assert found is not None and found.dtype is expected


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("aten::mm", [([3, 5], F32), ([6, 7], F32)]),
        ("aten::mm", [([3, 5], F32)]),
        ("aten::mm", [([3], F32), ([5, 7], F32)]),
        ("aten::bmm", [([2, 3, 5], F32), ([3, 5, 7], F32)]),
        ("aten::linear", [([3, 5], F32), ([7, 6], F32)]),
        ("aten::linear", [([0, 0], F32), ([7, 0], F32)]),
        ("aten::matmul", [([2, 3, 5], F32), ([3, 5, 7], F32)]),
        ("aten::add", [([3], F32), ([4], F32)]),
        ("aten::mm", [([1 << 40, 1 << 40], F32), ([1 << 40, 1 << 40], F32)]),
        ("aten::_flash_attention_forward", [([9, 8, 16], BF16)] * 3),
        ("aten::index", [([8, 8], F32), ([8, 8], "bool")]),
        ("aten::never_heard_of", [([3], F32)]),
        ("_C::linear", [([3, 5], F32), ([7, 5], F32)]),
        ("aten::mm", [([3, 5], "MysteryType"), ([5, 7], "MysteryType")]),
    ],
)
def test_shapes_that_do_not_fit_have_no_cost(name: str, inputs: list) -> None:
    assert cost(name, *inputs) is None


def test_views_are_free_without_shapes_and_others_unknown() -> None:
    assert cost_of("aten::view", "") == ShapeCost(0, 0, DType.FLOAT32)
    assert cost_of("aten::mm", "") is None
    assert is_view("aten::to") and not is_view("aten::mm") and not is_view("made::view")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=6),
    lambda one: st.lists(one, max_size=4) | st.dictionaries(st.text(max_size=3), one, max_size=2),
    max_leaves=12,
)
_NAMES = st.sampled_from(sorted({case[0] for case in HAND.values()}))
_DIMS = st.lists(st.integers(-1, 9) | st.just(1 << 50), max_size=4)
_INPUT = st.tuples(_DIMS | st.lists(_DIMS, max_size=3), st.sampled_from([F32, F8, LONG, "Scalar"]))


@given(_NAMES, _JSON | st.lists(_JSON, min_size=2, max_size=2))
def test_damage_never_raises(name: str, content: object) -> None:
    found = cost_of(name, json.dumps(content))
    assert found is None or (found.flops >= 0 and found.num_bytes >= 0)


@given(_NAMES, st.lists(_INPUT, max_size=5))
def test_odd_shapes_never_raise(name: str, inputs: list) -> None:
    found = cost_of(name, told(*inputs))
    assert found is None or min(found.flops, found.num_bytes) >= 0
    assert found is None or max(found.flops, found.num_bytes) <= 1 << 62


@pytest.mark.parametrize(
    "text", ["", "[", "[[1]", "[" * 100_000, "[[[1]],[]]", "\ud800", "[1,2,3]"]
)
def test_damaged_text_holds_no_tensors(text: str) -> None:
    assert parse_shapes(text) == []
    assert cost_of("aten::mm", text) is None
