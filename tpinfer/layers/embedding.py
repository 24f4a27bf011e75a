"""Vocabulary-parallel embedding and head: each rank holds a range of rows."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from tpinfer.layers.step_inputs import NO_TOKEN, Activations, OpCall, StepInputs
from tpinfer.sharding.spec import Range


def bind_embed(weight: torch.Tensor, rows: Range, *, is_whole: bool) -> OpCall:
    """residual = the rows of the step's tokens, [T, M]; zero where another rank holds the row.

    weight is [rows[1] - rows[0], M]. At tp > 1 the result is partial: `embed.reduce` sums it.
    """
    start, stop = rows

    def embed_whole(acts: Activations, step: StepInputs) -> None:
        acts.residual = F.embedding(step.token_ids, weight)

    def embed_range(acts: Activations, step: StepInputs) -> None:
        local = step.token_ids - start
        elsewhere = (local < 0) | (local >= stop - start)
        found = F.embedding(local.masked_fill_(elsewhere, 0), weight)
        acts.residual = found.masked_fill_(elsewhere.unsqueeze(1), 0.0)

    return embed_whole if is_whole else embed_range


def bind_embed_reduce(all_reduce: Callable[[torch.Tensor], None]) -> OpCall:
    """residual summed over the group, in place."""

    def reduce(acts: Activations, step: StepInputs) -> None:
        all_reduce(acts.residual)

    return reduce


def bind_head(weight: torch.Tensor) -> OpCall:
    """logits of the rank's vocabulary rows in float32, [R, stop - start]."""

    def head(acts: Activations, step: StepInputs) -> None:
        acts.best = None
        acts.logits = F.linear(acts.hidden, weight).float()

    return head


def bind_head_gather(
    all_gather: Callable[[torch.Tensor, torch.Tensor], None],
    ranges: Sequence[Range],
    rank: int,
) -> OpCall:
    """Bring the ranks' logits together.

    Where every row is greedy only each rank's best value and its token travel, 8 bytes a row:
    float32 holds token ids below 2**24 exactly. Else every rank receives all columns, padded to
    the widest share. Ties go to the lowest token id: a rank's first maximum, then the lowest
    rank.
    """
    size = len(ranges)
    widths = [stop - start for start, stop in ranges]
    widest = max(widths)
    first = ranges[rank][0]

    def gather_best(acts: Activations) -> None:
        values, ids = acts.logits.max(-1)
        mine = torch.stack((values, (ids + first).float()))
        everyone = torch.empty(size, *mine.shape, dtype=mine.dtype, device=mine.device)
        all_gather(everyone, mine)
        top, winner = everyone[:, 0].max(0, keepdim=True)  # NaN counts as the largest
        best = everyone[:, 1].gather(0, winner)[0].long()
        acts.best = best.masked_fill_(top[0].isnan(), NO_TOKEN)

    def gather_all(acts: Activations) -> None:
        mine = F.pad(acts.logits, (0, widest - widths[rank])).contiguous()
        everyone = torch.empty(size, *mine.shape, dtype=mine.dtype, device=mine.device)
        all_gather(everyone, mine)
        columns = [everyone[r, :, :width] for r, width in enumerate(widths)]
        acts.logits = torch.cat(columns, -1)

    def gather(acts: Activations, step: StepInputs) -> None:
        if step.all_greedy:
            gather_best(acts)
        else:
            gather_all(acts)

    return gather
