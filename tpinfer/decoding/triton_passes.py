"""The pass that greedy rows need, as one kernel and one maximum, with nothing asked of the host;
the other passes are plain torch. Imported only where Triton is chosen.

Letters: R rows, V local vocabulary, C chunks of V.
"""

# Kernels are not Python to a type checker.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from tpinfer.decoding.masses import pick_rows
from tpinfer.decoding.ordered_keys import NAN_KEY, NO_KEY
from tpinfer.decoding.vocab_passes import TorchPasses

_CHUNK = 4096


@triton.jit
def best_of_chunks(
    logits_ptr, found_ptr, row_stride, width, first, num_chunks,
    NAN: tl.constexpr, NONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """found[R, C] int64 = the largest key (`ordered_keys`) of each chunk of float32 logits."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(logits_ptr + row * row_stride + columns, mask=inside, other=0.0)
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.to(tl.int64) << 32) + (0xFFFFFFFF - (columns.to(tl.int64) + first))
    keys = tl.where(values != values, NAN, keys)
    keys = tl.where(inside, keys, NONE)
    tl.store(found_ptr + row * num_chunks + chunk, tl.max(keys, 0))


class TritonPasses(TorchPasses):
    """Keys of the likeliest tokens by a kernel. `local_sums`, `row_masses` and `tokens_at` are
    torch's: they read row numbers from the host."""

    def best_keys(self, logits_RV: torch.Tensor, rows: Sequence[int], first: int) -> torch.Tensor:
        """As `VocabPasses.best_keys`. No host synchronisation where the rows adjoin."""
        some = pick_rows(logits_RV, rows)
        num_rows, width = some.shape
        if not some.numel():
            return torch.full((num_rows, 1), NO_KEY, dtype=torch.int64, device=some.device)
        block = min(_CHUNK, triton.next_power_of_2(width))
        num_chunks = triton.cdiv(width, block)
        found = torch.empty(num_rows, num_chunks, dtype=torch.int64, device=some.device)
        best_of_chunks[num_rows, num_chunks](
            some, found, some.stride(0), width, first, num_chunks,
            NAN=NAN_KEY, NONE=NO_KEY, BLOCK=block,
        )  # fmt: skip
        return found.amax(-1, keepdim=True)
