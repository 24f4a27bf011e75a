"""`tpinfer plan calibrate`: its table never shows in-sample error alone, and `--traits` finds what
belongs to the machine."""

import json
from pathlib import Path

import pytest

from tpinfer.cli.main import main
from tpinfer.cli.plan_calibrate import traits_in
from tpinfer.config.errors import ConfigError
from tpinfer.planner.traits import Traits, write_traits

HEAD = (
    "source_repo_or_url,commit_date,system,model,gpu,n_gpus,tp,pp,precision,isl,osl,"
    "concurrency_or_batch,metric,value,notes\n"
)


def rows() -> str:
    """Made-up points of one model on 1, 2 and 4 H100."""
    return "".join(
        f"here,2026,vLLM 0.11,Llama-3.1-8B,H100,{tp},{tp},1,bf16,1024,1024,c={load},TPOT ms,"
        f"{7.0 / tp**0.8 + 0.06 * load / tp},\n"
        for tp in (1, 2, 4)
        for load in (4, 16, 64)
    )


def grouped(*names: str) -> str:
    """A file of plan calibrate with these groups."""
    groups = [{"traits": json.loads(write_traits(Traits(name=name, memory=0.9)))} for name in names]
    return json.dumps({"groups": groups})


def test_errors_of_unseen_points_stand_beside_the_fit(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    table, traits = tmp_path / "measured.csv", tmp_path / "traits.json"
    table.write_text(HEAD + rows())
    assert main(["plan", "calibrate", str(table), "--json", str(traits)]) == 0
    out = capsys.readouterr().out
    assert "fitted  other TP  inside  other model  inside" in out
    (group,) = json.loads(traits.read_text())["groups"]
    assert group["traits"]["name"] == "h100-sxm-80g/vllm/bf16" and group["num_points"] == 9
    held = group["held_out"]["tp"]
    assert set(held["by_fold"]) == {"tp=1", "tp=2", "tp=4"} and held["median_error"] >= 0
    call = ["plan", "--model", "llama-3.1-8b", "--topology", "dgx-h100", "--tp", "1"]
    call += ["--input-len", "64", "--output-len", "8", "--concurrency", "2"]
    assert main([*call, "--traits", str(traits)]) == 0
    assert "Mode calibrated" in capsys.readouterr().out


def test_one_record_is_taken_as_it_is() -> None:
    written = write_traits(Traits(name="mine", compute=0.5))
    assert traits_in(written, "f", {"x"}, "bf16", None).compute == 0.5


def test_the_group_of_device_and_precision_is_taken() -> None:
    text = grouped("h100-sxm-80g/vllm/bf16", "h100-sxm-80g/vllm/fp8", "l40s/vllm/bf16")
    found = traits_in(text, "f", {"h100-sxm-80g"}, "fp8", None)
    assert found.name == "h100-sxm-80g/vllm/fp8" and found.memory == 0.9


@pytest.mark.parametrize(
    ("text", "engine", "words"),
    [
        (grouped("a/vllm/bf16", "a/trtllm/bf16"), None, "say which with --engine"),
        (grouped("a/vllm/bf16"), "sglang", "f has nothing for a in bf16 by sglang; it has a/vllm"),
        (grouped("b/vllm/bf16"), None, "f has nothing for a in bf16; it has b/vllm/bf16"),
        (grouped(), None, "it has no groups"),
        ("{", None, "f is not JSON"),
        ('{"groups": [{}]}', None, "groups without traits"),
        ('{"groups": 3}', None, "groups without traits"),
        ('{"memory": -1}', None, "memory is -1.0; it must be above 0"),
    ],
)
def test_traits_that_cannot_be_taken(text: str, engine: str | None, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        traits_in(text, "f", {"a"}, "bf16", engine)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["calibrate"], "'calibrate' is not understood"),
        (["calibrate", "a", "b"], "'calibrate a b' is not understood"),
        (["something"], "'something' is not understood; plans take flags alone"),
        (["calibrate", "absent.csv"], "absent.csv"),
    ],
)
def test_calls_that_say_nothing(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["plan", *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
