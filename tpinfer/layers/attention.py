"""The op that runs a bound attention backend over a step's spans."""

import torch

from tpinfer.attention.interface import AttentionCall
from tpinfer.layers.step_inputs import Activations, OpCall, StepInputs


def bind_core(attend: AttentionCall, cache_2KSD: torch.Tensor, num_heads: int) -> OpCall:
    """mixed = attention of the local query heads over the paged cache, [T, H * D]."""
    head_dim = cache_2KSD.shape[-1]
    width = num_heads * head_dim

    def core(acts: Activations, step: StepInputs) -> None:
        query = acts.qkv[:, :width].unflatten(1, (num_heads, head_dim))
        acts.mixed = attend(query, cache_2KSD, step.spans).reshape(-1, width)

    return core
