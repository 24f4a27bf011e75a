"""Tables of published measurements: what is read, what is counted as unused, what is refused."""

from pathlib import Path

import pytest

from tpinfer.config.errors import ConfigError
from tpinfer.planner.published import Point, read_published

HEAD = "system,model,gpu,tp,pp,precision,isl,osl,concurrency_or_batch,metric,value\n"
TPOT = "vllm 0.9,meta-llama/Llama-3.1-70B-Instruct,H200-SXM,4,1,fp8,1024,512,c=16,TPOT ms,12.5\n"
RATE = (
    "TRT-LLM v0.19,Llama-3.3-70B,B200,8,1,fp4,128,2048,inf (saturated),output tok/s total,30000\n"
)


def table(folder: Path, *rows: str, head: str = HEAD) -> Path:
    """A CSV file."""
    path = folder / "table.csv"
    path.write_text(head + "".join(rows), encoding="utf-8")
    return path


def test_closed_loops_and_saturated_runs_are_points(tmp_path: Path) -> None:
    found = read_published(table(tmp_path, TPOT, RATE))
    assert found.points == (
        Point(
            "h200-sxm", "vllm", "vllm 0.9", "fp8", "llama-3.1-70b", 4, 1, 1024, 512, 16, None,
            0.0125,
        ),
        Point(
            "b200", "trtllm", "TRT-LLM v0.19", "fp4", "llama-3.1-70b", 8, 1, 128, 2048, None, 3000,
            30000.0,
        ),
    )  # fmt: skip
    assert found.unused == {}
    assert [point.is_throughput for point in found.points] == [False, True]


def test_other_rows_are_counted_by_reason(tmp_path: Path) -> None:
    rows = [
        TPOT.replace("TPOT ms", "TTFT ms"),
        TPOT.replace("c=16", "qps=2"),
        TPOT.replace("H200-SXM", "V100"),
        TPOT.replace("Llama-3.1-70B", "Mixtral-8x7B"),
        TPOT.replace("vllm 0.9", "lmdeploy"),
    ]
    found = read_published(table(tmp_path, *rows))
    assert found.points == () and sum(found.unused.values()) == 5
    assert set(found.unused) == {
        "TTFT ms, closed loop", "TPOT ms, other load", "device V100",
        "model meta-llama/Mixtral-8x7B-Instruct", "engine lmdeploy",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("12.5", "fast", "value is 'fast'"),
        ("12.5", "-1", "value is '-1'"),
        ("12.5", "nan", "value is 'nan'"),
        (",4,1,", ",1.5,1,", "tp is '1.5'"),
        (",1024,", ",dataset,", "isl is 'dataset'"),
        (",512,c", ",,c", "osl is ''"),
    ],
)
def test_damaged_numbers_name_line_and_column(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    path = table(tmp_path, RATE, TPOT.replace(old, new, 1))
    with pytest.raises(ConfigError, match=r"table\.csv:3") as caught:
        read_published(path)
    assert says in str(caught.value)


def test_a_table_without_a_column_or_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lacks the column osl"):
        read_published(table(tmp_path, head=HEAD.replace("osl,", "")))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_published(tmp_path / "none.csv")
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00system")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_published(binary)
