"""The sequences a rank holds, one per row, and how a `StepPlan` becomes the tensors of a step.

A rank keeps each row's block table itself; the plan brings only what is new. Rows persist from step
to step, tokens stay on the device, and a step's columns are gathered into buffers that are made
once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from tpinfer.attention.interface import PagedSpans, SequenceSpan, StepSpans
from tpinfer.attention.paged_kv import BlockTable, KeyRange, key_range
from tpinfer.costs.ops import StepAggregates, aggregate
from tpinfer.layers.step_inputs import PromptRow, SamplingRow, StepInputs
from tpinfer.sharding.kv_layout import KVLayout
from tpinfer.steps.plan import SequenceRecord, StepPlan
from tpinfer.steps.sampling_record import (
    candidates_of_step,
    has_penalties,
    is_plain_greedy,
    sums_masses,
)
from tpinfer.worker.paged_rows import NUM_COLUMNS, PagedRows
from tpinfer.worker.staging import Staging
from tpinfer.worker.token_buffer import TokenBuffer


@dataclass(slots=True)
class Row:
    """One live sequence."""

    record: SequenceRecord
    num_computed: int
    """Tokens whose keys and values are in the cache once the steps issued so far have run."""
    table: BlockTable = field(default_factory=lambda: BlockTable([]))


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """cos and sin of every position, each [positions, D]; see `layers.rotary`."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, slots=True)
class RowLimits:
    """What rows may hold."""

    max_num_rows: int
    max_num_tokens: int
    """Query tokens of one step."""
    max_len: int
    """Tokens of one sequence."""
    layout: KVLayout
    window: int | None
    """Sliding window of the layers that slide; None where none does."""
    all_layers_slide: bool
    is_paged: bool = False
    """Whether attention reads block tables on the device."""
    steps_in_flight: int = 1
    """Steps that may be issued to a device before the first of them has run."""


@dataclass(slots=True)
class _Gathered:
    """A step's columns and sequences on the host."""

    columns: tuple[list[int], ...] = field(default_factory=lambda: ([], [], [], [], []))
    """Token addresses, positions, slots, logit rows, and where drawn tokens go."""
    spans: list[SequenceSpan] = field(default_factory=list)
    sampling: list[SamplingRow] = field(default_factory=list)
    prompt_rows: list[PromptRow] = field(default_factory=list)


class RowStore:
    """Rows by number, and the inputs of the next step made from them."""

    def __init__(self, limits: RowLimits, rotary: RotaryTable, device: torch.device) -> None:
        self.rows: dict[int, Row] = {}
        self._limits = limits
        self._rotary = rotary
        self.device = device
        self._tokens = TokenBuffer(limits.max_num_rows, limits.max_len, device)
        self._paged: PagedRows | None = None
        if limits.is_paged:
            self._paged = PagedRows(limits.max_num_rows, limits.max_len, limits.layout, device)
        # One transfer carries a step's columns: token addresses, positions, slots, logit rows and
        # where sampled tokens go; then those of the paged rows.
        count = 5 + NUM_COLUMNS * limits.is_paged
        shape = count, max(limits.max_num_tokens, limits.max_num_rows) + 1
        self._staging = Staging(shape, device, limits.steps_in_flight + 1)
        self._columns = self._staging.columns

    def admit(self, record: SequenceRecord) -> None:
        """Open a row for a sequence, new or come back after a preemption."""
        self.rows[record.row] = Row(record, record.num_computed)
        self._tokens.fill(record.row, record.token_ids)

    def release(self, rows: tuple[int, ...]) -> None:
        """Forget rows whose sequence has ended or waits again."""
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
            window=self._limits.window,
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
        """The tensors of `plan`'s step; rows move on by its tokens."""
        self._take_blocks(plan)
        made = self._gather(plan)
        columns = self._transfer(made.columns, self._sequences(plan.rows, made))
        paged = self._placed(columns[5:], made.spans)
        inputs = self._inputs(columns[:5], StepSpans(made.spans, paged), made.sampling)
        return replace(inputs, prompt_rows=made.prompt_rows) if made.prompt_rows else inputs

    def can_record(self, plan: StepPlan) -> bool:
        """Whether a recorded step can run `plan`: every row feeds one token and draws the next, and
        nobody asks about prompts."""
        return all(
            count == 1
            and num_samples == 1
            and not _num_prompt_targets(
                row := self.rows[number], row.num_computed, row.num_computed + 1
            )
            for number, count, num_samples in plan.parts()
        )

    def stage(self, plan: StepPlan | None, num_rows: int) -> list[SamplingRow]:
        """Have the columns of `plan`'s step, which `can_record`, where a step recorded for
        `num_rows` rows reads them; rows move on by their tokens. Rows that the plan has not are
        padding, all of them where there is no plan: they attend to nothing and leave nothing. How
        the plan's rows draw is returned."""
        assert self._paged is not None, "recorded steps find their keys by block tables"
        if plan is not None:
            self._take_blocks(plan)
        made = self._gather(plan) if plan is not None else _Gathered()
        count = num_rows - len(made.spans)
        spare = self._tokens.spare_address
        fillers = spare, 0, self._limits.layout.spare_slot, None, spare
        for column, filler in zip(made.columns, fillers, strict=True):
            start = len(column)
            column += range(start, num_rows) if filler is None else [filler] * count
        rows = (*(plan.rows if plan is not None else ()), *[0] * count)
        context_lens = [span.context_len for span in made.spans] + [0] * count
        sequences = self._paged.columns(rows, range(num_rows + 1), context_lens)
        columns = self._transfer(made.columns, sequences)
        self._paged.place_tables(*columns[8:])
        return made.sampling

    def drawing_inputs(self, sampling: list[SamplingRow]) -> StepInputs:
        """For the ops behind the logits alone, of the rows that `stage` was given last."""
        addresses, positions, slots, logit_rows, drawn = self._columns[:5, : len(sampling)]
        none = self._rotary.cos[:0]
        return StepInputs(
            addresses, positions, slots, none, none, StepSpans(()), logit_rows, drawn, sampling,
            all_greedy=False,
        )  # fmt: skip

    def recorded_inputs(self, num_rows: int) -> StepInputs:
        """The inputs of what was staged for `num_rows` rows, by ops that are recorded with the
        step: they find the next step's columns where they found these."""
        assert self._paged is not None, "recorded steps find their keys by block tables"
        columns = [self._columns[place, :num_rows] for place in range(5)]
        sequences = [self._columns[5 + i, : num_rows + (i == 1)] for i in range(3)]
        self._paged.place_sequences(sequences)
        paged = self._paged.spans(num_rows, 1, self._limits.max_len)
        return self._inputs(columns, StepSpans((), paged), [])

    def _take_blocks(self, plan: StepPlan) -> None:
        for number, count in plan.dropped_blocks:
            self.rows[number].table.drop(count)
        for number, *blocks in plan.new_blocks:
            table = self.rows[number].table
            if self._paged is not None:
                self._paged.append(number, table.num_dropped + len(table.blocks), blocks)
            table.append(blocks)

    def _gather(self, plan: StepPlan) -> "_Gathered":
        made = _Gathered()
        addresses, positions, slots, logit_rows, drawn = made.columns
        for number, num_tokens, num_samples in plan.parts():
            row = self.rows[number]
            start, stop = row.num_computed, row.num_computed + num_tokens
            if num_targets := _num_prompt_targets(row, start, stop):
                targets = self._tokens.row(number, start + 1 + num_targets)[start + 1 :]
                num_top = row.record.sampling.num_prompt_logprobs
                told = PromptRow(number, start + 1, len(addresses), targets, num_top)
                made.prompt_rows.append(told)
            made.spans.append(self._span(row, len(addresses), start, stop))
            first = self._tokens.address(number, start)
            addresses += range(first, first + num_tokens)
            positions += range(start, stop)
            slots += row.table.slots(start, stop, self._limits.layout)
            if num_samples:
                logit_rows.append(len(addresses) - 1)
                drawn.append(first + num_tokens)
                made.sampling.append(self._sampling(row, number, stop))
            row.num_computed = stop
        return made

    def keep_tokens(self, inputs: StepInputs, tokens: torch.Tensor) -> None:
        """Put int64 [R] sampled tokens behind the rows they were drawn for."""
        # A row that ends here may have a place in the next step already: it feeds some token.
        self._tokens.write(inputs.drawn, tokens.clamp(min=0))

    def _sequences(self, rows: Sequence[int], made: "_Gathered") -> tuple[list[int], ...]:
        if self._paged is None:
            return ()
        first_tokens = [*(span.first_token for span in made.spans), len(made.columns[0])]
        context_lens = [span.context_len for span in made.spans]
        return self._paged.columns(rows, first_tokens, context_lens)

    def _transfer(
        self, columns: Sequence[list[int]], sequences: Sequence[list[int]]
    ) -> list[torch.Tensor]:
        """The step's columns on the device, int64 each."""
        return self._staging.transfer((*columns, *sequences))

    def _placed(
        self, columns: list[torch.Tensor], spans: Sequence[SequenceSpan]
    ) -> PagedSpans | None:
        if self._paged is None:
            return None
        self._paged.place_sequences(columns[:3])
        self._paged.place_tables(*columns[3:])
        return self._paged.spans(
            len(spans),
            max((span.num_tokens for span in spans), default=0),
            max((span.context_len for span in spans), default=0),
        )

    def _inputs(
        self, columns: list[torch.Tensor], spans: StepSpans, sampling: list[SamplingRow]
    ) -> StepInputs:
        addresses, positions, slots, logit_rows, drawn = columns
        return StepInputs(
            token_ids=self._tokens.read(addresses),
            positions=positions,
            slots=slots,
            cos=self._rotary.cos.index_select(0, positions).unsqueeze(1),
            sin=self._rotary.sin.index_select(0, positions).unsqueeze(1),
            spans=spans,
            logit_rows=logit_rows,
            drawn=drawn,
            sampling=sampling,
            all_greedy=all(is_plain_greedy(row.record) for row in sampling),
        )

    def _span(self, row: Row, first_token: int, start: int, stop: int) -> SequenceSpan:
        window, window_keys = self._limits.window, None
        if window is not None:
            window_keys = self._keys(row, max(0, start - window + 1), stop)
        slides = window_keys is not None and self._limits.all_layers_slide
        keys = window_keys if window_keys and slides else self._keys(row, 0, stop)
        return SequenceSpan(first_token, stop - start, stop, keys, window_keys)

    def _keys(self, row: Row, start: int, stop: int) -> KeyRange:
        return key_range(row.table, start, stop, self._limits.layout)

    def _sampling(self, row: Row, number: int, position: int) -> SamplingRow:
        record = row.record
        history = self._tokens.row(number, position if has_penalties(record.sampling) else 0)
        return SamplingRow(record.sampling, position, history, record.num_prompt_tokens)


def _num_prompt_targets(row: Row, start: int, stop: int) -> int:
    """How many prompt tokens the logits of positions `start` to `stop` predict, where their
    log-probabilities are wanted."""
    if row.record.sampling.num_prompt_logprobs < 0:
        return 0
    return max(0, min(stop, row.record.num_prompt_tokens - 1) - start)
