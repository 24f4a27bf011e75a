"""The recording of two ranks that summed by NCCL on one GPU, made by `profiling/gpu/ranks.py`."""

from pathlib import Path

import pytest
from tpprof.cli.main import main

RESULTS = Path(__file__).resolve().parents[2] / "profiling/results/gpu/h100-2026-11-27"


def test_two_ranks_are_read_and_no_advice_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", str(RESULTS / "route-a-recording"), "--window", "steps"]) == 0
    said = capsys.readouterr().out
    assert "5.32 ms of wall in 4 windows, 2 ranks" in said
    allreduce = next(line for line in said.splitlines() if line.startswith("allreduce"))
    assert allreduce.split()[1] == "52"
    assert "wait     rank 0 1.069 ms, rank 1 0.055 ms" in said
    first = said.split("What to do first\n")[1].splitlines()[0]
    assert first.startswith("1. Emulation: no speed claim: 2 ranks share one GPU")
    assert "recording made the run 1.37 times as long" in said


def test_nccl_says_which_ranks_met_on_one_device() -> None:
    log = (RESULTS / "nccl-route-a-tp2.log").read_text()
    joined = [line for line in log.splitlines() if "nranks 2 cudaDev 0" in line]
    assert {line.split(" rank ")[1][0] for line in joined} == {"0", "1"}
    assert "AllReduce: 4096 Bytes -> Algo RING" in log
