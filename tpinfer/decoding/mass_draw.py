"""Drawing from the mass of the whole vocabulary: each rank sums its columns, the sums travel, and
the rank whose masses cover the drawn place says which token that is.

Letters: n rows that draw so, V local vocabulary, N chunks of V, P ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tpinfer.decoding.batch import Batch
from tpinfer.decoding.candidates import draw_among, top_p_mass
from tpinfer.decoding.masses import Scale, draw_place
from tpinfer.decoding.search import Cut, Gather, find_cuts
from tpinfer.decoding.vocab_passes import VocabPasses
from tpinfer.layers.step_inputs import NO_TOKEN
from tpinfer.steps.sampling_record import NUCLEUS_CANDIDATES


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of the vocabulary that one rank has."""

    first: int
    vocab_size: int
    """Of all ranks."""
    rank: int
    passes: VocabPasses
    """What reads whole rows of them."""


@dataclass(frozen=True, slots=True)
class MassDraw:
    """Some rows of a step, what they weigh here and on every rank."""

    rows: list[int]
    scale: Scale
    sums: torch.Tensor
    """int64 [n, N]: local masses."""
    by_rank: torch.Tensor
    """int64 [P, n]."""

    def some(self, chosen: Sequence[int]) -> "MassDraw":
        """Those at some places of `rows`."""
        places = torch.tensor(chosen, dtype=torch.int64, device=self.sums.device)
        return MassDraw(
            [self.rows[i] for i in chosen],
            self.scale.rows(places),
            self.sums[places],
            self.by_rank[:, places],
        )

    def local_tokens(
        self, logits_RV: torch.Tensor, numbers: torch.Tensor, columns: Columns
    ) -> torch.Tensor:
        """int64 [n]: the drawn token where this rank has it, NO_TOKEN elsewhere."""
        before = self.by_rank.cumsum(0)[columns.rank] - self.by_rank[columns.rank]
        place = draw_place(self.by_rank.sum(0).clamp(min=1), numbers) - before
        is_here = (place >= 0) & (place < self.by_rank[columns.rank])
        found = columns.passes.tokens_at(
            logits_RV, self.rows, self.scale, self.sums, place.clamp(min=0), columns.first
        )
        return found.masked_fill_(~is_here, NO_TOKEN)


def settle_filters(
    draw: MassDraw,
    logits_RV: torch.Tensor,
    tokens: torch.Tensor,
    nucleus_keys: dict[int, torch.Tensor],
    batch: Batch,
    columns: Columns,
    gather: Gather,
) -> list[MassDraw]:
    """Apply top-k and top-p to rows that draw by mass: `tokens` (int64 [R]) gets those that the
    candidates decide, and the rows that are still to be drawn are returned, cut where they must be.

    nucleus_keys: row -> its candidates, int64 [NUCLEUS_CANDIDATES]. A collective call where rows
    have to be searched.
    """
    plain, by_candidates, by_count = [], [], []
    for place, row in enumerate(draw.rows):
        record = batch.rows[row].record
        if 0 < record.top_k < columns.vocab_size:
            by_count.append(place)
        elif record.top_p < 1:
            by_candidates.append(place)
        else:
            plain.append(place)
    if len(plain) == len(draw.rows):
        return [draw]
    found = [draw.some(plain)] if plain else []
    to_search = []
    if by_candidates:
        to_search += _draw_by_candidates(draw, by_candidates, tokens, nucleus_keys, batch)
    if by_count:
        counted = _cut_by_count(draw.some(by_count), logits_RV, batch, columns, gather)
        also = [i for i, row in enumerate(counted.rows) if batch.rows[row].record.top_p < 1]
        only = [i for i in range(len(counted.rows)) if i not in set(also)]
        found += [counted.some(only)] if only else []
        if also:
            found.append(_cut_by_mass(counted.some(also), logits_RV, batch, columns, gather))
    if to_search:
        found.append(_cut_by_mass(draw.some(to_search), logits_RV, batch, columns, gather))
    return found


def _draw_by_candidates(
    draw: MassDraw,
    places: list[int],
    tokens: torch.Tensor,
    nucleus_keys: dict[int, torch.Tensor],
    batch: Batch,
) -> list[int]:
    """Draw where the candidates reach top-p's mass; returns the places where they do not."""
    some = draw.some(places)
    filters = torch.zeros_like(some.by_rank[:1].T), batch.column(some.rows, "top_p", torch.float64)
    drawn = draw_among(
        torch.stack([nucleus_keys[row] for row in some.rows]),
        some.scale,
        filters,
        batch.numbers(some.rows),
        some.by_rank.sum(0),
    )
    rows = torch.tensor(some.rows, device=tokens.device)
    tokens[rows] = drawn.tokens
    suffice = drawn.suffice.tolist()
    return [place for place, enough in zip(places, suffice, strict=True) if not enough]


def _cut_by_count(
    draw: MassDraw, logits_RV: torch.Tensor, batch: Batch, columns: Columns, gather: Gather
) -> MassDraw:
    """Keep each row's top_k likeliest tokens."""
    ones = torch.ones(logits_RV.shape[1], dtype=torch.int64, device=logits_RV.device)
    wanted = batch.column(draw.rows, "top_k", torch.int64).squeeze(1)
    parts = [(logits_RV[row], ones) for row in draw.rows]
    cut = find_cuts(parts, wanted, columns.first, columns.rank, gather)
    scale = _with_cut(draw.scale, cut)
    sums = columns.passes.local_sums(logits_RV, draw.rows, scale, columns.first)
    return MassDraw(draw.rows, scale, sums, gather(sums.sum(-1)))


def _cut_by_mass(
    draw: MassDraw, logits_RV: torch.Tensor, batch: Batch, columns: Columns, gather: Gather
) -> MassDraw:
    """Keep the likeliest tokens of each row that reach top_p of its mass."""
    top_p = batch.column(draw.rows, "top_p", torch.float64)
    wanted = top_p_mass(draw.by_rank.sum(0).unsqueeze(1), top_p).squeeze(1)
    first = columns.first
    weights = columns.passes.row_masses(logits_RV, draw.rows, draw.scale, first)
    parts = [(logits_RV[row], some) for row, some in zip(draw.rows, weights, strict=True)]
    cut = find_cuts(parts, wanted, first, columns.rank, gather)
    scale = _with_cut(draw.scale, cut)
    sums = columns.passes.local_sums(logits_RV, draw.rows, scale, first)
    return MassDraw(draw.rows, scale, sums, cut.kept_by_rank)


def _with_cut(scale: Scale, cut: Cut) -> Scale:
    return replace(scale, cut_value=cut.value.unsqueeze(1), cut_id=cut.last_id.unsqueeze(1))


def candidates_by_row(batch: Batch, keys: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """The candidates of rows that send as many as top-p wants."""
    rows = batch.tiers.get(NUCLEUS_CANDIDATES, [])
    return {row: keys[NUCLEUS_CANDIDATES][i] for i, row in enumerate(rows)}
