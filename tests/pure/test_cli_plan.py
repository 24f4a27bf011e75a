"""`tpinfer plan` as people meet it: its text, its JSON, its page, what it says of mistakes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tpprof.errors import TraceError
from tpprof.report.jsonform import encode_report
from tpprof.report.prediction import Prediction, measured_in, render_comparison

from tests.pure import tpprof_reports
from tests.pure.golden import check_golden
from tests.pure.planner_cases import made_up
from tpinfer.cli.main import main
from tpinfer.planner.outcome import Spread, as_words
from tpinfer.planner.pictures import PrefillLaw
from tpinfer.planner.report import render_plans
from tpinfer.planner.search import Found
from tpinfer.planner.split import Split

CALL = ["plan", "--model", "llama-3.1-8b", "--topology", "dgx-h100"]
LOAD = ["--input-len", "64", "--output-len", "16"]
TOPOLOGIES = Path(__file__).parents[2] / "topologies"
MEASURED = """version: 1
topology: {name}
date: "2026-11-27T00:00:00Z"
devices:
  - host: {host}
    ids: [0]
    sharing: 1
    ops:
      - {{kind: norm, dtype: {dtype}, floor: 10us, bytes: 10GB/s, error: 0.1}}
"""
LAW = PrefillLaw(512, 0.002, 2e-5, 3e-9)


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    code = main([*CALL, *LOAD, *flags])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def several() -> Found:
    spread = Spread(0.1, (0.09, 0.2, 0.31))
    plans = (
        replace(made_up(2, 2, rate=3210.0), ttft=spread, tpot=spread),
        made_up(4, tpot_s=0.0034, rate=1234.0, binding="communication", slo_misses=("ttft",)),
        made_up(8, 4, rate=98765.0, cost_per_mtok=None, binding="kv_capacity", num_preemptions=3),
        made_up(1, rate=1.5, ttft_s=123.0, binding="max_num_seqs", keeps_up=False),
        *(made_up(dp=dp, reason="weights of 141 GB do not fit") for dp in (1, 2)),
        made_up(reason="nothing joins h0/0 and h1/0; add a fabric", binding="links"),
    )
    return Found(plans, 1234, 4, frozenset({0, 1, 2, 3}))


def test_the_report_of_a_search(tmp_path: Path) -> None:
    text = render_plans("llama: a search", several(), LAW)
    assert max(map(len, text.splitlines())) <= 100
    check_golden("plan_search.txt", text + "\n", tmp_path)


def test_the_report_of_one_plan(tmp_path: Path) -> None:
    found = Found(several().plans[:1], 0, 1, frozenset({0}))
    check_golden("plan_one.txt", render_plans("llama: one", found, LAW) + "\n", tmp_path)


def test_where_nothing_fits_only_reasons_are_told() -> None:
    found = Found((made_up(reason="too large; use more ranks"),), 0, 0, frozenset())
    shown = render_plans("x", found, None)
    assert shown == "x\ntp=1 pp=1 dp=1 does not fit: too large; use more ranks"


def test_promises_that_nothing_keeps_are_told_with_the_least() -> None:
    plans = (
        made_up(2, ttft_s=0.2, tpot_s=0.007, slo_misses=("tpot",)),
        made_up(4, ttft_s=0.3, tpot_s=0.0034, slo_misses=("tpot",)),
    )
    shown = render_plans("x", Found(plans, 2, 2, frozenset({0, 1})), None)
    told = " ".join(shown.split())
    assert "None that keeps up keeps all promises: the least TTFT of any is 200 ms" in told
    assert "the least TPOT 3.40 ms" in told


def test_one_token_has_no_time_between_tokens() -> None:
    shown = render_plans("x", Found((made_up(tpot_s=0.0),), 0, 1, frozenset({0})), None)
    first, interval = (line for line in shown.splitlines()[3:5])
    assert first.split()[4] == "-" and "[0, 0]" not in interval


def test_one_placement(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--tp", "2", "--concurrency", "4", "--price", "2.5USD/h")
    assert (code, err) == (0, "")
    assert "LlamaForCausalLM of 32 layers in bf16 on dgx-h100 (8 x h100-sxm-80g)" in out
    assert "Mode datasheet" in out and "Prefill of n tokens alone" in out
    assert max(map(len, out.splitlines())) <= 100


def test_json_alone_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--concurrency", "4", "--json", "-")
    found = json.loads(out)
    assert code == 0 and len(found["plans"]) == len(found["details"])
    best = found["plans"][0]
    assert best["fits"] and sum(best["split"].values()) == pytest.approx(best["tpot_s"])
    assert found["details"][0]["ttft_split"]["queue"] >= 0
    assert found["prefill"]["input_len"] == 64


def test_a_placement_that_does_not_fit_is_no_crash(capsys: pytest.CaptureFixture[str]) -> None:
    code = main([*CALL[:1], "--model", "llama-3.1-405b", *CALL[3:], *LOAD, "--tp", "1",
                 "--concurrency", "1", "--json", "-"])  # fmt: skip
    plan = json.loads(capsys.readouterr().out)["plans"][0]
    assert code == 1 and plan["fits"] is False and plan["tpot_s"] is None
    assert plan["binding"] == "weights"


def test_the_page_needs_nothing_else(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    code, _, _ = run(capsys, "--concurrency", "8", "--html", str(page))
    text = page.read_text()
    assert code == 0
    for heading in ("What no other plan beats", "More tensor-parallel ranks", "Roofline"):
        assert heading in text
    assert text.count("<svg") >= 4
    assert "default-src 'none'" in text
    for loads in ("<link", "src=", "@import", "url(http"):
        assert loads not in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--concurrency", "0"], "--concurrency 0 must be a whole number from 1"),
        (["--rate", "-1"], "--rate -1 must be above 0"),
        ([], "give one of --concurrency C"),
        (["--concurrency", "2", "--rate", "2"], "give one of"),
        (["--concurrency", "2", "--tp", "0"], "--tp 0 must be 1 or more"),
        (["--concurrency", "2", "--precision", "fp2"], "precision 'fp2' is unknown"),
        (["--concurrency", "2", "--slo", "fast"], "'fast' is not a promise"),
        (["--concurrency", "16385"], "--concurrency 16385 must be a whole number from 1 to 16384"),
        (["--concurrency", "2", "--price", "3"], "'3' has no unit"),
        (["--concurrency", "2", "--traits", "absent.json"], "absent.json cannot be read"),
        (["--concurrency", "2", "--topology", "nowhere"], "neither a file nor shipped"),
        (["--concurrency", "2", "--model", "nothing-such"], "neither a directory nor in the hub"),
        (["--concurrency", "2", "--input-len", "200000"], "the model takes 131072; lower one"),
        (["--concurrency", "2", "--memory-utilization", "0"], "--memory-utilization 0 must be"),
        (["--concurrency", "2", "--max-num-seqs", "0"], "--max-num-seqs 0 must be 1 or more"),
        (["--concurrency", "2", "--num-requests", "0"], "--num-requests 0 must be 1 or more"),
        (["--concurrency", "2", "--tp", "1", "--json", "/no/such/file"], "cannot be written"),
        (["--concurrency", "2", "--tp", "1", "--compare", "absent"], "absent cannot be read"),
    ],
)
def test_mistakes_are_told_in_one_line(
    capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    code, _, err = run(capsys, *flags)
    assert code == 2 and words in err and err.count("\n") == 1


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "llama-3.1-8b"]) == 2
    assert "--topology, --input-len, --output-len missing" in capsys.readouterr().err


# -- against a measurement ---------------------------------------------------------------------


def test_a_comparison_names_who_was_waited_for(tmp_path: Path) -> None:
    words = as_words(Split(4e-4, 2.4e-3, 5e-4, 3e-4, 7e-4))
    prediction = Prediction(words, words, (0.1, 0.15), "datasheet")
    text = render_comparison(prediction, measured_in(tpprof_reports.two_ranks(), "a test"))
    assert "predicted 0.50 ms communication, measured 1.01: 0.70 of it waiting for rank 1" in text
    check_golden("plan_compare.txt", text + "\n", tmp_path)


def test_a_comparison_from_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_bytes(encode_report(tpprof_reports.two_ranks()))
    code, out, _ = run(capsys, "--tp", "2", "--concurrency", "2", "--compare", str(report))
    assert code == 0
    assert "Predicted against measured, ms per output token (mean of 4 windows)" in out


def test_a_report_without_windows_is_refused_with_the_way_to_get_them() -> None:
    report = replace(tpprof_reports.two_ranks(), windows=[])
    with pytest.raises(TraceError, match=r"tpprof analyze TRACES --window steps --json r\.json"):
        measured_in(report, "r.json")


@pytest.mark.parametrize(
    ("asked", "measured", "expected"),
    [(("--precision", "auto"), "float32", "fp32"), ((), "bfloat16", "bf16"),
     (("--precision", "bf16"), "float32", "bf16"), ((), None, "bf16")],
)  # fmt: skip
def test_a_cpu_is_planned_in_what_the_runtime_computes_in_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, asked: tuple[str, ...],
    measured: str | None, expected: str,
) -> None:  # fmt: skip
    """The checkpoint is bfloat16, which some processors multiply more slowly than float32."""
    topology = (TOPOLOGIES / "cpu-laptop.yaml").read_text()
    (tmp_path / "box.yaml").write_text(topology)
    if measured:
        (tmp_path / "box.measured.yaml").write_text(
            MEASURED.format(name="cpu-laptop", host="laptop", dtype=measured)
        )
    call = ["plan", "--model", "qwen3-0.6b", "--topology", str(tmp_path / "box.yaml"), *LOAD]
    assert main([*call, "--tp", "1", "--concurrency", "1", *asked]) == 0
    assert f" layers in {expected} on " in capsys.readouterr().out
