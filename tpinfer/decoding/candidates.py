"""Drawing among the likeliest tokens of a row, where these hold all that may be drawn. Every rank
has the same candidates and draws the same one.

Letters: R rows, C candidates.
"""

from dataclasses import dataclass

import torch

from tpinfer.decoding.masses import Scale, draw_place, masses
from tpinfer.decoding.ordered_keys import NAN_KEY, NO_KEY, key_ids, key_values

_FINITE_FROM = (-0x7F800000) << 32
"""Keys of -inf lie below."""
_INFINITE_FROM = 0x7F800000 << 32


def usable(top_keys: torch.Tensor, *, sampled: bool) -> torch.Tensor:
    """bool: whether a token can be drawn from a row with these likeliest keys. Not where there is
    NaN or nothing above -inf; nor, with a temperature, where there is +inf."""
    return (top_keys >= _FINITE_FROM) & (top_keys < (_INFINITE_FROM if sampled else NAN_KEY))


@dataclass(frozen=True, slots=True)
class Drawn:
    """What candidates gave."""

    tokens: torch.Tensor
    """int64 [R]."""
    suffice: torch.Tensor
    """bool [R]: the candidates hold the mass that top-p keeps; else the token means nothing."""


def top_p_mass(total: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """int64: least mass that the kept tokens must reach, 1 to total; top_p is float64."""
    wanted = (total.double() * top_p).ceil().long()
    return torch.minimum(wanted.clamp_(min=1), total.clamp(min=1))


def draw_among(
    keys_RC: torch.Tensor,
    scale: Scale,
    filters: tuple[torch.Tensor, torch.Tensor],
    numbers: torch.Tensor,
    totals: torch.Tensor | None = None,
) -> Drawn:
    """Draw from falling keys. `filters` are top_k (int64, 0 keeps all) and top_p (float64), each
    [R, 1]; numbers is float64 [R]; totals is int64 [R], the mass of the whole row where the
    candidates are not all of it."""
    top_k, top_p = filters
    places = torch.arange(keys_RC.shape[1], device=keys_RC.device)
    kept = (keys_RC > NO_KEY) & ((top_k == 0) | (places < top_k))
    values = key_values(keys_RC).masked_fill_(~kept, float("-inf"))
    found = masses(values, scale)
    total = found.sum(-1, keepdim=True) if totals is None else totals.unsqueeze(1)
    wanted = top_p_mass(total, top_p)
    ends = found.cumsum(-1)
    suffice = ends[:, -1:] >= wanted
    found = found.mul_(ends - found < wanted)
    ends = found.cumsum(-1)
    place = draw_place(ends[:, -1:].clamp(min=1), numbers.unsqueeze(1))
    chosen = torch.searchsorted(ends, place, right=True).clamp_(max=keys_RC.shape[1] - 1)
    return Drawn(key_ids(keys_RC.gather(1, chosen)).squeeze(1), suffice.squeeze(1))
