"""The tpprof command: help as it was agreed, one line for every mistake, exit codes for CI."""

import gzip
import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from tpprof.cli.inputs import GROUPINGS, ceilings_of
from tpprof.cli.main import ORIENTATION, VERBS, build_parser, main
from tpprof.readers.read import read_traces
from tpprof.report.jsonform import encode_report, read_report
from tpprof.report.wording import duration

from tests.pure.golden import check_golden
from tests.pure.tpprof_reports import one_rank, two_ranks
from tests.traces.catalogue import SCENARIOS
from tests.traces.kineto import SECRET, KinetoStyle, write_kineto
from tests.traces.simulate import simulate
from tpinfer.config.errors import ConfigError
from tpinfer.embedded.locate import embedded_model

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def reports(tmp_path: Path) -> tuple[str, str]:
    """JSON reports of one and of two ranks."""
    small = replace(one_rank({"memory": 30_000_000, "host": 5_000_000}), ops=two_ranks().ops)
    paths = tmp_path / "tp1.json", tmp_path / "tp2.json"
    for path, report in zip(paths, (small, two_ranks()), strict=True):
        path.write_bytes(encode_report(report))
    return str(paths[0]), str(paths[1])


@pytest.fixture
def traces(tmp_path: Path) -> str:
    write_kineto(simulate(SCENARIOS["kernel late"]), tmp_path / "traces", KinetoStyle())
    return str(tmp_path / "traces")


def last_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a mistake is told in."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_the_golden_one(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*([verb] if verb else []), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    check_golden(f"tpprof-help-{verb or 'all'}.txt", text, tmp_path)


def test_without_a_verb_a_newcomer_is_shown_around(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out == ORIENTATION + "\n"
    commands = [line.split() for line in ORIENTATION.splitlines() if line.startswith("  tpprof")]
    assert {words[1] for words in commands} <= set(VERBS)
    for words in commands:
        until = next((i for i, word in enumerate(words) if "  " in word), len(words))
        assert words[1:until]


def test_module_and_command_are_one(capsys: pytest.CaptureFixture[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tpprof"], cwd=REPOSITORY / "profiling", check=False,
        capture_output=True, text=True, env={"PYTHONPATH": f".:{REPOSITORY}"},
    )  # fmt: skip
    assert (run.returncode, run.stdout, run.stderr) == (0, ORIENTATION + "\n", "")


def test_starting_loads_nothing_heavy() -> None:
    """Not numpy either: a mistake in the call is told at once."""
    code = "import sys, tpprof.cli.main as m; m.build_parser(); print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": f"{REPOSITORY / 'profiling'}:{REPOSITORY}"},
    )  # fmt: skip
    assert {"numpy", "torch", "sqlite3"} & set(run.stdout.split()) == set()


def test_every_verb_explains_itself_with_examples() -> None:
    build_parser()
    for verb in VERBS:
        epilog = __import__(f"tpprof.cli.{verb}", fromlist=["EPILOG"]).EPILOG
        assert f"tpprof {verb}" in epilog


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["analyze", "absent"], "absent"),
        (["analyze", "absent/*.json"], "absent"),
        (["scale", "a.json", "a.json"], "a second run of 1 ranks"),
        (["scale", "a.json"], "at least two"),
        (["scale", "a.json", "a.json", "--sizes", "1"], "must name 2 numbers"),
        (["scale", "a.json", "a.json", "--sizes", "1,x"], "must name 2 numbers"),
        (["diff", "a.json", "absent"], "absent"),
        (["diff", "a.json", "a.json", "--fail-on", "x:+1%"], "'x'"),
        (["diff", "a.json", "a.json", "--fail-on", "wall"], "is no limit"),
        (["diff", "a.json", "a.json", "--json", "no/dir/x.json"], "cannot be written"),
        (["diff", "a.json", "bad.json"], "sum to"),
        (["merge", "absent"], "absent"),
        (["export", "absent", "--arrow", "x"], "absent"),
        (["whatif", "empty.json"], "empty.json"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    argv: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_bytes(encode_report(one_rank({"host": 5})))
    (tmp_path / "bad.json").write_text('{"wall_ns": 4, "leaves": {"host": 5}}')
    (tmp_path / "empty.json").write_text("")
    assert main(argv) == 2
    assert said in last_error(capsys)


@pytest.mark.parametrize(
    "argv",
    [
        ["nothing"],
        ["analyze"],
        ["export", "x"],
        ["analyze", "x", "--by", "colour"],
        ["analyze", "x", "--topology", "a", "--device", "b"],
    ],
)
def test_a_call_that_cannot_be_parsed_exits_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2


def test_diff_of_reports_passes_and_fails(
    reports: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", reports[1], reports[1], "--fail-on", "wall:+0%"]) == 0
    out = tmp_path / "diff.json"
    argv = ["diff", *reports, "--fail-on", "communication:+5%", "--json", str(out)]
    assert main(argv) == 1
    assert "FAILED: communication went from 0 ns" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["format_version"] == 1
    assert len(found["failures"]) == 1
    assert main(["diff", *reports, "--fail-on", "memory:+5%"]) == 0


def test_scale_of_reports(
    reports: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, out = tmp_path / "scale.html", tmp_path / "scale.json"
    assert main(["scale", *reports, "--html", str(page), "--json", str(out)]) == 0
    assert "tp=2 against tp=1" in capsys.readouterr().out
    assert "What ate the speed-up" in page.read_text()
    [run] = json.loads(out.read_text())["runs"]
    assert run["ideal_ns"] + sum(bar["spent_ns"] for bar in run["bars"]) == run["real_ns"]


def test_scale_takes_the_sizes_it_is_told(
    reports: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scale", *reports, "--sizes", "4,8"]) == 0
    assert "tp=8 against tp=4" in capsys.readouterr().out


def test_export_writes_what_nsight_reads(
    traces: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.sqlite"
    assert main(["export", traces, "--nsys-sqlite", str(out)]) == 0
    assert "of 4 ranks" in capsys.readouterr().out
    with closing(sqlite3.connect(out)) as database:
        [(count,)] = database.execute("SELECT count(*) FROM CUPTI_ACTIVITY_KIND_KERNEL")
    assert count > 0
    assert main(["export", traces, "--nsys-sqlite", str(out)]) == 2


@pytest.mark.parametrize("window", ["all", "steps", "itl"])
def test_analyze_prints_and_writes_one_finding(
    window: str, traces: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, out = tmp_path / "report.html", tmp_path / "report.json"
    argv = ["analyze", traces, "--window", window, "--device", "h100-sxm-80g"]
    assert main([*argv, "--html", str(page), "--json", str(out)]) == 0
    said = capsys.readouterr()
    report = read_report(out)
    assert len(report.ranks) == 4
    assert duration(report.wall_ns) in said.out
    assert f"page written to {page}" in said.err
    text = page.read_text()
    for title in ("The wall on every rank", "Window by window", "By layer", "Waiting and transfer"):
        assert title in text
    assert "If one cause were gone" in text
    for written in (text, out.read_text(), said.out):
        assert SECRET not in written
    assert main(["diff", str(out), str(out), "--fail-on", "wall:+0%"]) == 0


@pytest.mark.parametrize("by", GROUPINGS)
def test_analyze_by_anything_sums_to_the_wall(
    by: str, traces: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    assert main(["analyze", traces, "--by", by, "--json", str(out)]) == 0
    report = read_report(out)
    for rank in report.ranks:
        assert sum(g.wall_ns for g in report.groups if g.rank == rank.rank) == rank.wall_ns
    assert f"by {by}" in capsys.readouterr().out


def test_the_late_rank_is_named_and_whatif_wins_it_back(
    traces: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    late = SCENARIOS["kernel late"].delays[0].rank
    out = tmp_path / "whatif.json"
    assert main(["analyze", traces]) == 0
    assert f"Rank {late} comes last" in capsys.readouterr().out
    assert main(["whatif", traces, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    gains = {one["cause"]: one["gain_ns"] for one in found["removals"]}
    each = {cause: ns for cause, ns in gains.items() if cause.startswith("wait:")}
    assert max(each, key=lambda cause: each[cause]) == f"wait:{late}"
    assert main(["whatif", traces, "--no", "wait:99"]) == 2
    assert main(["whatif", traces, "--no", "host:pyhton"]) == 2
    assert "python" in capsys.readouterr().err


def test_merge_puts_all_ranks_in_one_file(
    traces: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged.json.gz"
    assert main(["merge", traces, "-o", str(out)]) == 0
    assert "4 ranks" in capsys.readouterr().out
    text = gzip.decompress(out.read_bytes())
    assert SECRET.encode() not in text
    assert {event["pid"] for event in json.loads(text)["traceEvents"]} == {0, 1, 2, 3}


def test_a_merged_file_is_no_rank_and_no_recording_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = tmp_path / "ranks"
    write_kineto(simulate(SCENARIOS["steady"]), ranks, KinetoStyle())
    recorded = {path: path.read_bytes() for path in ranks.iterdir()}
    for path in (next(iter(recorded)), ranks / "merged.json.gz", ranks / "all.json"):
        code = main(["merge", str(ranks), "-o", str(path)])
        assert code == (2 if path in recorded else 0)
    capsys.readouterr()
    for flag in ("--json", "--html"):
        assert main(["analyze", str(ranks), flag, str(next(iter(recorded)))]) == 2
        assert "one of the recordings" in last_error(capsys)
    assert {path: path.read_bytes() for path in recorded} == recorded
    assert [trace.rank for trace in read_traces([ranks])] == [0, 1]
    assert main(["analyze", str(ranks / "all.json")]) == 2
    assert "tpprof merge" in last_error(capsys)


def test_a_model_is_read_from_the_very_file_that_is_named(
    traces: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((embedded_model() / "config.json").read_text())
    (tmp_path / "config.json").write_text("a neighbour")
    (tmp_path / "eight.json").write_text(json.dumps(config | {"num_attention_heads": 3}))
    assert main(["analyze", traces, "--model", str(tmp_path / "eight.json")]) == 2
    assert "3 attention heads" in last_error(capsys)
    assert main(["analyze", traces, "--model", str(tmp_path)]) == 2
    assert "not JSON" in last_error(capsys)


def test_scale_of_traces_of_two_sizes(
    traces: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_kineto(simulate(SCENARIOS["alone"]), tmp_path / "one", KinetoStyle())
    page = tmp_path / "scale.html"
    assert main(["scale", str(tmp_path / "one"), traces, "--html", str(page)]) == 0
    assert "tp=4 against tp=1" in capsys.readouterr().out
    assert "What ate the speed-up" in page.read_text()


def test_diff_of_traces(traces: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", traces, traces, "--fail-on", "wall:+0%"]) == 0
    assert "per window" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["analyze", "whatif", "merge"])
def test_damaged_traces_are_told_not_crashed_on(
    verb: str, traces: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sorted(Path(traces).iterdir())[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    more = ["-o", str(tmp_path / "m.json")] if verb == "merge" else []
    assert main([verb, traces, *more]) == 0
    assert capsys.readouterr().out


def test_cards_and_machines_give_ceilings() -> None:
    machine = ceilings_of("dgx-h100", None, 8)
    card = ceilings_of(None, "H100-SXM-80G", 8)
    assert machine is not None
    assert card == machine
    lonely = ceilings_of(None, "l40s", 512)
    assert lonely is not None
    assert lonely.collective_latency_s == 0
    assert ceilings_of(None, None, 2) is None
    with pytest.raises(ConfigError, match="catalogue; it has"):
        ceilings_of(None, "abacus", 1)


def test_nothing_of_an_environment_gets_out(
    traces: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", traces, "--nsys-sqlite", str(tmp_path / "out.sqlite")]) == 0
    assert SECRET.encode() not in (tmp_path / "out.sqlite").read_bytes()
    assert SECRET not in capsys.readouterr().out
