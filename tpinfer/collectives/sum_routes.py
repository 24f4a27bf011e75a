"""Which way a sum of each size takes between GPUs of one host. Pure: the same facts give the same
routes on every rank.

The limits are those that vLLM's custom all-reduce and its symmetric-memory path use on H100s (one
stage for 2 ranks, below 512 KiB up to 4 and below 256 KiB up to 8; two_shot for 2 ranks, multimem
for 4 and more). They were not measured here: `profiling/gpu/collectives.py` measures.
"""

from dataclasses import dataclass
from typing import Literal

from tpinfer.config.dtypes import DType
from tpinfer.config.units import format_size

RouteName = Literal["one_shot", "two_shot", "multimem", "rest"]
LARGE_BYTES = 32 << 20
"""Largest sum over symmetric memory; beyond it, copies in and out cost more than they save."""
_MULTIMEM_FROM = 4


@dataclass(frozen=True, slots=True)
class SumFacts:
    """What the routes depend on, the same on every rank."""

    size: int
    rest: str
    """What carries everything else, for people."""
    has_multicast: bool
    not_own: str = ""
    """Why the own kernel is not used; empty where it is."""


@dataclass(frozen=True, slots=True)
class Route:
    """One way, and the sizes that take it."""

    name: RouteName
    up_to_bytes: int | None
    """Largest sum, in bytes of one rank's part; None: any."""
    words: str
    reason: str


def one_shot_bytes(size: int) -> int:
    """Largest part of a sum in one stage, in which each rank reads all others' parts whole."""
    return 1 << 20 if size == 2 else (512 << 10) if size <= 4 else 256 << 10


def sum_routes(facts: SumFacts, dtype: DType) -> tuple[Route, ...]:
    """By rising size; the last one takes any."""
    found: list[Route] = []
    why_rest = ""
    if facts.not_own:
        why_rest = f"; no own one-shot: {facts.not_own}"
    else:
        limit = one_shot_bytes(facts.size)
        reason = f"{facts.size} ranks read each other's parts at once"
        found.append(Route("one_shot", limit, "own one-shot", reason))
    if dtype is DType.FLOAT16:
        why_rest += "; torch's sums over symmetric memory take no float16"
    elif facts.size >= _MULTIMEM_FROM and facts.has_multicast:
        reason = "the switch adds"
        found.append(Route("multimem", LARGE_BYTES, "torch's multimem", reason))
    else:
        reason = "two ranks need no switch" if facts.size == 2 else "each rank adds its share"
        if facts.size >= _MULTIMEM_FROM:
            reason += ", for there is no multicast here"
        found.append(Route("two_shot", LARGE_BYTES, "torch's two_shot", reason))
    reason = "larger ones, and all but sums" + why_rest
    found.append(Route("rest", None, facts.rest, reason))
    return tuple(found)


def route_of(routes: tuple[Route, ...], num_bytes: int) -> Route:
    """The route of a part of `num_bytes`."""
    for route in routes:
        if route.up_to_bytes is None or num_bytes <= route.up_to_bytes:
            return route
    raise AssertionError("the last route takes any size")


def describe_routes(routes: tuple[Route, ...]) -> tuple[str, str]:
    """(what is used, why), for people."""
    used = [
        route.words
        if route.up_to_bytes is None
        else f"{route.words} to {format_size(route.up_to_bytes)}"
        for route in routes
    ]
    return ", ".join(used), "; ".join(f"{route.words}: {route.reason}" for route in routes)
