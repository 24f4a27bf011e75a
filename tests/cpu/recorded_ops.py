"""What a CUDA graph does, on a CPU: torch's calls are recorded with the very tensors and numbers
they had, and replayed with those. Whatever Python read or decided in between stays as it was."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tpinfer.attention.interface import AttentionCall, HeadLayout, StepSpans
from tpinfer.attention.paged_kv import LayerKV
from tpinfer.attention.reference import ReferenceAttention
from tpinfer.worker.graphs import Mark, Recorded

BLOCK = 16


class Recording(TorchDispatchMode):
    """The calls made inside, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor | None]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_local_scalar_dense" in str(func) or "nonzero" in str(func):
            raise RuntimeError(f"{func} waits for the device inside a recording")
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        taken = {id_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        fresh = [None if id_of(t) in taken else t for t in made]
        self.calls.append((func, args, kwargs, fresh))
        return out

    def replay(self) -> None:
        """Every call again; what a call made goes where it went before."""
        for func, args, kwargs, fresh in self.calls:
            made = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, torch.Tensor)]
            for before, now in zip(fresh, made, strict=True):
                if before is not None:
                    before.copy_(now)


def id_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class CallRecorder:
    """A `Recorder` without a device; counts what was replayed."""

    def __init__(self) -> None:
        self.num_recorded = 0
        self.num_replayed = 0

    def record(self, call: Callable[[Mark], None]) -> Recorded:
        self.num_recorded += 1
        recording, marks = Recording(), [0]
        with recording:
            call(lambda: marks.append(len(recording.calls)))
        names = [func.__name__ for func, *_ in recording.calls]
        parts = [names[a:b] for a, b in pairwise([*marks, len(names)])]
        return Recorded(partial(self._replay, recording), parts)

    @torch.inference_mode()
    def _replay(self, recording: Recording) -> None:
        self.num_replayed += 1
        recording.replay()

    def op_shares(self, call: Callable[[Mark], None], num_ops: int) -> list[float]:
        marks = []
        call(lambda: marks.append(len(marks)))
        assert len(marks) == num_ops + 1
        return [(place + 1) / num_ops for place in range(num_ops)]


class PagedTorchAttention(ReferenceAttention):
    """Plain torch that reads block tables on the device, where a step has no sequences for the
    host: all keys that may be there, masked."""

    reads_paged = True

    def bind_attention(
        self, layout: HeadLayout, head_dim: int, window: int | None
    ) -> AttentionCall:
        plain = super().bind_attention(layout, head_dim, window)

        def attend(query_THD: torch.Tensor, cache: LayerKV, spans: StepSpans) -> torch.Tensor:
            paged = spans.paged
            assert paged is not None
            if spans.sequences:
                return plain(query_THD, cache, spans)
            assert layout.is_whole and window is None and paged.max_query_len == 1
            places = torch.arange(paged.block_tables_RB.shape[1] * BLOCK)
            tables_SB = paged.block_tables_RB[paged.rows_S].long()
            slots_SN = tables_SB[:, places // BLOCK] * BLOCK + places % BLOCK
            keys, values = cache.values_2KSD[:, :, slots_SN].nan_to_num().float().unbind(0)
            keys, values = (t.repeat_interleave(layout.group_size, 0) for t in (keys, values))
            scores = torch.einsum("thd,htnd->htn", query_THD.float(), keys) * head_dim**-0.5
            hidden = places[None, :] >= paged.context_lens_S[:, None]
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num()
            return torch.einsum("htn,htnd->thd", weights, values).to(query_THD.dtype)

        return attend
