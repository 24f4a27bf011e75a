"""When a run is recorded and what is written beside the traces, decided on rank 0.

DIR/rank<r>.trace.json.gz, one Kineto file a rank; DIR/rank<r>.manifest.json, what every op should
cost there and the ceilings; DIR/rank<r>.clocks.json, how fast its device was clocked and why, where
it says so (`config.clock_samples`); DIR/rank<r>.graphs.json, the op of each kernel in its recorded
graphs, where it replays some (`costs.graph_nodes`); DIR/clock-<host>.json; DIR/run.json, with the
dilation: what recording did to the time of a step. Nothing of the process environment is in any of
them.
"""

import json
import platform
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tpinfer.config.ceilings import Ceilings
from tpinfer.config.engine import RecordingRequest
from tpinfer.costs.manifest import cost_manifest
from tpinfer.costs.step_record import StepRecord
from tpinfer.engine.executor import Executor
from tpinfer.steps.plan import Command
from tpinfer.worker.assemble import Assembly
from tpinfer.worker.capture import Capture

FORMAT_VERSION = 1
_UNLIMITED = 1e30
_LEAST_STEPS = 3
"""Steps of each sort that a dilation is computed from."""


def answer(capture: Capture, command: Command) -> bool:
    """Do any rank's part of a recording command; False for other commands."""
    if command.name == "profile_start":
        capture.start()
    elif command.name == "profile_stop":
        capture.stop()
    elif command.name == "profile_write":
        capture.write(Path(command.text))
    else:
        return False
    return True


class Recording:
    """One recording, from rank 0's side."""

    def __init__(self, request: RecordingRequest, capture: Capture, executor: Executor) -> None:
        self._request = request
        self._capture = capture
        self._executor = executor
        self._num_before = 0
        self._num_seen = 0
        self._is_on = False
        self._is_over = False

    def before_run(self, num_sent: int) -> None:
        """Call before requests are accepted. num_sent: steps handed over by then."""
        self._num_before = num_sent
        if not self._request.num_skipped and not self._is_over:
            self._start()

    def may_plan(self, num_sent: int, num_in_flight: int) -> bool:
        """Ask before each step is planned. Starts and stops the recording where it is time, which
        is with nothing on its way: until then no step may be planned."""
        first, last = self._request.num_skipped, self._request.num_skipped + self._request.num_steps
        num_seen = num_sent - self._num_before
        starts = num_seen == first and not self._is_on and not self._is_over
        stops = num_seen >= last and self._is_on
        if not starts and not stops:
            return True
        if num_in_flight:
            return False
        if starts:
            self._start()
        else:
            self.stop(num_sent)
        return True

    def stop(self, num_sent: int) -> None:
        """End it, if it is on."""
        self._num_seen = num_sent - self._num_before
        if self._is_on:
            self._tell("profile_stop")
            self._is_on, self._is_over = False, True

    def write(
        self, assembly: Assembly, ceilings: Sequence[Ceilings], facts: "RunFacts"
    ) -> list[str]:
        """Write every file; returns warnings. A collective call."""
        directory = self._request.directory
        if not self._is_over:
            return [
                f"nothing was recorded: the run had {self._num_seen} steps and the first "
                f"{self._request.num_skipped} were skipped; lower --profile-skip"
            ]
        _remove_earlier(directory)
        self._tell("profile_write", str(directory))
        for rank, known in enumerate(ceilings):
            _write_json(
                directory / f"rank{rank}.manifest.json",
                {
                    "manifest": cost_manifest(assembly.ledger(rank)),
                    "ceilings": _finite(msgspec.to_builtins(known, str_keys=True)),
                },
            )
        _write_json(directory / f"clock-{socket.gethostname()}.json", clock_reading(assembly))
        window = self._capture.recorded_from_ns, self._capture.recorded_until_ns
        dilation, warnings = dilation_of(facts.records, window)
        _write_json(directory / "run.json", _run_json(assembly, facts, dilation))
        return warnings

    def _start(self) -> None:
        self._tell("profile_start")
        self._is_on = True

    def _tell(self, name: str, text: str = "") -> None:
        command = Command(name, text)
        self._executor.command(command)
        answer(self._capture, command)


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the run itself knows."""

    records: Sequence[StepRecord]
    """Rank 0's steps, recorded and not."""
    command: Sequence[str]


@dataclass(frozen=True, slots=True)
class Dilation:
    """Step times with and without the recorder."""

    profiled_step_ns: list[int]
    unprofiled_step_ns: list[int]

    @property
    def ratio(self) -> float | None:
        """Median over median; None with fewer than three steps of a sort."""
        if min(len(self.profiled_step_ns), len(self.unprofiled_step_ns)) < _LEAST_STEPS:
            return None
        return statistics.median(self.profiled_step_ns) / statistics.median(self.unprofiled_step_ns)


def dilation_of(
    records: Sequence[StepRecord], window: tuple[int, int]
) -> tuple[Dilation, list[str]]:
    """Compare the decode steps inside `window` (ns) with those outside it that had as many rows."""
    inside = [r for r in records if r.start_ns >= window[0] and r.end_ns <= window[1]]
    decodes = [r for r in inside if r.kind == "decode"]
    rows = {r.aggregates.rows for r in decodes}
    others = [
        r for r in records if r.kind == "decode" and r.aggregates.rows in rows and r not in inside
    ]
    found = Dilation(
        [r.end_ns - r.start_ns for r in decodes], [r.end_ns - r.start_ns for r in others]
    )
    if found.ratio is not None:
        return found, []
    return found, [
        f"the dilation is unknown: {len(decodes)} recorded and {len(others)} other decode steps, "
        f"and it takes {_LEAST_STEPS} of each; generate more tokens or record fewer steps"
    ]


def _finite(ceilings: dict[str, object]) -> dict[str, object]:
    """A rank alone has no limit on communication, and JSON has no infinity."""
    rate = ceilings["collective_bytes_per_s"]
    return {**ceilings, "collective_bytes_per_s": min(float(str(rate)), _UNLIMITED)}


def _remove_earlier(directory: Path) -> None:
    """Files of an earlier recording: two runs mixed would be read as one."""
    ranks = ("trace.json.gz", "manifest.json", "clocks.json", "graphs.json")
    for pattern in (*(f"rank*.{name}" for name in ranks), "run.json", "clock-*.json"):
        for path in directory.glob(pattern):
            path.unlink()


def clock_reading(assembly: Assembly) -> dict[str, object]:
    """One moment on this host's two clocks; the ranks that share them."""
    return {
        "host": socket.gethostname(),
        "monotonic_ns": time.monotonic_ns(),
        "realtime_ns": time.time_ns(),
        "ranks": list(range(assembly.seat.local_world)),
    }


def _run_json(assembly: Assembly, facts: RunFacts, dilation: Dilation) -> dict[str, object]:
    spec = assembly.spec
    return {
        "format_version": FORMAT_VERSION,
        "tp": assembly.seat.world,
        "model": assembly.config.model_dir.name,
        "architecture": spec.architecture,
        "num_layers": spec.num_layers,
        "compute_dtype": assembly.choices.compute_dtype.value,
        "collective": assembly.group.name,
        "emulation": assembly.emulation or None,
        "dilation": dilation.ratio,
        "profiled_step_ns": dilation.profiled_step_ns,
        "unprofiled_step_ns": dilation.unprofiled_step_ns,
        "command": list(facts.command),
        "versions": {"python": platform.python_version(), "torch": _torch_version()},
    }


def _torch_version() -> str:
    import torch

    return torch.__version__


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
