"""Fakes of the libraries that compute prompts on GPUs, in plain torch on a CPU: what they take,
refuse and return is as their sources have it, not how they compute it.

`FakeFlashInfer` stands for the module flashinfer (0.6: flashinfer/prefill.py), `FakeVarlen` for
torch.nn.attention.varlen (2.13).

Shapes: P query tokens, H query heads, K KV heads, D head dim.
"""

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

HALVES = (torch.float16, torch.bfloat16)


def attend(
    query_TKGD: torch.Tensor, keys_NKD: torch.Tensor, values_NKD: torch.Tensor,
    left: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(float32 out [T, K, G, D], natural log-sum-exp [T, K, G]) of one sequence's last T tokens,
    each of which sees `left` keys before its own; -1 is all of them."""
    num_tokens, num_keys = len(query_TKGD), len(keys_NKD)
    scores = torch.einsum("tkgd,nkd->tkgn", query_TKGD.float(), keys_NKD.float()) * scale
    ahead = torch.arange(num_tokens)[:, None] + num_keys - num_tokens - torch.arange(num_keys)
    hidden = ahead < 0
    if left >= 0:
        hidden |= ahead > left
    scores.masked_fill_(hidden[:, None, None], float("-inf"))
    out = torch.einsum("tkgn,nkd->tkgd", scores.softmax(-1), values_NKD.float())
    return out, scores.logsumexp(-1)


def column(tensor: torch.Tensor, length: int) -> list[int]:
    assert tensor.dtype is torch.int32 and tensor.shape == (length,), tensor
    assert tensor.is_contiguous()
    return tensor.tolist()


class FakeFlashInfer:
    """`head_dims` are those it has kernels for; `wrong` names what it does wrong; `break_plan` and
    `break_run` raise in each further one; every plan is noted in `plans`."""

    def __init__(self, head_dims: tuple[int, ...] = (64, 128, 256), wrong: str = "") -> None:
        self.__version__ = "0.6.18"
        self.head_dims = head_dims
        self.wrong = wrong
        self.plans: list[dict[str, Any]] = []
        self.num_runs = 0
        self.break_run = False
        self.break_plan = False

    def BatchPrefillWithPagedKVCacheWrapper(
        self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD"
    ) -> "FakeWrapper":
        assert float_workspace_buffer.dtype is torch.uint8
        return FakeWrapper(self, kv_layout)


class FakeWrapper:
    def __init__(self, owner: FakeFlashInfer, kv_layout: str) -> None:
        self._owner, self._kv_layout = owner, kv_layout
        self._plan: SimpleNamespace | None = None

    def plan(
        self, qo_indptr: torch.Tensor, paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor, paged_kv_last_page_len: torch.Tensor, num_qo_heads: int,
        num_kv_heads: int, head_dim_qk: int, page_size: int, head_dim_vo: int | None = None,
        causal: bool = False, sm_scale: float | None = None, window_left: int = -1,
        q_data_type: torch.dtype = torch.float16, kv_data_type: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        if self._owner.break_plan:
            raise RuntimeError("Buffer overflow when allocating memory for batch_prefill_tmp_v")
        if head_dim_qk not in self._owner.head_dims:
            raise ValueError(f"Unsupported head_dim: {head_dim_qk}\nand more lines")
        assert num_qo_heads % num_kv_heads == 0
        assert q_data_type in HALVES and kv_data_type in (None, q_data_type)
        count = len(qo_indptr) - 1
        starts, pages = column(qo_indptr, count + 1), column(paged_kv_indptr, count + 1)
        last = column(paged_kv_last_page_len, count)
        assert starts[0] == pages[0] == 0 and sorted(starts) == starts and sorted(pages) == pages
        assert all(1 <= length <= page_size for length in last)
        self._plan = SimpleNamespace(
            starts=starts, pages=pages, indices=column(paged_kv_indices, pages[-1]), last=last,
            heads=(num_qo_heads, num_kv_heads), head_dim=head_dim_qk, page_size=page_size,
            left=window_left if causal else None, scale=sm_scale or 1 / math.sqrt(head_dim_qk),
            dtype=q_data_type,
        )  # fmt: skip
        if self._owner.wrong == "window" and window_left >= 0:
            self._plan.left += 1
        if self._owner.wrong == "scale":
            self._plan.scale *= 1.1
        self._owner.plans.append(vars(self._plan))

    def run(
        self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor | None = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        plan = self._plan
        assert plan is not None, "plan info is not initialized"
        self._owner.num_runs += 1
        if self._owner.break_run:
            raise RuntimeError("the module was not built\nwith nvcc")
        keys, values = paged_kv_cache
        assert self._kv_layout == "HND" and keys.stride() == values.stride()
        assert q.dtype is keys.dtype is values.dtype is plan.dtype
        assert keys.shape[1:] == (plan.heads[1], plan.page_size, plan.head_dim)
        assert q.shape == (plan.starts[-1], plan.heads[0], plan.head_dim)
        assert q.stride(-1) == keys.stride(-1) == 1
        out = torch.zeros(q.shape, dtype=q.dtype) if out is None else out
        assert out.shape == q.shape and out.dtype is q.dtype and out.is_contiguous()
        lse = torch.empty(q.shape[:2])
        query = q.unflatten(1, (plan.heads[1], -1))
        for i, last in enumerate(plan.last):
            pages = plan.indices[plan.pages[i] : plan.pages[i + 1]]
            length = (len(pages) - 1) * plan.page_size + last
            seen = [one[pages].transpose(1, 2).flatten(0, 1)[:length] for one in (keys, values)]
            rows = slice(plan.starts[i], plan.starts[i + 1])
            assert plan.left is not None, "prompts are causal"
            found, lse_TKG = attend(query[rows], seen[0], seen[1], plan.left, plan.scale)
            out[rows] = found.flatten(1, 2).to(out.dtype)
            lse[rows] = lse_TKG.flatten(1) / math.log(2)
        if self._owner.wrong == "lse":
            lse *= math.log(2)
        if self._owner.wrong == "rows" and out._base is not None:
            out._base[-1] = 0  # a token behind the prompts'
        return (out, lse) if return_lse else out


class FakeVarlen:
    """page_multiple: the blocks it takes, as FA2 has it; unwritten: a sequence whose rows it leaves
    alone where the cache is paged."""

    class AuxRequest(NamedTuple):
        lse: bool = False

    def __init__(self, page_multiple: int = 1, unwritten: int | None = None) -> None:
        self.page_multiple = page_multiple
        self.unwritten = unwritten
        self.num_calls = 0

    def varlen_attn_out(
        self, out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor | None, max_q: int, max_k: int, *,
        return_aux: AuxRequest | None = None, scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
        seqused_k: torch.Tensor | None = None, block_table: torch.Tensor | None = None,
        num_splits: int | None = None,
    ) -> Any:  # fmt: skip
        self.num_calls += 1
        assert seqused_k is not None and block_table is not None and cu_seq_k is not None
        if key.shape[1] % self.page_multiple:
            raise RuntimeError("Paged KV cache block size must be divisible by 256")
        assert query.dtype is key.dtype is value.dtype is out.dtype and query.dtype in HALVES
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == out.stride(-1) == 1
        assert enable_gqa or query.shape[1] == key.shape[2]
        assert num_splits == 1, "rows stay unwritten where paged keys are split"
        count = len(cu_seq_q) - 1
        starts, lens = column(cu_seq_q, count + 1), column(seqused_k, count)
        assert starts[-1] == len(query) and column(cu_seq_k, count + 1)[-1] == sum(lens)
        assert block_table.dtype is torch.int32 and len(block_table) == count
        assert max_q == max(b - a for a, b in pairwise(starts))
        assert max_k == max(lens) and window_size[1] == 0
        grouped = query.unflatten(1, (key.shape[2], -1))
        lse = torch.empty(query.shape[1], len(query))
        for i, length in enumerate(lens):
            pages = block_table[i, : -(-length // key.shape[1])].tolist()
            seen = [one[pages].flatten(0, 1)[:length] for one in (key, value)]
            rows = slice(starts[i], starts[i + 1])
            width = scale or query.shape[2] ** -0.5
            found, lse_TKG = attend(grouped[rows], seen[0], seen[1], window_size[0], width)
            if i != self.unwritten:
                out[rows] = found.flatten(1, 2).to(out.dtype)
            lse[:, rows] = lse_TKG.flatten(1).T
        return (out, lse) if return_aux is not None and return_aux.lse else out
