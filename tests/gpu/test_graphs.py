"""Recorded decode steps on a GPU: the tokens are those of steps that run op by op."""

import itertools
from contextlib import closing
from typing import Any

import pytest
import torch

from tpinfer.config.dtypes import DType
from tpinfer.config.engine import EngineConfig
from tpinfer.config.sampling import SamplingParams
from tpinfer.embedded.locate import embedded_model
from tpinfer.engine.rank_engine import Engine, open_engine
from tpinfer.engine.requests import GenerationRequest
from tpinfer.launching.seat import Seat
from tpinfer.worker.graphs import CudaRecorder, RecordedSteps

pytestmark = pytest.mark.gpu
SEAT = Seat(0, 1, 0, 1, "cuda:0", "graphs-gpu", 0, "single")


def opened(**settings: Any) -> Engine:
    config = EngineConfig(
        model_dir=embedded_model(), dtype=DType.FLOAT32, max_model_len=128, max_num_seqs=6,
        **settings,
    )  # fmt: skip
    return open_engine(config, SEAT)


def requests() -> list[GenerationRequest]:
    """More than there are rows, of different lengths; one in five draws with a temperature."""
    return [
        GenerationRequest(
            [3 + (number * 37 + place * 11) % 900 for place in range(1 + number % 40)],
            SamplingParams(
                temperature=0.9 * (number % 5 == 3), seed=number, max_tokens=1 + number % 25,
                ignore_eos=True,
            ),
        )
        for number in range(40)
    ]  # fmt: skip


def tokens(**settings: Any) -> list[list[int]]:
    with closing(opened(**settings)) as engine:
        for _ in engine.generate(requests()):
            continue
        return [result.outputs[0].token_ids for result in engine.results()]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_tokens_are_those_of_steps_op_by_op(depth: int) -> None:
    expected = tokens(cuda_graphs=False, steps_in_flight=1)
    assert tokens(steps_in_flight=depth) == expected


def test_tokens_are_the_same_where_the_cache_is_small() -> None:
    """Sequences are put off and come back."""
    expected = tokens(cuda_graphs=False, steps_in_flight=1)
    assert tokens(kv_bytes=430_000) == expected


def test_steps_were_recorded_and_their_ops_have_times() -> None:
    with closing(opened()) as engine:
        worker = engine._worker
        for _ in engine.generate(requests()):
            continue
        recorded = worker._recorded
        assert recorded is not None and len(recorded) == 4, "1, 2, 4 and 6 rows"
        kept = worker.take_measurements().records
        assert kept
        for one in kept:
            ends = one.op_ends_ns
            assert len(ends) == len(worker.program)
            assert one.ops_start_ns <= ends[0]
            assert all(a <= b for a, b in itertools.pairwise(ends))
        for one, two in itertools.pairwise(kept):
            assert two.ops_start_ns >= one.op_ends_ns[-1], "one step runs behind the other"


def test_an_op_that_waits_for_the_device_cannot_be_recorded() -> None:
    device = torch.device("cuda:0")
    number = torch.ones(1, device=device)
    with pytest.raises(RuntimeError):
        CudaRecorder(device).record(lambda _: print(number.item()))
    torch.cuda.synchronize(device)
    assert number.item() == 1, "the device goes on"


def test_shares_of_ops_are_measured_in_a_replay() -> None:
    with closing(opened(cuda_graphs=False)) as engine:
        worker = engine._worker
        steps = RecordedSteps(worker.program, worker.rows, CudaRecorder(worker.device))
        with torch.inference_mode():
            steps.record([2])
            one = steps._steps[0]
        shares = one.model_shares
        assert shares[-1] == pytest.approx(1.0)
        assert all(a <= b for a, b in itertools.pairwise(shares))
        assert len(set(shares)) > len(shares) / 2, "ops take time"
        assert one.num_model_ops + len(one.greedy_shares) == len(worker.program)


def test_the_driver_tells_which_kernels_an_op_recorded() -> None:
    with closing(opened(cuda_graphs=False)) as engine:
        worker = engine._worker
        steps = RecordedSteps(worker.program, worker.rows, CudaRecorder(worker.device))
        with torch.inference_mode():
            steps.record([1])
        nodes = steps.nodes(0)
        assert nodes is not None
        model, draw = nodes.graphs
        ids = [op.id for op in worker.program]
        places = [ids.index(nodes.ops[op]) for op in model.ops if op >= 0]
        assert places == sorted(places), "kernels come in the program's order"
        assert {"layers.0.attn.core", "layers.1.mlp.down", "head"} <= set(nodes.ops)
        first = [op for op in model.ops if op >= 0 and nodes.ops[op].startswith("layers.1.")]
        assert 5 <= len(first) <= 9
        assert "sample" in {nodes.ops[op] for op in draw.ops if op >= 0}
