"""The script that says how much of a step is explained, on a slice that a CPU holds."""

import argparse
import json
import time
from pathlib import Path

import pytest
from gpu import attribution


def wanted(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(**{"shape": "qwen3-0.6b-slice", "context": 8, **changes})


def test_a_recorded_run_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribution, "STEPS", 5)
    monkeypatch.setattr(attribution, "TOKENS", 14)
    found = attribution.attributed(wanted(), 2, tmp_path / "run", time.monotonic() + 120)
    assert found["explained"] == 1.0 and found["held"], found
    assert found["windows"] == 5 and found["dilation"] > 0
    assert 0.9 < found["with an op"] <= 1.0 and 0.3 < found["with a layer"] < 1
    assert sum(found["leaves"].values()) == sum(found["rollup"].values()) == found["wall_ns"]
    json.dumps(found)


def test_what_does_not_run_says_why(tmp_path: Path) -> None:
    until_s = time.monotonic() + 60
    found = attribution.attributed(wanted(shape="no-such-shape"), 1, tmp_path, until_s)
    assert found["exit"] != 0 and "no-such-shape" in found["tail"]
    assert attribution.attributed(wanted(), 1, tmp_path, time.monotonic()) == {
        "skipped": "the time budget is spent"
    }
