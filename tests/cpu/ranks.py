"""Run a function in several rank processes and bring back what it returned.

    values = rank_values("tests.cpu.collective_cases:sums", 2, run_name, {"native": True})

The function gets a `Seat` and the keyword arguments, in a fresh process of its own, and returns
something JSON can hold. One server process per pytest worker has torch imported already and forks
the ranks, so that a run costs tens of ms. Every run is limited in time; what is left is killed by
pid, and nothing survives the server, which does not survive pytest.
"""

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from tpinfer.launching.guard import die_with_parent
from tpinfer.launching.seat import Seat

REPOSITORY = Path(__file__).resolve().parents[2]
_START_S, _LOOK_AGAIN_S = 60.0, 1e-3


@dataclass(frozen=True)
class RankOutcome:
    """How one rank ended."""

    rank: int
    value: Any
    """What the function returned; None where it did not."""
    error: str
    """Traceback of the exception it raised, else empty."""
    exit_status: int
    """0, 1 after an exception, -n when signal n ended it."""
    timed_out: bool
    """Killed at the time limit."""
    seconds: float
    """From the start of the run to this rank's end."""
    output: str
    """End of its standard output and error."""


def run_ranks(
    target: str,
    size: int,
    run_id: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    timeout_s: float = 30.0,
    variables: Mapping[str, str] | None = None,
) -> list[RankOutcome]:
    """Run `module:function` as `size` CPU ranks of the run `run_id`, each on one thread.

    `variables` are added to the ranks' environment. Ranks still running after `timeout_s` are
    killed. Raises RuntimeError where the server itself fails.
    """
    request = {
        "target": target,
        "size": size,
        "run_id": run_id,
        "arguments": dict(arguments or {}),
        "timeout_s": timeout_s,
        "variables": dict(variables or {}),
    }
    server = _server()
    if server.poll() is not None:
        _server.cache_clear()
        server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    ready, _, _ = select.select([server.stdout], [], [], timeout_s + _START_S)
    line = server.stdout.readline() if ready else ""
    if not line:
        server.kill()
        server.wait()
        _server.cache_clear()
        raise RuntimeError(f"the rank server gave no answer to {request}")
    return [RankOutcome(**outcome) for outcome in json.loads(line)]


def rank_values(
    target: str,
    size: int,
    run_id: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    timeout_s: float = 30.0,
    variables: Mapping[str, str] | None = None,
) -> list[Any]:
    """What each rank returned, in rank order; fails the test unless every rank ended well."""
    outcomes = run_ranks(target, size, run_id, arguments, timeout_s=timeout_s, variables=variables)
    failed = [o for o in outcomes if o.exit_status]
    told = "\n".join(
        f"rank {o.rank}: status {o.exit_status}{', timed out' if o.timed_out else ''} after "
        f"{o.seconds:.1f} s\n{o.error}{o.output}"
        for o in failed
    )
    assert not failed, told
    return [outcome.value for outcome in outcomes]


@cache
def _server() -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tests.cpu.ranks", str(os.getpid())],
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@dataclass
class _Running:
    """A forked rank, as the server sees it."""

    rank: int
    pid: int
    report: IO[str]
    output: IO[str]
    status: int | None = None
    seconds: float = 0.0
    timed_out: bool = False

    def outcome(self) -> RankOutcome:
        assert self.status is not None, "asked for after the rank has ended"
        self.report.seek(0)
        text = self.report.read()
        told = json.loads(text) if text else {"value": None, "error": ""}
        self.output.seek(0)
        tail = self.output.read()[-4000:]
        self.report.close()
        self.output.close()
        return RankOutcome(
            self.rank, told["value"], told["error"], self.status, self.timed_out, self.seconds, tail
        )


def _serve(parent: int) -> None:
    """Answer requests, a line each, until standard input ends."""
    die_with_parent(parent)
    importlib.import_module("torch").set_num_threads(1)
    for line in sys.stdin:
        outcomes = _run(json.loads(line))
        print(json.dumps([asdict(outcome) for outcome in outcomes]), flush=True)


def _run(request: dict[str, Any]) -> list[RankOutcome]:
    began_s = time.monotonic()
    ranks = [_fork(rank, request) for rank in range(request["size"])]
    while alive := [running for running in ranks if running.status is None]:
        elapsed_s = time.monotonic() - began_s
        for running in alive:
            pid, status = os.waitpid(running.pid, os.WNOHANG)
            if pid:
                running.status = os.waitstatus_to_exitcode(status)
                running.seconds = elapsed_s
            elif elapsed_s > request["timeout_s"] and not running.timed_out:
                running.timed_out = True
                os.kill(running.pid, signal.SIGKILL)
        time.sleep(_LOOK_AGAIN_S)
    return [running.outcome() for running in ranks]


def _fork(rank: int, request: dict[str, Any]) -> _Running:
    # Both stay open until the rank has ended; `outcome` closes them.
    report = tempfile.TemporaryFile("w+")  # noqa: SIM115
    output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
    server = os.getpid()
    pid = os.fork()
    if pid:
        return _Running(rank, pid, report, output)
    code = 1
    try:
        die_with_parent(server)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        code = _be_rank(rank, request, report)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _be_rank(rank: int, request: dict[str, Any], report: IO[str]) -> int:
    size, told = request["size"], {"value": None, "error": ""}
    os.environ.update(request["variables"])
    try:
        module, _, function = request["target"].partition(":")
        seat = Seat(rank, size, rank, size, "cpu", request["run_id"], 0, "tpinfer")
        told["value"] = getattr(importlib.import_module(module), function)(
            seat, **request["arguments"]
        )
        text = json.dumps(told)
    except BaseException:
        told = {"value": None, "error": traceback.format_exc()}
        text = json.dumps(told)
    report.write(text)
    report.flush()
    return 1 if told["error"] else 0


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
