"""From a request's sampling parameters to the record that every rank samples by, and what such a
record asks of a step."""

from collections.abc import Iterable

from tpinfer.config.sampling import SamplingParams
from tpinfer.steps.plan import SamplingRecord

MAX_CANDIDATES = 1024
"""Largest top_k whose tokens travel as candidates; a larger one is found by counting."""
NUCLEUS_CANDIDATES = 256
"""Candidates of a top-p row. Where they hold less mass than asked, the rest is found by summing."""
CANDIDATE_TIERS = (1, 64, NUCLEUS_CANDIDATES, MAX_CANDIDATES)
"""Numbers of candidates a row may send: few different ones, so that a batch needs few calls."""


def sampling_record(params: SamplingParams, index: int, seed: int) -> SamplingRecord:
    """The record of continuation `index` of a request; `seed` where `params` gives none."""
    masks_stops = params.min_tokens > 0 and not params.ignore_eos
    allowed = params.allowed_token_ids
    return SamplingRecord(
        temperature=float(params.temperature),
        top_k=params.top_k,
        top_p=float(params.top_p),
        min_p=float(params.min_p),
        seed=seed if params.seed is None else params.seed,
        index=index,
        repetition_penalty=float(params.repetition_penalty),
        frequency_penalty=float(params.frequency_penalty),
        presence_penalty=float(params.presence_penalty),
        logit_bias=tuple((token, float(bias)) for token, bias in params.logit_bias if bias),
        allowed_token_ids=None if allowed is None else tuple(sorted(set(allowed))),
        banned_token_ids=tuple(sorted(set(params.banned_token_ids))),
        min_tokens=params.min_tokens if masks_stops else 0,
        stop_token_ids=tuple(sorted(set(params.stop_token_ids))) if masks_stops else (),
        num_logprobs=-1 if params.logprobs is None else params.logprobs,
        num_prompt_logprobs=-1 if params.prompt_logprobs is None else params.prompt_logprobs,
    )


def has_penalties(record: SamplingRecord) -> bool:
    """Whether the tokens so far change the logits: the row then needs its history."""
    return (
        record.repetition_penalty != 1
        or record.frequency_penalty != 0
        or record.presence_penalty != 0
    )


def edits_logits(record: SamplingRecord) -> bool:
    """Whether the logits a token is drawn from may differ from the model's."""
    return bool(
        has_penalties(record)
        or record.logit_bias
        or record.allowed_token_ids is not None
        or record.banned_token_ids
        or (record.min_tokens and record.stop_token_ids)
    )


def is_plain_greedy(record: SamplingRecord) -> bool:
    """Whether a row takes the likeliest token of the model's logits and reports nothing else."""
    return record.temperature == 0 and record.num_logprobs < 0 and not edits_logits(record)


def sums_masses(record: SamplingRecord) -> bool:
    """Whether a draw needs the mass of the whole vocabulary; else candidates hold all of it."""
    return record.temperature > 0 and not 0 < record.top_k <= MAX_CANDIDATES


def candidates_of_step(records: Iterable[SamplingRecord]) -> int:
    """Keys that each rank sends for a step's logit rows, beyond one a row."""
    records = list(records)
    found = sum(num_candidates(record) - 1 for record in records)
    reporting = [record.num_logprobs for record in records if record.num_logprobs >= 0]
    return found + len(reporting) * max(1, *reporting) if reporting else found


def num_candidates(record: SamplingRecord) -> int:
    """Likeliest tokens that each rank sends for a row, one of `CANDIDATE_TIERS`."""
    wanted = 1
    if record.temperature > 0:
        if not sums_masses(record):
            wanted = record.top_k
        elif record.top_p < 1:
            wanted = NUCLEUS_CANDIDATES
    return next(tier for tier in CANDIDATE_TIERS if tier >= wanted)
