"""Clocks that are sampled during a recording lie beside its trace, on a clock that tpprof can tie
to the trace's own."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tpprof.analyze import AnalysisOptions, analyze
from tpprof.readers.read import read_traces

from tpinfer.config.ceilings import Ceilings, MemoryLevel
from tpinfer.config.clock_samples import read_clock_samples
from tpinfer.config.dtypes import DType
from tpinfer.machine.clocks import ClockSampler, DeviceLimits, Reading
from tpinfer.worker import capture
from tpinfer.worker.host_spans import HostSpans

FAST = Ceilings((MemoryLevel("DRAM", 1 << 40, 1e15),), {DType.FLOAT32: 1e13}, 1e-9, 0, 1e9, "test")


class HalfSpeed:
    """Satisfies `ClockSource`."""

    limits = DeviceLimits("cpu", "made up", 4000.0)

    def read(self) -> Reading:
        return Reading(2000.0, reasons=("cpu_thermal",))


def worker() -> Any:
    """As much of one as a recording asks for."""
    group = SimpleNamespace(name="alone", rank=0, size=1, barrier=lambda: None)
    return SimpleNamespace(
        device=torch.device("cpu"),
        group=group,
        spans=HostSpans(),
        annotate=lambda _: None,
        graph_nodes=lambda: None,
    )


def recorded(directory: Path) -> None:
    recording = capture.Capture(worker())
    recording.start()
    left = torch.ones(256, 256)
    for _ in range(20):
        torch.mm(left, left)
    recording.stop()
    recording.write(directory)


def test_samples_meet_the_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = ClockSampler(HalfSpeed(), 0, period_s=0.005)
    monkeypatch.setattr(capture, "sampler_of", lambda device, rank: (sampler, ""))
    recorded(tmp_path)
    samples = read_clock_samples(tmp_path / "rank0.clocks.json")
    assert samples is not None and len(samples) >= 2
    report = analyze(read_traces([tmp_path]), AnalysisOptions(ceilings=FAST))
    [one] = report.device_clocks
    assert one.coverage == 1.0 and one.compute_mhz == 2000.0
    [product] = [op for op in report.ops if op.bound == "compute"]
    assert product.lost_to["clocks"] == product.floor_ns > 0
    assert list(one.reasons_ns) == ["thermal"]


def test_a_device_that_says_nothing_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "sampler_of", lambda device, rank: (None, "nothing here"))
    recorded(tmp_path)
    assert not list(tmp_path.glob("*.clocks.json")) and list(tmp_path.glob("rank0.trace*"))
    report = analyze(read_traces([tmp_path]), AnalysisOptions(ceilings=FAST))
    assert report.device_clocks == []
