"""The steps before the first request: they fit whatever the limits are; nothing of them stays."""

from contextlib import closing

import pytest

from tests.cpu.test_graphs import SEAT, requests_of
from tpinfer.config.dtypes import DType
from tpinfer.config.engine import EngineConfig
from tpinfer.embedded.locate import embedded_model
from tpinfer.engine import rank_engine
from tpinfer.scheduling.limits import SchedulerLimits
from tpinfer.worker.warm_up import PROMPT_TOKENS, warm_up, warm_up_plans

LIMITS = SchedulerLimits(16, 100, 8, 2048, 4096)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize("num_blocks", [1, 5, 9, 70, 200])
@pytest.mark.parametrize(("num_seqs", "num_tokens", "max_len"), [(8, 2048, 4096), (1, 16, 64),
                                                                 (2, 2, 3), (4, 1, 1)])  # fmt: skip
def test_plans_keep_to_the_limits(
    groups: int, block_size: int, num_blocks: int, num_seqs: int, num_tokens: int, max_len: int
) -> None:
    limits = SchedulerLimits(
        block_size, num_blocks, num_seqs, num_tokens, max_len, num_groups=groups
    )
    plans = warm_up_plans(limits)
    held: dict[int, list[int]] = {}
    lens: dict[int, int] = {}
    for plan in plans:
        assert len(plan.rows) <= num_seqs and sum(plan.num_tokens) <= num_tokens
        for row, *blocks in plan.new_blocks:
            held[row] = blocks
        for row, count, samples in plan.parts():
            assert samples == 1
            lens[row] = lens.get(row, 0) + count
            assert lens[row] <= max_len and -(-lens[row] // block_size) <= len(held[row])
    taken = [block for blocks in held.values() for block in blocks]
    assert len(taken) == len(set(taken)) and all(block < num_blocks for block in taken)
    for blocks in held.values():
        assert [block % groups for block in blocks] == [i % groups for i in range(len(blocks))]


def test_a_prompt_runs_alone_and_beside_a_decode() -> None:
    first, second = warm_up_plans(LIMITS)
    assert (first.num_tokens, second.num_tokens) == ((PROMPT_TOKENS,), (1, PROMPT_TOKENS))


def test_nothing_stays() -> None:
    config = EngineConfig(
        model_dir=embedded_model(), dtype=DType.FLOAT32, max_model_len=128, max_num_seqs=4,
        kv_bytes=430_000,
    )  # fmt: skip
    found = []
    for warms in (False, True):
        with closing(rank_engine.open_engine(config, SEAT)) as engine:
            worker = engine._worker
            if warms:
                assert warm_up(worker, engine._assembly.limits) == 2
                assert not worker.rows.rows and not worker.take_measurements().records
            for _ in engine.generate(requests_of(3, 9)):
                continue
            found.append([result.outputs[0].token_ids for result in engine.results()])
    assert found[0] == found[1]
