"""From logits to tokens, on logits whose columns are spread over the ranks.

No rank ever sees another's columns. What travels are each row's likeliest tokens as sorted keys
(`ordered_keys`), sums of whole-number masses (`masses`) and the token that its owner resolved.
Every rank draws from the same gathered bytes, and no sum depends on how the vocabulary is cut, so
the same logits give the same tokens on any number of ranks and in any batch.

Random numbers are keyed by (seed, continuation, position), never by step or row. Where a row's
logits are not numbers, or nothing is left to draw from, its token is NO_TOKEN.

Letters: R logit rows, L rows with log-probabilities, V local vocabulary, P ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from tpinfer.decoding.batch import Batch, sort_rows
from tpinfer.decoding.candidates import draw_among, usable
from tpinfer.decoding.logit_edits import edit_logits
from tpinfer.decoding.logprobs import RawRows, prompt_logprobs, take_raw_rows
from tpinfer.decoding.mass_draw import Columns, MassDraw, candidates_by_row, settle_filters
from tpinfer.decoding.masses import pick_rows
from tpinfer.decoding.ordered_keys import key_ids, key_values, merge_keys, top_keys
from tpinfer.decoding.vocab_passes import VocabPasses
from tpinfer.layers.embedding import AnyLogits
from tpinfer.layers.step_inputs import NO_TOKEN, Activations, Op, OpCall, StepInputs
from tpinfer.sharding.spec import Range

AllGather = Callable[[torch.Tensor, torch.Tensor], None]
"""(out, t): out[r] <- rank r's t."""


@dataclass(slots=True)
class Draws:
    """What the sampling ops of one step pass on to each other."""

    payload: torch.Tensor
    """What this rank sends next."""
    gathered: torch.Tensor
    """[P, *payload.shape]."""
    batch: Batch | None = None
    """None where all rows are plain greedy."""
    raw: RawRows | None = None
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    """By number of candidates: those of all ranks."""
    top: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """int64 [R]: each row's likeliest key."""
    by_mass: list[MassDraw] = field(default_factory=list)
    """Rows that are still to be drawn."""


class Sampler:
    """The ops behind the head on one rank, each on (acts, step)."""

    def __init__(
        self, all_gather: AllGather, ranges: Sequence[Range], rank: int, passes: VocabPasses
    ) -> None:
        self._all_gather = all_gather
        self._size = len(ranges)
        self.columns = Columns(ranges[rank][0], ranges[-1][1], rank, passes)

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor, [P, *mine.shape]; nothing is sent where it is empty."""
        if self._size == 1:
            return mine.unsqueeze(0)
        everyone = mine.new_empty(self._size, *mine.shape)
        if mine.numel():
            self._all_gather(everyone, mine.contiguous())
        return everyone

    def gather_payload(self, acts: Activations, step: StepInputs) -> None:
        """Send what the op before prepared."""
        draws: Draws = acts.sampling
        draws.gathered = self.gather(draws.payload)

    def find_candidates(self, acts: Activations, step: StepInputs) -> None:
        """payload = the likeliest local keys, one a row where all are plain greedy. Requests' edits
        are made to acts.logits here."""
        logits, first = acts.logits, self.columns.first
        acts.logprobs = []
        acts.sampling = draws = Draws(logits, logits)
        if step.all_greedy:
            draws.payload = self.columns.passes.best_keys(logits, range(logits.shape[0]), first)
            return
        draws.batch = batch = sort_rows(step.sampling, logits.device)
        pieces = []
        if batch.with_logprobs:
            draws.raw = take_raw_rows(logits, batch.with_logprobs)
            pieces.append(top_keys(draws.raw.logits, first, batch.num_top).flatten())
        for i in batch.edited:
            edit_logits(logits[i], step.sampling[i], first)
        for count, rows in batch.tiers.items():
            if count == 1:
                found = self.columns.passes.best_keys(logits, rows, first)
            else:
                found = top_keys(pick_rows(logits, rows), first, count)
            pieces.append(found.flatten())
        draws.payload = torch.cat(pieces)

    def sum_masses(self, acts: Activations, step: StepInputs) -> None:
        """tokens = what the candidates alone decide; payload = this rank's mass of other rows."""
        draws: Draws = acts.sampling
        batch = draws.batch
        if batch is None:
            top = draws.gathered[:, :, 0].amax(0)
            acts.tokens = likeliest(top)
            draws.payload = top[:0]
            return
        _merge(draws, batch)
        acts.tokens = key_ids(draws.top)
        if batch.among_candidates:
            _draw_among(acts.tokens, draws, batch)
        pieces = [draws.top[:0]]
        if batch.by_mass:
            highest = key_values(pick_rows(draws.top.unsqueeze(1), batch.by_mass)).squeeze(1)
            scale = batch.scale(batch.by_mass, highest)
            sums = self.columns.passes.local_sums(
                acts.logits, batch.by_mass, scale, self.columns.first
            )
            pieces.append(sums.sum(-1))
            draws.by_mass = [MassDraw(batch.by_mass, scale, sums, sums)]
        if draws.raw is not None:
            pieces.append(draws.raw.local_mass(self.columns.passes))
        draws.payload = torch.cat(pieces)

    def settle(self, acts: Activations, step: StepInputs) -> None:
        """Take in the masses of all ranks, and find where top-k and top-p cut the rows whose
        candidates do not reach so far. A collective only where there are such rows."""
        draws: Draws = acts.sampling
        batch = draws.batch
        if batch is None:
            return
        if draws.raw is not None:
            draws.raw.total = draws.gathered[:, len(batch.by_mass) :].sum(0)
        if batch.by_mass:
            [draw] = draws.by_mass
            by_rank = draws.gathered[:, : len(batch.by_mass)]
            draws.by_mass = settle_filters(
                MassDraw(draw.rows, draw.scale, draw.sums, by_rank),
                acts.logits,
                acts.tokens,
                candidates_by_row(batch, draws.keys),
                batch,
                self.columns,
                self.gather,
            )

    def draw(self, acts: Activations, step: StepInputs) -> None:
        """payload = the tokens and their own logits' keys, as far as they are this rank's."""
        draws: Draws = acts.sampling
        batch = draws.batch
        if batch is None:
            return
        for draw in draws.by_mass:
            rows = _places(draw.rows, acts.tokens)
            numbers = batch.numbers(draw.rows)
            acts.tokens[rows] = draw.local_tokens(acts.logits, numbers, self.columns)
        pieces = [acts.tokens[_places(batch.by_mass, acts.tokens)]]
        if draws.raw is not None:
            drawn = acts.tokens[_places(batch.with_logprobs, acts.tokens)]
            pieces.append(draws.raw.owned_keys(drawn, self.columns.first))
        draws.payload = torch.cat(pieces)

    def finish(self, acts: Activations, step: StepInputs) -> None:
        """tokens and logprobs are whole."""
        draws: Draws = acts.sampling
        batch = draws.batch
        if batch is None:
            return
        num_drawn = len(batch.by_mass)
        if num_drawn:
            rows = _places(batch.by_mass, acts.tokens)
            acts.tokens[rows] = draws.gathered[:, :num_drawn].amax(0)
        drawn = torch.zeros_like(acts.tokens, dtype=torch.bool)
        drawn[_places(batch.sampled, acts.tokens)] = True
        fine = torch.where(drawn, usable(draws.top, sampled=True), usable(draws.top, sampled=False))
        acts.tokens.masked_fill_(~fine, NO_TOKEN)
        if draws.raw is not None:
            counts = [step.sampling[i].record.num_logprobs for i in batch.with_logprobs]
            keys = draws.gathered[:, num_drawn:].amax(0)
            acts.logprobs = [None] * len(step.sampling)
            described = draws.raw.describe(keys, counts)
            for i, one in zip(batch.with_logprobs, described, strict=True):
                acts.logprobs[i] = one


def likeliest(top_keys_R: torch.Tensor) -> torch.Tensor:
    """int64 [R]: the tokens of each row's largest key; NO_TOKEN where a logit is NaN or all are
    -inf."""
    return key_ids(top_keys_R).masked_fill_(~usable(top_keys_R, sampled=False), NO_TOKEN)


def _merge(draws: Draws, batch: Batch) -> None:
    """Sort the gathered keys of all ranks into candidates by tier."""
    size, place = draws.gathered.shape[0], 0

    def take(num_rows: int, count: int) -> torch.Tensor:
        nonlocal place
        start, place = place, place + num_rows * count
        return merge_keys(draws.gathered[:, start:place].view(size, num_rows, count))

    if draws.raw is not None:
        draws.raw.keys = take(len(batch.with_logprobs), batch.num_top)
    draws.top = draws.gathered.new_empty(len(batch.rows))
    for count, rows in batch.tiers.items():
        found = draws.keys[count] = take(len(rows), count)
        draws.top[_places(rows, found)] = found[:, 0]


def _draw_among(tokens: torch.Tensor, draws: Draws, batch: Batch) -> None:
    """Set the tokens of rows whose candidates hold all that may be drawn."""
    wanted = set(batch.among_candidates)
    for count, rows in batch.tiers.items():
        places = [i for i, row in enumerate(rows) if row in wanted]
        if not places:
            continue
        keys, some = pick_rows(draws.keys[count], places), [rows[i] for i in places]
        filters = (
            batch.column(some, "top_k", torch.int64),
            batch.column(some, "top_p", torch.float64),
        )
        scale = batch.scale(some, key_values(keys[:, 0]))
        drawn = draw_among(keys, scale, filters, batch.numbers(some))
        tokens[_places(some, tokens)] = drawn.tokens


def _places(rows: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=like.device)


def bind_sampler(
    all_gather: AllGather,
    ranges: Sequence[Range],
    rank: int,
    any_logits: AnyLogits,
    passes: VocabPasses,
) -> list[Op]:
    """The ops behind the head. On one rank `sample` does all of it; on more, the gathers between
    its parts are ops of their own, which send nothing where nothing is needed."""
    sampler = Sampler(all_gather, ranges, rank, passes)

    def whole(acts: Activations, step: StepInputs) -> None:
        if step.all_greedy:
            acts.logprobs = []
            every = range(acts.logits.shape[0])
            top = passes.best_keys(acts.logits, every, sampler.columns.first)
            acts.tokens = likeliest(top[:, 0])
            return
        for part in (sampler.find_candidates, sampler.gather_payload, sampler.sum_masses,
                     sampler.gather_payload, sampler.settle, sampler.draw,
                     sampler.gather_payload, sampler.finish):  # fmt: skip
            part(acts, step)

    def prompt(acts: Activations, step: StepInputs) -> None:
        acts.prompt_logprobs = []
        if step.prompt_rows:
            acts.prompt_logprobs = prompt_logprobs(
                acts, step, any_logits, sampler.columns, sampler.gather
            )

    calls: list[tuple[str, OpCall]] = [("sample", whole)]
    if len(ranges) > 1:
        calls = [
            ("sample.local", sampler.find_candidates),
            ("head.gather", sampler.gather_payload),
            ("sample.mass", sampler.sum_masses),
            ("mass.gather", sampler.gather_payload),
            ("sample.search", sampler.settle),
            ("sample.draw", sampler.draw),
            ("draw.gather", sampler.gather_payload),
            ("sample", sampler.finish),
        ]
    return [Op(name, call) for name, call in [*calls, ("prompt_logprobs", prompt)]]
