"""The sequences a rank holds, one per row, and how a `StepPlan` becomes the tensors of a step.

A rank keeps each row's tokens and block table itself; the plan brings only what is new.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from tpinfer.attention.interface import SequenceSpan
from tpinfer.attention.paged_kv import BlockTable, KeyRange, key_range
from tpinfer.costs.ops import StepAggregates, aggregate
from tpinfer.layers.step_inputs import PromptRow, SamplingRow, StepInputs
from tpinfer.steps.plan import SequenceRecord, StepPlan
from tpinfer.steps.sampling_record import (
    candidates_of_step,
    has_penalties,
    is_plain_greedy,
    sums_masses,
)


@dataclass(slots=True)
class Row:
    """One live sequence."""

    record: SequenceRecord
    token_ids: list[int]
    """Prompt and what was generated so far."""
    num_computed: int = 0
    """Tokens whose keys and values are in the cache."""
    table: BlockTable = field(default_factory=lambda: BlockTable([]))


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """cos and sin of every position, each [positions, D]; see `layers.rotary`."""

    cos: torch.Tensor
    sin: torch.Tensor


class RowStore:
    """Rows by number, and the inputs of the next step made from them."""

    def __init__(
        self,
        block_size: int,
        window: int | None,
        all_layers_slide: bool,
        rotary: RotaryTable,
        device: torch.device,
    ) -> None:
        self.rows: dict[int, Row] = {}
        self._block_size = block_size
        self._window = window
        self._all_layers_slide = all_layers_slide
        self._rotary = rotary
        self._device = device

    def admit(self, record: SequenceRecord) -> None:
        """Open a row for a new sequence."""
        self.rows[record.row] = Row(record, list(record.token_ids), record.num_computed)

    def release(self, rows: tuple[int, ...]) -> None:
        """Forget rows whose sequence has ended."""
        for row in rows:
            self.rows.pop(row, None)

    def aggregates(self, plan: StepPlan) -> StepAggregates:
        """The sums that the costs of `plan`'s step depend on."""
        sampling = [self.rows[row].record.sampling for row, _, samples in plan.parts() if samples]
        prompts = [
            (num_targets, row.record.sampling.num_prompt_logprobs)
            for row, start, stop in self._spans_of(plan)
            if (num_targets := _num_prompt_targets(row, start, stop))
        ]
        return aggregate(
            plan.num_tokens,
            [self.rows[row].num_computed + count for row, count, _ in plan.parts()],
            num_logit_rows=len(sampling),
            num_full_rows=sum(sums_masses(record) for record in sampling),
            window=self._window,
            num_candidates=candidates_of_step(sampling),
            num_logprob_rows=sum(record.num_logprobs >= 0 for record in sampling),
            prompt_targets=prompts,
        )

    def _spans_of(self, plan: StepPlan) -> Iterator[tuple[Row, int, int]]:
        """Each row with the positions it computes."""
        for number, num_tokens, _ in plan.parts():
            row = self.rows[number]
            yield row, row.num_computed, row.num_computed + num_tokens

    def build(self, plan: StepPlan) -> StepInputs:
        """The tensors of `plan`'s step. Changes block tables, not tokens."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        logit_rows: list[int] = []
        spans: list[SequenceSpan] = []
        sampling: list[SamplingRow] = []
        prompt_rows: list[PromptRow] = []
        for number, count in plan.dropped_blocks:
            self.rows[number].table.drop(count)
        for number, *blocks in plan.new_blocks:
            self.rows[number].table.append(blocks)
        for number, num_tokens, num_samples in plan.parts():
            row = self.rows[number]
            start, stop = row.num_computed, row.num_computed + num_tokens
            spans.append(self._span(row, len(tokens), start, stop))
            if num_targets := _num_prompt_targets(row, start, stop):
                targets = row.token_ids[start + 1 : start + 1 + num_targets]
                num_top = row.record.sampling.num_prompt_logprobs
                prompt_rows.append(PromptRow(len(tokens), self._ids(targets), num_top))
            tokens += row.token_ids[start:stop]
            positions += range(start, stop)
            slots += row.table.slots(start, stop, self._block_size)
            if num_samples:
                logit_rows.append(len(tokens) - 1)
                sampling.append(self._sampling(row, stop))
        inputs = self._inputs(tokens, positions, slots, spans, logit_rows, sampling)
        return replace(inputs, prompt_rows=prompt_rows) if prompt_rows else inputs

    def commit(self, plan: StepPlan, sampled: list[int]) -> None:
        """Record that `plan` ran and what its sampling rows drew, in plan order."""
        drawn = iter(sampled)
        for number, num_tokens, num_samples in plan.parts():
            row = self.rows[number]
            row.num_computed += num_tokens
            if num_samples:
                row.token_ids.append(next(drawn))

    def _inputs(
        self,
        tokens: list[int],
        positions: list[int],
        slots: list[int],
        spans: list[SequenceSpan],
        logit_rows: list[int],
        sampling: list[SamplingRow],
    ) -> StepInputs:
        # One transfer carries the three columns.
        packed = torch.tensor((tokens, positions, slots), dtype=torch.int64, device=self._device)
        token_ids, where, slot_ids = packed.unbind(0)
        return StepInputs(
            token_ids=token_ids,
            positions=where,
            slots=slot_ids,
            cos=self._rotary.cos.index_select(0, where).unsqueeze(1),
            sin=self._rotary.sin.index_select(0, where).unsqueeze(1),
            spans=spans,
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64, device=self._device),
            sampling=sampling,
            all_greedy=all(is_plain_greedy(row.record) for row in sampling),
        )

    def _sampling(self, row: Row, position: int) -> SamplingRow:
        record = row.record
        history = row.token_ids[:position] if has_penalties(record.sampling) else []
        return SamplingRow(record.sampling, position, self._ids(history), record.num_prompt_tokens)

    def _ids(self, token_ids: list[int]) -> torch.Tensor:
        return torch.tensor(token_ids, dtype=torch.int64, device=self._device)

    def _span(self, row: Row, first_token: int, start: int, stop: int) -> SequenceSpan:
        window_keys = None
        if self._window is not None:
            window_keys = self._keys(row, max(0, start - self._window + 1), stop)
        keys = window_keys if window_keys and self._all_layers_slide else self._keys(row, 0, stop)
        return SequenceSpan(first_token, stop - start, stop, keys, window_keys)

    def _keys(self, row: Row, start: int, stop: int) -> KeyRange:
        return key_range(row.table, start, stop, self._block_size, self._device)


def _num_prompt_targets(row: Row, start: int, stop: int) -> int:
    """How many prompt tokens the logits of positions `start` to `stop` predict, where their
    log-probabilities are wanted."""
    if row.record.sampling.num_prompt_logprobs < 0:
        return 0
    return max(0, min(stop, row.record.num_prompt_tokens - 1) - start)
