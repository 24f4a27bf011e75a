"""The offline API from a plain script, which starts its ranks itself, and under torchrun."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cpu.tpinfer_command import user_environment
from tpinfer import LLM, ConfigError, RankError, SamplingParams
from tpinfer.config.dtypes import DType
from tpinfer.config.huggingface import read_model_spec
from tpinfer.costs.ledger import CostLedger
from tpinfer.embedded.locate import embedded_model
from tpinfer.sharding.partition import partition_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
SCRIPT = """
import os, sys
from tpinfer import LLM, ConfigError, RankError, SamplingParams
params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
with LLM("story", tp=TP, dtype="float32", device="cpu") as llm:
    for _ in range(2):
        for result in llm.generate(["Once upon a time", [5, 6, 7]], params):
            print(result.outputs[0].token_ids, flush=True)
"""


def test_results_come_in_order_with_texts_and_times() -> None:
    with LLM("story", dtype="float32") as llm:
        results = llm.generate(
            ["Once upon a time", [5, 6, 7]], [GREEDY, SamplingParams(temperature=0.9, n=3, seed=1)]
        )
        assert [len(result.outputs) for result in results] == [1, 3]
        first = results[0].outputs[0]
        assert first.text and first.timing and first.timing.ttft_s > 0 and first.attribution
        assert llm.generate("Once upon a time", GREEDY)[0].token_ids == first.token_ids
        samples = [tuple(output.token_ids) for output in results[1].outputs]
        assert len(set(samples)) > 1, "continuations differ"
        assert llm.report is not None and llm.report.num_requests == 1


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([], GREEDY, "there are no prompts"),
        ([1.5], GREEDY, "prompt 1 of 1 is neither text"),
        (["a", "b"], [GREEDY], "1 params for 2 prompts"),
        ([[10**7]], GREEDY, "outside the vocabulary"),
        ([[]], GREEDY, "no tokens"),
        (["a", "b", [10**7]], GREEDY, "prompt 3 of 3: token 10000000"),
        (["a", ""], GREEDY, "prompt 2 of 2: the prompt has no tokens"),
        ("a", SamplingParams(max_tokens=10**6), "--max-model-len"),
    ],
)
def test_wrong_input_is_refused_and_the_engine_goes_on(
    prompts: object, params: object, message: str, llm: LLM
) -> None:
    with pytest.raises(ConfigError, match=message):
        llm.generate(prompts, params)  # pyright: ignore[reportArgumentType]
    assert len(llm.generate("Once", GREEDY)[0].token_ids) == 8


@pytest.fixture(scope="module")
def llm():
    with LLM("story", dtype="float32") as opened:
        yield opened


def test_a_request_may_take_the_whole_cache_and_one_token_more() -> None:
    """The last token is never fed back, so it needs no place in a block; its row must have one."""
    spec = read_model_spec(embedded_model())
    ledger = CostLedger(spec, partition_model(spec, 1), 0, DType.FLOAT32, DType.FLOAT32)
    prompt, params = list(range(5, 30)), SamplingParams(temperature=0.0, max_tokens=8, seed=0)
    room = 2 * 16 * ledger.kv_bytes_per_token
    assert len(prompt) + params.max_tokens == 2 * 16 + 1
    for max_num_seqs in (1, 3):
        with LLM("story", dtype="float32", kv_bytes=room, max_num_seqs=max_num_seqs) as llm:
            results = llm.generate([prompt] * 3, replace(params, ignore_eos=True))
            assert [len(result.token_ids) for result in results] == [8] * 3
            with pytest.raises(ConfigError, match="3 KV blocks of 16 tokens, but the cache has 2"):
                llm.generate([[*prompt, 3]], params)


def test_wrong_settings_name_themselves() -> None:
    with pytest.raises(ConfigError, match="max_num_seq"):
        LLM("story", max_num_seq=3)
    with pytest.raises(ConfigError, match="dtype='int3'"):
        LLM("story", dtype="int3")
    with pytest.raises(ConfigError, match="max_num_seqs"):
        LLM("story", max_num_seq=3)  # the names there are


def test_arrays_are_lists_of_token_ids(llm: LLM) -> None:
    expected = llm.generate([[5, 6, 7]], GREEDY)[0].token_ids
    for prompts in (
        np.array([5, 6, 7]),
        [np.array([5, 6, 7])],
        np.array([[5, 6, 7]]),
        torch.tensor([5, 6, 7]),
        [torch.tensor([5, 6, 7])],
        (5, 6, 7),
    ):
        assert llm.generate(prompts, GREEDY)[0].token_ids == expected  # pyright: ignore[reportArgumentType]


@pytest.mark.ranks
@pytest.mark.parametrize("collective", ["shared_memory", "gloo"])
def test_ranks_of_a_script_meet_and_leave_nothing_behind(collective: str, tmp_path: Path) -> None:
    """Not even where the script never closes the engine."""
    (tmp_path / "script.py").write_text(
        "import os\n"
        "from tpinfer import LLM, SamplingParams\n"
        f"llm = LLM('story', tp=2, dtype='float32', collective='{collective}', wait_timeout_s=20)\n"
        "llm.generate('Once', SamplingParams(max_tokens=2))\n"
        "print([name for name in os.listdir('/dev/shm') if f'tpinfer-{os.getpid()}-' in name])\n"
    )
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=user_environment(), timeout=60,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "[]\n", done.stdout + done.stderr


@pytest.mark.ranks
def test_a_call_that_close_cuts_off_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpinfer.engine.llm.CLOSE_GRACE_S", 0.1)
    llm = LLM("story", tp=2, dtype="float32")
    endless = SamplingParams(max_tokens=400, ignore_eos=True, n=128)
    with ThreadPoolExecutor(1) as thread:
        call = thread.submit(llm.generate, "Once", endless)
        time.sleep(0.2)
        llm.close()
        with pytest.raises(RankError, match="closed while requests ran"):
            call.result(10)


@pytest.mark.ranks
def test_an_asyncio_engine_does_not_share_a_launchers_ranks(tmp_path: Path) -> None:
    """Two ranks that each take requests of their own would answer one with the other's tokens."""
    script = tmp_path / "script.py"
    script.write_text(
        "import asyncio\n"
        "from tpinfer import AsyncEngine\n"
        "from tpinfer.config.errors import ConfigError\n"
        "try:\n"
        "    asyncio.run(AsyncEngine.start('story'))\n"
        "except ConfigError as error:\n"
        "    print(f'refused: {error}', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script)],
        env=user_environment(), timeout=60, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.count("refused: ") == 2, done.stderr
    assert "rank 0 of 2" in done.stdout and "plain python" in done.stdout


@pytest.mark.ranks
def test_a_script_starts_its_ranks_and_torchrun_may_start_them_too(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.replace("TP", "2"))
    alone = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=user_environment(), timeout=60,
        capture_output=True, text=True,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    under = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "script.py"],
        cwd=tmp_path, env=user_environment(), timeout=60, capture_output=True, text=True,
    )  # fmt: skip
    assert under.returncode == 0, under.stderr
    assert alone.stdout == under.stdout
    assert len(alone.stdout.splitlines()) == 4
