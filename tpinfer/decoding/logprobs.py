"""Log-probabilities of drawn tokens and of prompt tokens, under the model's own distribution (what
vLLM calls `raw_logprobs`): before penalties, masks, biases and temperature.

No rank gathers whole rows: the largest logits travel as keys, and the sum of exponentials as a
whole number of masses. So a log-probability is the same bits for any cut of the vocabulary; its
error is at most V * 2**-42 of the sum, 4e-8 nats at 152k tokens.

Letters: L rows, V local vocabulary, K reported tokens, P ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import torch

from tpinfer.costs.ops import PROMPT_ROWS_A_PASS
from tpinfer.decoding.mass_draw import Columns
from tpinfer.decoding.masses import MASS_BITS, Scale
from tpinfer.decoding.ordered_keys import (
    NAN_KEY,
    NO_KEY,
    key_ids,
    key_values,
    make_keys,
    merge_keys,
    top_keys,
)
from tpinfer.decoding.search import Gather
from tpinfer.decoding.vocab_passes import VocabPasses
from tpinfer.layers.embedding import AnyLogits
from tpinfer.layers.step_inputs import Activations, PromptRow, StepInputs
from tpinfer.steps.logprobs import TokenLogprobs


@dataclass(slots=True)
class RawRows:
    """Rows of unchanged logits and what all ranks together know of them."""

    logits: torch.Tensor
    """float32 [L, V]."""
    keys: torch.Tensor
    """int64 [L, K]: the likeliest of all ranks, K at least 1."""
    total: torch.Tensor
    """int64 [L]: mass of all ranks."""

    def local_mass(self, passes: VocabPasses) -> torch.Tensor:
        """int64 [L]: this rank's mass, relative to the likeliest key's logit."""
        highest = key_values(self.keys[:, :1])
        ones = torch.ones_like(highest)
        scale = Scale(highest, ones, torch.zeros_like(ones), 0.0)
        rows = range(self.logits.shape[0])
        return passes.local_sums(self.logits, rows, scale, 0).sum(-1)

    def owned_keys(self, tokens: torch.Tensor, first: int) -> torch.Tensor:
        """int64 [L]: the keys of tokens whose logits this rank has, NO_KEY elsewhere."""
        width = self.logits.shape[1]
        local = tokens - first
        is_here = (local >= 0) & (local < width)
        local = local.clamp(0, width - 1).unsqueeze(1)
        found = make_keys(self.logits.gather(1, local).squeeze(1), tokens)
        return found.masked_fill_(~is_here, NO_KEY)

    def describe(self, token_keys: torch.Tensor, counts: Sequence[int]) -> list[TokenLogprobs]:
        """What is reported of each row's token and of its `counts` likeliest ones."""
        highest = key_values(self.keys[:, :1]).double()
        together = torch.cat((token_keys.unsqueeze(1), self.keys), 1)
        offset = torch.log(self.total.double()).unsqueeze(1) - MASS_BITS * log(2)
        values = (key_values(together).double() - highest - offset).tolist()
        ids = key_ids(together).tolist()
        return [
            TokenLogprobs(
                token_id=row_ids[0],
                logprob=row_values[0],
                top_token_ids=tuple(row_ids[1 : 1 + count]),
                top_logprobs=tuple(row_values[1 : 1 + count]),
            )
            for row_ids, row_values, count in zip(ids, values, counts, strict=True)
        ]


def take_raw_rows(logits_RV: torch.Tensor, rows: Sequence[int]) -> RawRows:
    """A copy of some rows, before requests change them."""
    copied = logits_RV[torch.tensor(rows, device=logits_RV.device)]
    empty = torch.empty(0, dtype=torch.int64, device=logits_RV.device)
    return RawRows(copied, empty, empty)


def prompt_logprobs(
    acts: Activations, step: StepInputs, any_logits: AnyLogits, columns: Columns, gather: Gather
) -> list[list[TokenLogprobs]]:
    """Log-probabilities of the step's prompt tokens, by prompt row. A collective call.

    A few rows of logits are made at a time, so that memory does not grow with the prompt.
    """
    device = step.token_ids.device
    places = [
        torch.arange(row.first_token, row.first_token + row.target_ids.shape[0], device=device)
        for row in step.prompt_rows
    ]
    tokens, targets = torch.cat(places), torch.cat([row.target_ids for row in step.prompt_rows])
    counts = [row.num_top for row in step.prompt_rows for _ in range(row.target_ids.shape[0])]
    found: list[TokenLogprobs] = []
    for start in range(0, len(counts), PROMPT_ROWS_A_PASS):
        stop = start + PROMPT_ROWS_A_PASS
        logits = any_logits(acts, tokens[start:stop])
        wanted = counts[start:stop]
        found += _describe_chunk(logits, targets[start:stop], wanted, columns, gather)
    return _split(found, step.prompt_rows)


def _describe_chunk(
    logits: torch.Tensor, targets: torch.Tensor, counts: list[int], columns: Columns, gather: Gather
) -> list[TokenLogprobs]:
    num_top, first = max(1, *counts), columns.first
    raw = RawRows(logits, targets, targets)
    mine = top_keys(logits, first, num_top)
    everyone = gather(torch.cat((mine, raw.owned_keys(targets, first).unsqueeze(1)), 1))
    raw.keys = merge_keys(everyone[:, :, :num_top])
    raw.total = gather(raw.local_mass(columns.passes)).sum(0)
    is_damaged = raw.keys[:, 0] == NAN_KEY
    token_keys = everyone[:, :, num_top].amax(0).masked_fill_(is_damaged, NAN_KEY)
    reported = raw.describe(token_keys, counts)
    return [
        TokenLogprobs(target, one.logprob, one.top_token_ids, one.top_logprobs)
        for target, one in zip(targets.tolist(), reported, strict=True)
    ]


def _split(found: list[TokenLogprobs], rows: Sequence[PromptRow]) -> list[list[TokenLogprobs]]:
    remaining = iter(found)
    return [[next(remaining) for _ in range(row.target_ids.shape[0])] for row in rows]
