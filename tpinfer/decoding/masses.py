"""Probability as whole numbers. A token's mass is 2**42 * exp((logit - highest) / temperature),
rounded down: sums of such masses are exact, so neither the order of summation nor the cut of the
vocabulary nor the number of ranks changes a bit of them, or of the token that is drawn.

A token 29 nats below the likeliest has no mass. 2**20 tokens of full mass still fit an int64.
The exponential is spelled out in float32 products and sums, each rounded by itself, so that every
processor finds the same bits, as does vocab_passes.c, whose order of operations is this file's.

Letters: R rows, V local vocabulary, N chunks of V, P ranks, C candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

MASS_BITS = 42
CHUNK = 128
"""Masses summed in the first of the two levels."""
_LEAST_EXPONENT = -30.0
"""Weighs nothing."""
_LOG2_E = 1.44269504
_LN2 = 0.693359375, -2.12194440e-4
"""ln 2 in two parts; the first has so few bits that its product with a whole number is exact."""
_SERIES = (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
"""Of exp on [-ln 2 / 2, ln 2 / 2], behind the first one, 1.9875691500e-4 (Cephes expf; relative
error below 2e-7)."""
LARGEST_FACTOR = 3e38
"""Stands for 1 / temperature where that is no float32."""


@dataclass(frozen=True, slots=True)
class Scale:
    """What turns the logits of R rows into masses, each [R, 1]."""

    highest: torch.Tensor
    """float32: the row's largest logit over all ranks."""
    factor: torch.Tensor
    """float32: 1 / temperature."""
    min_p: torch.Tensor
    """float32: least mass, as a share of the largest."""
    equal_min_p: float | None
    """`min_p` where it is the same in all rows: then the host knows it."""
    cut_value: torch.Tensor | None = None
    """float32: least logit kept by top-k and top-p; None keeps all."""
    cut_id: torch.Tensor | None = None
    """int64: last token kept among those whose logit is `cut_value`."""

    def rows(self, chosen: slice | torch.Tensor) -> "Scale":
        """The same of some rows."""
        value, last = self.cut_value, self.cut_id
        return Scale(
            self.highest[chosen],
            self.factor[chosen],
            self.min_p[chosen],
            self.equal_min_p,
            None if value is None else value[chosen],
            None if last is None else last[chosen],
        )


def factor_of(temperature: float) -> float:
    """1 / temperature, as large as a float32 can be at most; 0 gives 1."""
    if temperature == 0:
        return 1.0
    return min(1 / max(temperature, 1 / LARGEST_FACTOR), LARGEST_FACTOR)


def masses(logits: torch.Tensor, scale: Scale, ids: torch.Tensor | None = None) -> torch.Tensor:
    """int64 masses of float32 [R, n]; `ids` are the tokens' ids, [n] or [R, n], for a cut."""
    found = _whole_masses(torch.sub(logits, scale.highest).mul_(scale.factor))
    if scale.equal_min_p != 0:
        found.mul_(found >= scale.min_p * float(1 << MASS_BITS))
    found.floor_()
    if scale.cut_value is not None:
        kept = logits > scale.cut_value
        if ids is not None and scale.cut_id is not None:
            kept |= (logits == scale.cut_value) & (ids <= scale.cut_id)
        found.mul_(kept)
    return found.long()


def _whole_masses(x: torch.Tensor) -> torch.Tensor:
    """float32 2**42 * exp(x), not rounded down yet. What is no number weighs nothing."""
    x = torch.where(x > _LEAST_EXPONENT, x, _LEAST_EXPONENT)
    n = torch.mul(x, _LOG2_E).round_()
    high, low = _LN2
    r = x.sub_(n * high).sub_(n * low)
    p = torch.full_like(r, 1.9875691500e-4)
    for coefficient in _SERIES:
        p.mul_(r).add_(coefficient)
    p.mul_(r).mul_(r).add_(r).add_(1.0)
    powers = (n.int() + (MASS_BITS + 127)) << 23
    return p.mul_(powers.view(torch.float32))


def chunk_sums(masses_RV: torch.Tensor) -> torch.Tensor:
    """int64 [R, N]: sums of CHUNK neighbours; the last chunk may be shorter."""
    width = masses_RV.shape[1]
    num_whole = width // CHUNK
    whole = masses_RV[:, : num_whole * CHUNK].unflatten(1, (num_whole, CHUNK)).sum(-1)
    if num_whole * CHUNK == width:
        return whole
    return torch.cat((whole, masses_RV[:, num_whole * CHUNK :].sum(-1, keepdim=True)), 1)


def local_sums(
    logits_RV: torch.Tensor, rows: Sequence[int], scale: Scale, first: int
) -> torch.Tensor:
    """`chunk_sums` of some rows of logits, int64 [n, N]; a few rows at a time so that memory stays
    small."""
    width, ids = logits_RV.shape[1], None
    if scale.cut_value is not None:
        ids = torch.arange(first, first + width, device=logits_RV.device)
    at_once = max(1, (1 << (17 if logits_RV.device.type == "cpu" else 24)) // width)
    found = []
    for i in range(0, len(rows), at_once):
        some = pick_rows(logits_RV, rows[i : i + at_once])
        found.append(chunk_sums(masses(some, scale.rows(slice(i, i + at_once)), ids)))
    return found[0] if len(found) == 1 else torch.cat(found)


def pick_rows(logits_RV: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Rows of a tensor, by rising numbers; a view where they lie side by side."""
    if not rows:
        return logits_RV[:0]
    if rows[-1] - rows[0] == len(rows) - 1:
        return logits_RV[rows[0] : rows[-1] + 1]
    return logits_RV[torch.tensor(rows, device=logits_RV.device)]


def draw_place(total: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """int64 in [0, total): where a float64 number in (0, 1) falls among the masses."""
    return (number * total.double()).long().clamp_(max=total - 1)


def token_at(
    logits_RV: torch.Tensor,
    rows: Sequence[int],
    scale: Scale,
    sums_nN: torch.Tensor,
    places: torch.Tensor,
    first: int,
) -> torch.Tensor:
    """int64 [n]: the tokens of `rows` whose mass covers `places` (int64 [n], counted from this
    rank's first mass). Only the chunk that holds it is looked at again."""
    width = logits_RV.shape[1]
    places = places.unsqueeze(1)
    ends = sums_nN.cumsum(-1)
    chunk = torch.searchsorted(ends, places, right=True).clamp_(max=sums_nN.shape[1] - 1)
    places = places - (ends - sums_nN).gather(1, chunk)
    columns = chunk * CHUNK + torch.arange(CHUNK, device=logits_RV.device)
    inside = columns < width
    columns = columns.clamp_(max=width - 1)
    places_n = torch.tensor(rows, device=logits_RV.device).unsqueeze(1)
    found = masses(logits_RV[places_n, columns], scale, columns + first).mul_(inside)
    place = torch.searchsorted(found.cumsum(-1), places, right=True).clamp_(max=CHUNK - 1)
    return columns.gather(1, place).squeeze(1) + first
