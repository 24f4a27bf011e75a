"""From names to ranks: every engine's spelling, what is left out, what is refused."""

import json
import os
from pathlib import Path

import pytest
from tpprof.errors import TraceError
from tpprof.events import NONE
from tpprof.readers.find import find_traces
from tpprof.readers.read import read_traces

from tests.pure.tpprof_recordings import Nsight, decode_step, document, write


def make(folder: Path, *names: str, rank: int | None = None) -> list[Path]:
    """Kineto files of these names, which say nothing of ranks themselves unless `rank` is given."""
    place = {} if rank is None else {"rank": rank, "world_size": 1}
    content = document(decode_step(), distributedInfo=place)
    return [write(folder / name, content, packed=name.endswith(".gz")) for name in names]


def found(*paths: Path | str) -> dict[int, str]:
    """Names by rank."""
    files = find_traces(paths).files
    assert len({rank for rank, _ in files}) == len(files)
    return {rank: path.name for rank, path in files}


VLLM = "dp0_pp0_tp{0}_dcp0_ep{0}_rank{0}.1775078550123456789.pt.trace.json.gz"
SGLANG = "1775078550.25-TP-{}-DP-0-PP-0-EP-0.trace.json.gz"


@pytest.mark.parametrize(
    "spelled",
    [
        VLLM,
        SGLANG,
        "1775078550.25-TP-{}.trace.json.gz",
        "host_17-rank-{}.1775078550123.pt.trace.json.gz",
        "rank{}.trace.json.gz",
        "trace_rank_{}.json",
        "node_Rank.{}.json",
    ],
)
def test_names_that_tell_the_rank(tmp_path: Path, spelled: str) -> None:
    names = [spelled.format(rank) for rank in (10, 2, 0)]
    make(tmp_path, *names)
    assert found(tmp_path) == {10: names[0], 2: names[1], 0: names[2]}
    assert list(found(tmp_path)) == [0, 2, 10], "by number, not by spelling"
    assert found(*[tmp_path / name for name in names]) == found(str(tmp_path / "*"))


def test_names_that_tell_nothing_leave_it_to_the_file(tmp_path: Path) -> None:
    make(tmp_path, "host-a_431.1775078550123456789.pt.trace.json", rank=3)
    make(tmp_path, "host-b_22.1775078550123456789.pt.trace.json", rank=1)
    assert [rank for rank, _ in find_traces([tmp_path]).files] == [1, 3]


def test_nobody_tells(tmp_path: Path) -> None:
    paths = make(tmp_path, "b.json", "a.json")
    traces = read_traces(paths)
    assert [(trace.rank, Path(trace.source).name) for trace in traces] == [
        (0, "b.json"), (1, "a.json"),
    ]  # fmt: skip
    assert "no file says its rank" in traces[0].warnings[0]
    [alone] = read_traces(paths[:1])
    assert (alone.rank, alone.warnings) == (0, ())


class TestLeftOut:
    def test_coordinators_and_merged_files(self, tmp_path: Path) -> None:
        make(tmp_path, VLLM.format(0), "host.async_llm.17.pt.trace.json.gz", "merged-7.trace.json")
        result = find_traces([tmp_path])
        assert [rank for rank, _ in result.files] == [0]
        assert len(result.warnings) == 2
        with pytest.raises(TraceError, match=r"no recording of a rank .*no rank's file"):
            find_traces([tmp_path / "merged-7.trace.json"])

    def test_what_lies_beside_our_own_traces(self, tmp_path: Path) -> None:
        make(tmp_path, "rank0.trace.json.gz", "rank1.trace.json.gz")
        beside = ("manifest", "clocks", "graphs")
        for name in ("run.json", "clock-host.json", *(f"rank0.{what}.json" for what in beside)):
            write(tmp_path / name, json.dumps({"tp": 2, "rank": 0}))
        write(tmp_path / "notes.txt", "notes")
        write(tmp_path / "answers.json", json.dumps([{"prompt": "Hello", "text": "you"}]))
        write(tmp_path / "numbers.json", "[1, 2]")
        (tmp_path / "rank1.trace.json.gz.part").write_bytes(b"half")
        result = find_traces([tmp_path])
        assert [path.name for _, path in result.files] == [
            "rank0.trace.json.gz", "rank1.trace.json.gz",
        ]  # fmt: skip
        assert result.warnings == []

    def test_older_sessions(self, tmp_path: Path) -> None:
        """SGLang counts by seconds; vLLM's names end in ns."""
        old, new = "999.5-TP-{}.trace.json.gz", "1000.25-TP-{}.trace.json.gz"
        make(tmp_path, *[name.format(rank) for name in (old, new) for rank in (0, 1)])
        result = find_traces([tmp_path])
        assert [path.name for _, path in result.files] == [new.format(0), new.format(1)]
        assert "999.5 left out" in result.warnings[0]
        assert found(tmp_path / "999*") == {0: old.format(0), 1: old.format(1)}

    def test_older_files_of_a_rank(self, tmp_path: Path) -> None:
        first, second = "rank0.1000000000000.pt.trace.json", "rank0.1000000000001.pt.trace.json"
        newer, older = make(tmp_path, second, first)
        os.utime(older, (2e9, 2e9))
        result = find_traces([tmp_path])
        assert result.files == [(0, newer)], "the time in the name counts"
        assert "rank 0 has 2 files" in result.warnings[0] and first in result.warnings[0]
        assert find_traces([tmp_path, older]).files == [(0, older)], "what was named wins"

    def test_the_other_recorder_of_the_same_run(self, tmp_path: Path) -> None:
        make(tmp_path, "rank0.trace.json")
        export = Nsight(tmp_path / "rank0.sqlite").kernel(1, "k", 1, 2).save()
        result = find_traces([tmp_path])
        assert [path.name for _, path in result.files] == ["rank0.trace.json"]
        assert "rank0.sqlite left out" in result.warnings[0]
        assert find_traces([export]).files == [(0, export)]

    def test_the_same_file_twice(self, tmp_path: Path) -> None:
        [path] = make(tmp_path, "rank0.trace.json")
        assert find_traces([path, tmp_path, str(path)]).files == [(0, path)]


class TestGrids:
    def test_pipeline_stages_count_through(self, tmp_path: Path) -> None:
        names = [f"1-TP-{tp}-DP-0-PP-{pp}.trace.json.gz" for pp in (0, 1) for tp in (0, 1)]
        make(tmp_path, *names)
        assert found(tmp_path) == dict(enumerate(names))

    def test_copies_count_through_behind_each_other(self, tmp_path: Path) -> None:
        names = [f"1-TP-{tp}-DP-{dp}.trace.json.gz" for dp in (0, 1) for tp in (0, 1)]
        make(tmp_path, *names)
        assert found(tmp_path) == dict(enumerate(names))

    def test_data_parallel_attention_shares_the_tensor_axis(self, tmp_path: Path) -> None:
        names = ["1-TP-0-DP-0.trace.json.gz", "1-TP-1-DP-1.trace.json.gz"]
        make(tmp_path, *names)
        assert found(tmp_path) == dict(enumerate(names))
        assert find_traces([tmp_path]).warnings == []

    def test_vllm_with_two_engines(self, tmp_path: Path) -> None:
        names = [f"dp{dp}_pp0_tp{tp}_dcp0_ep0_rank{tp}.17.pt.trace.json"
                 for dp in (0, 1) for tp in (0, 1)]  # fmt: skip
        make(tmp_path, *names)
        assert found(tmp_path) == dict(enumerate(names))


class TestRefused:
    def test_two_named_files_of_one_rank(self, tmp_path: Path) -> None:
        paths = make(tmp_path, "a_rank0.json", "b_rank0.json")
        with pytest.raises(TraceError, match=r"rank 0 is in 2 files: .*name one file a rank"):
            find_traces(paths)

    def test_reports_that_only_nsight_reads(self, tmp_path: Path) -> None:
        (tmp_path / "rank0.nsys-rep").write_bytes(b"x")
        for given in (tmp_path, tmp_path / "rank0.nsys-rep"):
            with pytest.raises(TraceError, match=r"nsys export --type sqlite .*rank0\.sqlite"):
                find_traces([given])
        Nsight(tmp_path / "rank0.sqlite").kernel(1, "k", 1, 2).save()
        assert found(tmp_path) == {0: "rank0.sqlite"}, "the export beside it is read"

    @pytest.mark.parametrize("given", ["gone.json", "*.json", ""])
    def test_nothing_there(self, tmp_path: Path, given: str) -> None:
        with pytest.raises(TraceError, match=r"no such file|holds no recording"):
            find_traces([tmp_path / given])

    def test_no_path(self) -> None:
        with pytest.raises(TraceError, match="no recording of a rank"):
            find_traces([])

    def test_an_export_that_is_another_database(self, tmp_path: Path) -> None:
        path = tmp_path / "x.sqlite"
        path.write_bytes(b"not sqlite")
        with pytest.raises(TraceError, match="is no SQLite file"):
            read_traces([path])


def test_one_level_below_is_looked_into(tmp_path: Path) -> None:
    (tmp_path / "worker").mkdir()
    make(tmp_path / "worker", "rank0.trace.json")
    assert found(tmp_path) == {0: "rank0.trace.json"}


def test_missing_ranks_are_told(tmp_path: Path) -> None:
    content = document(decode_step(), distributedInfo={"rank": 0, "world_size": 8})
    for rank in (1, 4):
        write(tmp_path / f"rank{rank}.trace.json", content)
    traces = read_traces([tmp_path])
    assert [trace.rank for trace in traces] == [1, 4], "the name counts"
    assert "no file of rank 0, 2, 3, 5, 6, 7 (of 8 ranks)" in traces[0].warnings[0]
    damaged = document(decode_step(), distributedInfo={"rank": 0, "world_size": 2**31 - 1})
    [trace] = read_traces([write(tmp_path / "other.json", damaged)])
    assert "rank 1, 2, 3, 4, 5, 6, 7, 8, ... (of 2147483647 ranks)" in trace.warnings[0]


def test_exports_number_their_ranks_one_behind_the_other(tmp_path: Path) -> None:
    for host in ("a", "b"):
        export = Nsight(tmp_path / f"{host}.sqlite")
        for pid in (41, 42):
            export.kernel(pid, f"{host}{pid}", 10, 20, deviceId=pid - 41)
        export.save()
    assert [rank for rank, _ in find_traces([tmp_path]).files if rank != NONE] == []
    traces = read_traces([tmp_path])
    assert [trace.text(0) for trace in traces] == ["a41", "a42", "b41", "b42"]
    assert [trace.rank for trace in traces] == [0, 1, 2, 3]
