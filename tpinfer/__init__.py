"""Tensor-parallel LLM inference that knows where every microsecond goes."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tpinfer.config.sampling import SamplingParams
    from tpinfer.engine.async_engine import AsyncEngine
    from tpinfer.engine.llm import LLM

__all__ = ["LLM", "AsyncEngine", "SamplingParams"]

_PLACES = {
    "LLM": "tpinfer.engine.llm",
    "AsyncEngine": "tpinfer.engine.async_engine",
    "SamplingParams": "tpinfer.config.sampling",
}


def __getattr__(name: str) -> object:
    """The public names, imported when first asked for: the planner and profiler need no torch."""
    if name not in _PLACES:
        raise AttributeError(f"module 'tpinfer' has no attribute {name!r}")
    from importlib import import_module

    from tpinfer.config.environment import calm_thread_pools

    calm_thread_pools()  # before torch is imported
    return getattr(import_module(_PLACES[name]), name)
