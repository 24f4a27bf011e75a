"""What a request changes of the logits before a token is drawn, on a rank's own columns.

In vLLM's order (vllm/v1/sample/sampler.py): allowed tokens, banned tokens, stop tokens before
min_tokens, bias, repetition, frequency and presence penalty. Temperature and filters come later.
"""

import torch

from tpinfer.layers.step_inputs import SamplingRow
from tpinfer.steps.sampling_record import has_penalties


def edit_logits(logits_V: torch.Tensor, row: SamplingRow, first: int) -> None:
    """Change one row of local logits, float32 [V], in place; its token ids begin at `first`."""
    record, width = row.record, logits_V.shape[0]
    # One more column takes what belongs to other ranks, so that nothing has to be counted first.
    wide = torch.cat((logits_V, logits_V.new_zeros(1)))

    def columns(token_ids: torch.Tensor) -> torch.Tensor:
        local = token_ids - first
        return local.masked_fill_((local < 0) | (local >= width), width)

    def ids(values: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=wide.device)

    if record.allowed_token_ids is not None:
        places = columns(ids(record.allowed_token_ids))
        kept = wide[places]
        wide.fill_(float("-inf"))[places] = kept
    if record.banned_token_ids:
        wide[columns(ids(record.banned_token_ids))] = float("-inf")
    if row.position - row.num_prompt_tokens < record.min_tokens and record.stop_token_ids:
        wide[columns(ids(record.stop_token_ids))] = float("-inf")
    if record.logit_bias:
        tokens, biases = zip(*record.logit_bias, strict=True)
        wide.index_add_(0, columns(ids(tokens)), wide.new_tensor(biases))
    if has_penalties(record):
        _penalize(wide, row, columns(row.token_ids))
    logits_V.copy_(wide[:-1])


def _penalize(wide: torch.Tensor, row: SamplingRow, places: torch.Tensor) -> None:
    """Repetition over prompt and generated tokens (Keskar et al. 2019, section 4.1, with the sign
    rule that transformers and vLLM share), frequency and presence over the generated ones (as
    OpenAI's API defines them). `places` are the columns of the row's tokens, int64 [position].

    A token that occurs twice is written twice with the same value.
    """
    record = row.record
    if record.repetition_penalty != 1:
        found, penalty = wide[places], record.repetition_penalty
        wide[places] = torch.where(found > 0, found / penalty, found * penalty)
    generated = places[row.num_prompt_tokens :]
    if (record.frequency_penalty or record.presence_penalty) and generated.shape[0]:
        counts = torch.zeros_like(wide).index_add_(
            0, generated, wide.new_ones(()).expand(generated.shape[0])
        )
        change = record.frequency_penalty * counts[generated] + record.presence_penalty
        wide[generated] = wide[generated] - change
