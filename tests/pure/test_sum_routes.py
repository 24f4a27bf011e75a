"""Which way a sum of each size takes between GPUs of one host."""

import pytest

from tpinfer.collectives.sum_routes import (
    LARGE_BYTES,
    SumFacts,
    describe_routes,
    one_shot_bytes,
    route_of,
    sum_routes,
)
from tpinfer.config.dtypes import DType

FACTS = SumFacts(size=2, rest="nccl", has_multicast=True)


@pytest.mark.parametrize(
    ("size", "has_multicast", "dtype", "names"),
    [
        (2, True, DType.BFLOAT16, ["one_shot", "two_shot", "rest"]),
        (4, True, DType.FLOAT32, ["one_shot", "multimem", "rest"]),
        (4, False, DType.FLOAT32, ["one_shot", "two_shot", "rest"]),
        (8, True, DType.FLOAT16, ["one_shot", "rest"]),
    ],
)
def test_routes(size: int, has_multicast: bool, dtype: DType, names: list[str]) -> None:
    routes = sum_routes(SumFacts(size, "nccl", has_multicast), dtype)
    assert [route.name for route in routes] == names
    assert all(route.reason and route.words for route in routes)


def test_sizes_at_the_limits() -> None:
    routes = sum_routes(FACTS, DType.BFLOAT16)
    limit = one_shot_bytes(2)
    sizes = (1, limit, limit + 1, LARGE_BYTES, LARGE_BYTES + 1)
    found = [route_of(routes, size).name for size in sizes]
    assert found == ["one_shot", "one_shot", "two_shot", "two_shot", "rest"]
    assert [one_shot_bytes(size) >> 10 for size in (2, 3, 4, 5, 8)] == [1024, 512, 512, 256, 256]


def test_every_fallback_has_its_reason() -> None:
    words, why = describe_routes(sum_routes(FACTS, DType.BFLOAT16))
    assert words.startswith("own one-shot to ") and words.endswith(", nccl")
    routes = sum_routes(SumFacts(4, "nccl", False, "ptxas is missing"), DType.FLOAT16)
    words, why = describe_routes(routes)
    assert words == "nccl"
    assert "ptxas is missing" in why and "no float16" in why
    _, why = describe_routes(sum_routes(SumFacts(4, "nccl", False), DType.FLOAT32))
    assert "no multicast" in why
