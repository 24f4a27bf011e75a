"""The ops around a bound attention backend: over a rank's own keys, or merged with those of the
ranks that share its KV head.

Shapes: T tokens, H local query heads, W most query heads of any of the g ranks that share a KV
head, D head dim.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tpinfer.attention.interface import AttentionCall, PartialAttentionCall
from tpinfer.attention.paged_kv import LayerKV
from tpinfer.layers.step_inputs import Activations, OpCall, StepInputs

Exchange = Callable[[torch.Tensor, torch.Tensor], None]
"""(out, t): all-gather or all-to-all of the ranks that share a KV head."""


def bind_core(attend: AttentionCall, cache: LayerKV, num_heads: int) -> OpCall:
    """mixed = attention of the local query heads over the paged cache, [T, H * D]."""
    head_dim = cache.head_dim
    width = num_heads * head_dim

    def core(acts: Activations, step: StepInputs) -> None:
        query = acts.qkv[:, :width].unflatten(1, (num_heads, head_dim))
        acts.mixed = attend(query, cache, step.spans).reshape(-1, width)

    return core


def bind_query_gather(
    all_gather: Exchange, group_size: int, num_heads: int, widest: int, head_dim: int
) -> OpCall:
    """queries = every rank's rotated queries, [g, T, W * D]; padded with zeros to W heads each."""
    width, padding = num_heads * head_dim, (widest - num_heads) * head_dim

    def gather(acts: Activations, step: StepInputs) -> None:
        mine = acts.qkv[:, :width]
        mine = F.pad(mine, (0, padding)) if padding else mine.contiguous()
        acts.queries = torch.empty(group_size, *mine.shape, dtype=mine.dtype, device=mine.device)
        all_gather(acts.queries, mine)

    return gather


def bind_partial_core(attend: PartialAttentionCall, cache: LayerKV, widest: int) -> OpCall:
    """partial = attention of all gathered query heads over the keys this rank holds, float32
    [g, T, W, D + 1]: first dim by whose heads they are, last column the log-sum-exp."""
    head_dim = cache.head_dim

    def core(acts: Activations, step: StepInputs) -> None:
        num_ranks, num_tokens = acts.queries.shape[:2]
        query_gTWD = acts.queries.view(num_ranks, num_tokens, widest, head_dim)
        query_THD = query_gTWD.transpose(0, 1).reshape(num_tokens, -1, head_dim)
        out_THD, lse_TH = attend(query_THD, cache, step.spans)
        shape = num_ranks, num_tokens, widest, head_dim + 1
        acts.partial = torch.empty(shape, dtype=torch.float32, device=out_THD.device)
        heads = num_tokens, num_ranks, widest
        acts.partial[..., :head_dim] = out_THD.view(*heads, head_dim).transpose(0, 1)
        acts.partial[..., head_dim] = lse_TH.view(heads).transpose(0, 1)

    return core


def bind_merge(all_to_all: Exchange, num_heads: int) -> OpCall:
    """mixed = the local query heads' attention over all keys, [T, H * D]: each rank sends every
    other one the part that belongs to its heads, and weighs what it receives by exp(log-sum-exp).
    """

    def merge(acts: Activations, step: StepInputs) -> None:
        parts = torch.empty_like(acts.partial)
        all_to_all(parts, acts.partial)
        acts.mixed = merge_parts(parts[:, :, :num_heads]).to(step.cos.dtype).flatten(1)

    return merge


def merge_parts(parts_gTHE: torch.Tensor) -> torch.Tensor:
    """[T, H, D] from partial attentions [g, T, H, D + 1] whose last column is the log-sum-exp:
    -inf where a rank holds no key that the query sees. At least one rank holds one."""
    out, lse = parts_gTHE[..., :-1], parts_gTHE[..., -1:]
    weight = (lse - lse.amax(0, keepdim=True)).exp()
    return (out * weight).sum(0) / weight.sum(0)
