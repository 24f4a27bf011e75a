"""The least likely token that top-k or top-p keeps, where candidates do not reach that far: found
exactly by descending through the digits of the logits, with counts or masses summed over ranks.

Three rounds, each one small gather: the 11, 11 and 10 bits of a logit's ordered bits. Letters: F
rows, V local vocabulary, P ranks, D digits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tpinfer.decoding.ordered_keys import ordered_bits

Gather = Callable[[torch.Tensor], torch.Tensor]
"""A rank's tensor -> every rank's, stacked in rank order."""
_ROUNDS = ((21, 11), (10, 11), (0, 10))
"""(bits below the digit, bits of the digit)."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Where the kept tokens of each row end."""

    value: torch.Tensor
    """float32 [F]: the last kept token's logit."""
    last_id: torch.Tensor
    """int64 [F]: this rank's last kept token among those with that logit; -1 keeps none of
    them."""
    kept_by_rank: torch.Tensor
    """int64 [P, F]: weight that each rank keeps."""


@dataclass(slots=True)
class _Remaining:
    """A row's tokens that share all digits found so far, in token order."""

    ordered: torch.Tensor
    """int32 [n]: `ordered_bits` of their logits."""
    weights: torch.Tensor
    ids: torch.Tensor | int
    """int64 [n]; the first one's where they are all there still."""


def find_cuts(
    rows: Sequence[tuple[torch.Tensor, torch.Tensor]],
    wanted: torch.Tensor,
    first: int,
    rank: int,
    gather: Gather,
) -> Cut:
    """Cut each row where the weight of the likeliest tokens first reaches `wanted`, int64 [F], at
    least 1 and at most the row's weight over all ranks.

    rows: local logits, float32 [V], and their weights, int64 [V], the same for equal logits. Token
    ids begin at `first`. Equal logits are kept by rising id. A collective call.
    """
    remaining = [_remaining(logits, weights, first) for logits, weights in rows]
    wanted, prefix = wanted.clone(), torch.zeros_like(wanted)
    everyone = torch.empty(0)
    kept: torch.Tensor | int = 0
    digit = prefix
    for shift, num_bits in _ROUNDS:
        mine = torch.stack([_weight_by_digit(row, shift, num_bits) for row in remaining])
        everyone = gather(mine)  # [P, F, D]
        from_digit = everyone.sum(0).flip(-1).cumsum(-1).flip(-1)  # weight of it and all above
        digit = ((from_digit >= wanted.unsqueeze(1)).sum(-1) - 1).clamp_(min=0)
        picked = digit.unsqueeze(1)
        at_digit = everyone.sum(0).gather(1, picked)
        wanted -= (from_digit.gather(1, picked) - at_digit).squeeze(1)
        above = torch.arange(1 << num_bits, device=digit.device) > picked
        kept = kept + (everyone * above).sum(-1)
        prefix = (prefix << num_bits) | digit
        for row, chosen in zip(remaining, digit, strict=True):
            _keep(row, chosen, shift, num_bits)
    ties = everyone.gather(2, digit.view(1, -1, 1).expand(everyone.shape[0], -1, 1)).squeeze(2)
    return _share_ties(remaining, prefix, wanted, ties, kept, rank, gather)


def _share_ties(
    remaining: Sequence[_Remaining],
    prefix: torch.Tensor,
    wanted: torch.Tensor,
    ties: torch.Tensor,
    kept: torch.Tensor | int,
    rank: int,
    gather: Gather,
) -> Cut:
    """Keep as many of the tokens with the last kept logit as are wanted, lowest ids first. ties:
    their weight by rank, [P, F]; wanted: the weight that is missing, [F]."""
    kept_ids = [row.ids for row in remaining if isinstance(row.ids, torch.Tensor)]
    counts = gather(torch.tensor([ids.shape[0] for ids in kept_ids], device=ties.device))
    each = (ties.sum(0) // counts.sum(0).clamp(min=1)).clamp_(min=1)  # equal logits weigh the same
    quota = (wanted + each - 1) // each
    before = counts.cumsum(0) - counts
    shares = torch.minimum((quota - before).clamp_(min=0), counts)
    last = [
        ids[int(share) - 1] if int(share) else ids.new_tensor(-1)
        for ids, share in zip(kept_ids, shares[rank], strict=True)
    ]
    ordered = (prefix - (1 << 31)).int()
    values = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return Cut(values, torch.stack(last), kept + shares * each)


def _remaining(logits: torch.Tensor, weights: torch.Tensor, first: int) -> _Remaining:
    return _Remaining(ordered_bits(logits), weights, first)


def _digits(row: _Remaining, shift: int, num_bits: int) -> torch.Tensor:
    """int32: a digit of each token, the first one counted from the lowest negative number."""
    if shift + num_bits == 32:
        return (row.ordered >> shift) + (1 << (num_bits - 1))
    return (row.ordered >> shift) & ((1 << num_bits) - 1)


def _weight_by_digit(row: _Remaining, shift: int, num_bits: int) -> torch.Tensor:
    digits = _digits(row, shift, num_bits).long()
    return row.weights.new_zeros(1 << num_bits).scatter_add_(0, digits, row.weights)


def _keep(row: _Remaining, digit: torch.Tensor, shift: int, num_bits: int) -> None:
    """Forget the tokens with another digit, and those that weigh nothing."""
    same = (_digits(row, shift, num_bits) == digit) & (row.weights > 0)
    [kept] = same.nonzero(as_tuple=True)
    row.ordered, row.weights = row.ordered[kept], row.weights[kept]
    row.ids = kept + row.ids if isinstance(row.ids, int) else row.ids[kept]
