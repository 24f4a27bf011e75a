"""Model shapes for tests that need no checkpoint."""

from dataclasses import replace

from tpinfer.config.dtypes import DType
from tpinfer.config.model import ModelSpec

TINY = ModelSpec(
    architecture="LlamaForCausalLM",
    num_layers=2,
    hidden_size=64,
    intermediate_size=112,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=331,
    max_position=256,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    dtype=DType.FLOAT32,
)
"""Eight query heads on two KV heads."""


def tiny(**changes: object) -> ModelSpec:
    """TINY with some fields changed."""
    return replace(TINY, **changes)  # pyright: ignore[reportArgumentType]
