"""Block tables on the device say where every key lies, exactly as the spans of the host do."""

import random

import pytest
import torch

from tests.cpu.thread_ranks import CPU
from tpinfer.attention.interface import PagedSpans, SequenceSpan
from tpinfer.sharding.kv_layout import KVLayout
from tpinfer.steps.plan import SamplingRecord, SequenceRecord, StepPlan
from tpinfer.worker.rows import RotaryTable, RowLimits, RowStore

BLOCK, NUM_BLOCKS, NUM_ROWS, LONGEST, MOST_TOKENS = 4, 96, 5, 60, 48


def slots_by_table(paged: PagedSpans, place: int, span: SequenceSpan) -> list[int]:
    """What a kernel would read for a sequence of the step, from its buffers alone."""
    layout = span.keys.layout
    table = paged.block_tables_RB[int(paged.rows_S[place])]
    return [
        int(table[logical // layout.group_size]) * BLOCK + position % BLOCK
        for position in range(span.keys.start, int(paged.context_lens_S[place]))
        if layout.holds_logical(logical := position // BLOCK)
    ]


def slots_by_runs(span: SequenceSpan) -> list[int]:
    return [slot for first, count in span.keys.runs for slot in range(first, first + count)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("group", "place"), [(1, 0), (2, 0), (2, 1), (3, 1)])
@pytest.mark.parametrize("window", [None, 7])
def test_tables_agree_with_spans(seed: int, group: int, place: int, window: int | None) -> None:
    draws = random.Random(seed)
    layout = KVLayout(BLOCK, NUM_BLOCKS, group, place)
    slides = window is not None
    limits = RowLimits(NUM_ROWS, MOST_TOKENS, LONGEST, layout, window, slides, is_paged=True)
    table = torch.zeros(LONGEST, 8)
    store = RowStore(limits, RotaryTable(table, table), CPU)
    free = {c: [b for b in range(NUM_BLOCKS) if b % group == c] for c in range(group)}
    lengths: dict[int, tuple[int, int]] = {}  # computed, blocks
    address = None
    for step in range(30):
        released = tuple(row for row in lengths if draws.random() < 0.1)
        for row in released:
            del lengths[row]
        store.release(released)
        for row in set(range(NUM_ROWS)) - set(lengths):
            if draws.random() < 0.5:
                cached = draws.randrange(0, 30)
                record = SequenceRecord(row, tuple(range(1, 40)), 39, cached, SamplingRecord())
                store.admit(record)
                lengths[row] = cached, 0
        chosen = [row for row in lengths if lengths[row][0] < LONGEST - 9]
        if not chosen:
            continue
        counts = [draws.randrange(1, 9) for _ in chosen]
        new = []
        for row, count in zip(chosen, counts, strict=True):
            computed, held = lengths[row]
            wanted = -(-(computed + count) // BLOCK)
            blocks = [draws.choice(free[j % group]) for j in range(held, wanted)]
            if blocks:
                new.append((row, *blocks))
            lengths[row] = computed + count, wanted
        plan = StepPlan(
            step, tuple(chosen), tuple(counts), (1,) * len(chosen), new_blocks=tuple(new)
        )
        inputs = store.build(plan)
        paged = inputs.spans.paged
        assert paged is not None
        assert paged.num_sequences == len(chosen) == paged.rows_S.shape[0]
        assert paged.max_query_len == max(counts)
        assert paged.max_context_len == max(span.context_len for span in inputs.spans.sequences)
        assert paged.first_tokens_S1.tolist() == [sum(counts[:i]) for i in range(len(counts) + 1)]
        for i, span in enumerate(inputs.spans.sequences):
            assert slots_by_table(paged, i, span) == slots_by_runs(span)
        now = paged.block_tables_RB.data_ptr(), paged.rows_S.data_ptr()
        assert address in (None, now), "a recorded step would look where they were"
        address = now


def test_more_new_blocks_than_a_step_has_tokens() -> None:
    layout = KVLayout(1, NUM_BLOCKS)
    limits = RowLimits(1, 4, LONGEST, layout, None, False, is_paged=True)
    table = torch.zeros(LONGEST, 8)
    store = RowStore(limits, RotaryTable(table, table), CPU)
    store.admit(SequenceRecord(0, tuple(range(50)), 50, 49, SamplingRecord()))
    blocks = tuple(reversed(range(50)))
    inputs = store.build(StepPlan(0, (0,), (1,), (1,), new_blocks=((0, *blocks),)))
    assert inputs.spans.paged is not None
    assert tuple(inputs.spans.paged.block_tables_RB[0, :50].tolist()) == blocks
