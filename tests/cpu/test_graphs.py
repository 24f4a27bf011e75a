"""Recorded decode steps: the tokens are those of steps that run op by op, padding leaves nothing
behind, and what cannot be recorded is not."""

import random
from contextlib import closing
from typing import Any

import pytest
import torch

from tests.cpu.recorded_ops import CallRecorder, PagedTorchAttention
from tpinfer.config.dtypes import DType
from tpinfer.config.engine import EngineConfig
from tpinfer.config.sampling import SamplingParams
from tpinfer.embedded.locate import embedded_model
from tpinfer.engine import rank_engine
from tpinfer.engine.executor import StreamDevice
from tpinfer.engine.requests import GenerationRequest
from tpinfer.launching.seat import Seat
from tpinfer.sharding.kv_layout import KVLayout
from tpinfer.worker import kernels, kv_cache
from tpinfer.worker.graphs import row_counts, shares_of
from tpinfer.worker.record import record_steps

SEAT = Seat(0, 1, 0, 1, "cpu", "graphs", 0, "single")


def spare_layout(*args: int, **_: bool) -> KVLayout:
    return KVLayout(*args, has_spare=True)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> CallRecorder:
    """Engines opened from now on record their steps as a GPU's would."""
    made = CallRecorder()
    assemble = rank_engine.assemble
    monkeypatch.setattr(
        kernels, "load_native_attention", lambda *_: (PagedTorchAttention(), "a test's")
    )
    monkeypatch.setattr(kernels, "load_native_passes", lambda *_: (None, "not recordable"))
    monkeypatch.setattr(kv_cache, "KVLayout", spare_layout)

    def assembled(*args: Any) -> Any:
        assembly = assemble(*args)
        count = assembly.limits.max_num_seqs
        choice = record_steps(assembly.worker, assembly.groups, count, made, lambda _: None)
        assert choice.value == f"for up to {count} rows", choice.reason
        return assembly

    monkeypatch.setattr(rank_engine, "assemble", assembled)
    return made


def requests_of(seed: int, count: int) -> list[GenerationRequest]:
    """Mostly greedy; some sampled, some that want to know more."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        prompt = [draw.randrange(3, 1000) for _ in range(draw.choice((1, 5, 17, 40)))]
        params = SamplingParams(
            temperature=0.9 if number % 7 == 3 else 0.0,
            seed=number,
            logprobs=1 if number % 11 == 5 else None,
            max_tokens=draw.choice((1, 4, 9, 25)),
            ignore_eos=True,
        )
        made.append(GenerationRequest(prompt, params))
    return made


def run(requests: list[GenerationRequest], **settings: Any) -> list[list[int]]:
    config = EngineConfig(
        model_dir=embedded_model(), dtype=DType.FLOAT32, max_model_len=128, max_num_seqs=6,
        **settings,
    )  # fmt: skip
    with closing(rank_engine.open_engine(config, SEAT)) as engine:
        for _ in engine.generate(requests):
            continue
        return [result.outputs[0].token_ids for result in engine.results()]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kv_bytes", [None, 430_000])
def test_tokens_are_those_of_steps_op_by_op(
    depth: int, kv_bytes: int | None, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    """Also where the cache is so small that sequences are put off and come back."""
    asked = requests_of(depth, 24)
    expected = run(asked)
    recorder = request.getfixturevalue("recorder")
    assert run(asked, steps_in_flight=depth, kv_bytes=kv_bytes) == expected
    assert recorder.num_recorded == 2 * len(row_counts(6)), "each size once, in its two parts"
    assert recorder.num_replayed > 20


def test_steps_handed_to_a_stream(recorder: CallRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests_of(5, 12)
    expected = run(asked)
    monkeypatch.setattr(rank_engine, "_device", lambda worker, depth: StreamDevice(worker))
    assert run(asked, steps_in_flight=2) == expected


def test_sampled_rows_replay_the_model_alone(recorder: CallRecorder) -> None:
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=6, ignore_eos=True)
    run([GenerationRequest([5, 6], params)])
    assert recorder.num_replayed == 5, "one step was the prompt's"


def test_who_waits_for_the_host_is_not_recorded() -> None:
    recorder = CallRecorder()
    with pytest.raises(RuntimeError, match="waits for the device inside a recording"):
        recorder.record(lambda _: print(torch.ones(1).item()))


class HostGroup:
    """Stands for one that sums on the host."""

    name, can_record, size = "gloo", False, 2


def test_a_group_on_the_host_is_the_reason() -> None:
    choice = record_steps(None, [HostGroup()], 4, CallRecorder(), print)  # type: ignore[arg-type]
    assert (choice.value, "gloo works on the host" in choice.reason) == ("none", True)


def test_row_counts() -> None:
    assert row_counts(1) == (1,)
    assert row_counts(6) == (1, 2, 4, 6)
    assert row_counts(32) == (1, 2, 4, 8, 16, 24, 32)
    counts = row_counts(256)
    assert counts[-1] == 256 and len(counts) == 23
    for rows in range(9, 257):
        taken = next(count for count in counts if count >= rows)
        assert taken - rows < max(8, rows / 3)


def test_shares_rise_to_one() -> None:
    assert shares_of([1.0, 3.0, 2.9, 4.0]) == [0.25, 0.75, 0.75, 1.0]
    assert shares_of([0.0, 0.0]) == [0.5, 1.0]
