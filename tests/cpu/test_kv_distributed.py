"""A KV head whose blocks ranks share out gives the logits of one that each rank stores whole: over
families, ranks, chunks, windows, dropped blocks and several sequences."""

import random
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.cpu.thread_ranks import (
    BLOCK,
    NUM_BLOCKS,
    ThreadExchange,
    build_rank,
    run_ranks,
    run_step,
)
from tests.cpu.tiny_models import write_checkpoint
from tpinfer.config.dtypes import DType
from tpinfer.config.huggingface import read_model_spec
from tpinfer.sharding.kv_layout import block_class
from tpinfer.sharding.partition import partition_model
from tpinfer.steps.plan import SamplingRecord, SequenceRecord, StepPlan

LENGTHS = (70, 5, 40)
"""Tokens of the sequences of a run."""
CASES = [
    *(("llama-mqa-bias", tp) for tp in (2, 4, 8)),
    *(("llama-tied-gqa", tp) for tp in (4, 8)),
    *(("mistral-window", tp) for tp in (4, 8)),
    ("qwen3-norms", 8),
    ("qwen2-bias", 4),  # three query heads of a KV head on two ranks: two and one
    ("qwen2-some-layers-slide", 4),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """Directory of a family's checkpoint, written when first asked for."""
    root = tmp_path_factory.mktemp("distributed")
    return cache(lambda name: write_checkpoint(name, root / name))


def steps(group_size: int, window: int | None, seed: int) -> list[StepPlan]:
    """Prompts in chunks of random length beside decodes, every token's logits wanted; blocks in
    random order, each of the class its place asks for, dropped when all layers slide."""
    draw, shuffled = random.Random(seed), random.Random(seed)
    free = [[b for b in range(NUM_BLOCKS) if b % group_size == c] for c in range(group_size)]
    for blocks in free:
        shuffled.shuffle(blocks)
    done, held, dropped = [0] * len(LENGTHS), [[] for _ in LENGTHS], [0] * len(LENGTHS)
    plans: list[StepPlan] = []
    while done != list(LENGTHS):
        parts, fresh, gone = [], [], []
        for row, length in enumerate(LENGTHS):
            count = min(draw.choice((0, 1, 1, 3, 17, 33)), length - done[row])
            if not count:
                continue
            if window is not None:
                first = max(0, done[row] - window + 1) // BLOCK
                if first > dropped[row]:
                    gone.append((row, first - dropped[row]))
                    for block in held[row][: first - dropped[row]]:
                        free[block % group_size].append(block)
                    held[row], dropped[row] = held[row][first - dropped[row] :], first
            wanted = -(-(done[row] + count) // BLOCK) - dropped[row] - len(held[row])
            next_logical = dropped[row] + len(held[row])
            new = [free[block_class(next_logical + i, group_size)].pop(0) for i in range(wanted)]
            held[row] += new
            if new:
                fresh.append((row, *new))
            done[row] += count
            parts.append((row, count))
        if parts:
            rows, counts = zip(*parts, strict=True)
            ones = (1,) * len(parts)
            plans.append(StepPlan(len(plans), rows, counts, ones, tuple(fresh), tuple(gone)))
    return plans


def logits(
    directory: Path, tp: int, kv_layout: str, seed: int, dtype: DType = DType.FLOAT32,
    kv_dtype: DType | None = None,
) -> torch.Tensor:  # fmt: skip
    """All ranks' logits of each step's last tokens, side by side."""
    spec = read_model_spec(directory)
    partition = partition_model(spec, tp, None, kv_layout)  # pyright: ignore[reportArgumentType]
    draw = random.Random(seed)
    prompts = [tuple(draw.randrange(331) for _ in range(length)) for length in LENGTHS]
    all_slide = bool(spec.sliding_layers) and all(spec.sliding_layers)
    plans = steps(partition.kv_group_size, spec.sliding_window if all_slide else None, seed)

    def work(rank: int, exchange: ThreadExchange) -> torch.Tensor:
        program, rows = build_rank(directory, partition, rank, dtype, exchange, kv_dtype)
        for row, prompt in enumerate(prompts):
            rows.admit(SequenceRecord(row, prompt, len(prompt), 0, SamplingRecord()))
        found = []
        for plan in plans:
            found.append(run_step(program, rows, plan).logits.clone())
        return torch.cat(found)

    return torch.cat(run_ranks(tp, work), -1)


@pytest.mark.parametrize(("name", "tp"), CASES)
def test_logits_equal_the_replicated_form(name: str, tp: int, checkpoint) -> None:
    directory = checkpoint(name)
    spec = read_model_spec(directory)
    shared = partition_model(spec, tp, None, "auto")
    assert shared.kv_group_size == tp // spec.num_kv_heads > 1
    for seed in (1, 2):
        expected = logits(directory, tp, "replicated", seed)
        assert expected.isfinite().all()
        found = logits(directory, tp, "auto", seed)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_bfloat16_stays_near(checkpoint) -> None:
    directory = checkpoint("llama-tied-gqa")
    exact = logits(directory, 4, "replicated", 1)
    found = logits(directory, 4, "auto", 1, DType.BFLOAT16)
    plain = logits(directory, 4, "replicated", 1, DType.BFLOAT16)
    assert (found - exact).abs().mean() < 1.5 * (plain - exact).abs().mean()
