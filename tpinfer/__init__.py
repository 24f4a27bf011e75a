"""Tensor-parallel LLM inference that knows where every microsecond goes."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tpinfer.config.errors import CheckpointError, ConfigError, RankError, TpinferError
    from tpinfer.config.sampling import SamplingParams
    from tpinfer.engine.async_engine import AsyncEngine
    from tpinfer.engine.llm import LLM
    from tpinfer.engine.requests import Completion, GenerationResult, TokenEvent

__all__ = [
    "LLM",
    "AsyncEngine",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "GenerationResult",
    "RankError",
    "SamplingParams",
    "TokenEvent",
    "TpinferError",
]

_PLACES = {
    "LLM": "tpinfer.engine.llm",
    "AsyncEngine": "tpinfer.engine.async_engine",
    "CheckpointError": "tpinfer.config.errors",
    "Completion": "tpinfer.engine.requests",
    "ConfigError": "tpinfer.config.errors",
    "GenerationResult": "tpinfer.engine.requests",
    "RankError": "tpinfer.config.errors",
    "SamplingParams": "tpinfer.config.sampling",
    "TokenEvent": "tpinfer.engine.requests",
    "TpinferError": "tpinfer.config.errors",
}


def __getattr__(name: str) -> object:
    """The public names, imported when first asked for: the planner and profiler need no torch."""
    if name not in _PLACES:
        raise AttributeError(f"module 'tpinfer' has no attribute {name!r}")
    from importlib import import_module

    from tpinfer.config.environment import calm_thread_pools

    calm_thread_pools()  # before torch is imported
    return getattr(import_module(_PLACES[name]), name)
