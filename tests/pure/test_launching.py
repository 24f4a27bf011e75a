"""Ranks started, watched and ended by `launching`, with tiny programs in place of the engine."""

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tpinfer.launching.sweep import remove_run, sweep_stale
from tpinfer.steps.liveness import is_running

pytestmark = pytest.mark.ranks

GUARDED = """
import ctypes, os, signal, sys, time
from pathlib import Path
from tpinfer.config.environment import read_environment
from tpinfer.config.errors import ConfigError
from tpinfer.launching.guard import guard_rank, run_rank
from tpinfer.launching.seat import seat_from_environment
environment = read_environment()
seat = seat_from_environment(environment, "cpu")
def body():
    Path(sys.argv[1], f"pid{seat.rank}").write_text(str(os.getpid()))
    while len(list(Path(sys.argv[1]).glob("pid*"))) < seat.world:
        time.sleep(0.01)
{body}
    return 0
guard_rank(seat)
sys.exit(run_rank(seat, environment, body))
"""
WAIT = "    time.sleep(60)"

Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(params=["fork", "processes"])
def start(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def launch(tmp_path: Path, python_path: str) -> Launch:
    """Start the launcher in its own process: program, rank count, start method, options."""

    def begin(
        program: str, num_ranks: int, start: str, stdin: int | None = None, options: str = ""
    ) -> subprocess.Popen[str]:
        (tmp_path / "program.py").write_text(program)
        code = (
            "import sys; from tpinfer.launching.ranks import launch;"
            f"sys.exit(launch([{str(tmp_path)!r}, 'x y'], {num_ranks}, start={start!r},"
            f" module='program', {options}))"
        )
        return subprocess.Popen(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": python_path, "PATH": os.environ["PATH"]},
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


def guarded(body: str) -> str:
    return GUARDED.replace("{body}", body)


def rank_pids(directory: Path, count: int) -> list[int]:
    """Process ids of the ranks, once each has written its own."""
    deadline_s = time.monotonic() + 15
    while time.monotonic() < deadline_s:
        texts = [path.read_text() for path in sorted(directory.glob("pid*"))]
        if len(texts) == count and all(texts):
            return [int(text) for text in texts]
        time.sleep(0.01)
    raise AssertionError(f"{count} ranks did not start")


def seconds_until_gone(pids: list[int]) -> float:
    began_s = time.monotonic()
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() - began_s < 10, f"still there: {pids}"
        time.sleep(0.01)
    return time.monotonic() - began_s


def left_behind(pid: int) -> list[Path]:
    return list(Path("/dev/shm").glob(f"tpinfer-{pid}-*"))


def test_ranks_find_torchruns_environment_and_their_arguments(launch: Launch, start: str) -> None:
    program = (
        "import os, sys; e = os.environ; assert os.path.isdir(e['TPINFER_RENDEZVOUS'])\n"
        "assert sys.argv[2] == 'x y' and __name__ == '__main__'\n"
        "names = 'RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR OWN'.split()\n"
        "open(sys.argv[1] + '/out' + e['RANK'], 'w').write(' '.join(e[n] for n in names)\n"
        "    + ' ' + e['TORCHELASTIC_RUN_ID'])\n"
    )
    run = launch(program, 3, start, options="variables={'OWN': 'mine'}")
    out, err = run.communicate(timeout=20)
    assert (run.returncode, out, err) == (0, "", "")
    directory = Path(run.args[2].split("'")[1])  # type: ignore[index]
    lines = [(directory / f"out{rank}").read_text().split() for rank in range(3)]
    assert [line[:-1] for line in lines] == [
        f"{rank} {rank} 3 3 127.0.0.1 mine".split() for rank in range(3)
    ]
    assert len({line[-1] for line in lines}) == 1
    assert left_behind(run.pid) == []


def test_standard_input_goes_to_rank_0_alone(launch: Launch, start: str) -> None:
    program = "import os, sys; print(os.environ['RANK'], repr(sys.stdin.read()), flush=True)"
    run = launch(program, 2, start, stdin=subprocess.PIPE)
    out, _ = run.communicate("hello", timeout=20)
    assert sorted(out.splitlines()) == ["0 'hello'", "1 ''"]


def test_what_is_typed_at_a_terminal_reaches_rank_0(
    python_path: str, tmp_path: Path, start: str
) -> None:
    """Ranks are background groups there: reading the terminal themselves would stop them."""
    (tmp_path / "program.py").write_text(
        "import os, sys; sys.stdout.write(f'<{os.environ[\"RANK\"]} {sys.stdin.read()!r}>')"
    )
    code = (
        "import sys; from tpinfer.launching.ranks import launch;"
        f"sys.exit(launch([], 2, start={start!r}, module='program'))"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-c", code], {"PYTHONPATH": python_path})
    os.write(terminal, b"typed\n\x04")
    shown = b""
    with contextlib.suppress(OSError):  # what a terminal answers once nobody holds its other side
        while arrived := os.read(terminal, 1000):
            shown += arrived
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0
    assert b"<0 'typed\\n'>" in shown and b"<1 ''>" in shown


def test_the_first_error_stands_on_top(launch: Launch, start: str, tmp_path: Path) -> None:
    body = (
        "    if seat.rank == 1: raise ArithmeticError('lost\\nmy way')\n"
        "    time.sleep(0.3); raise RuntimeError('peer is gone')"
    )
    began_s = time.monotonic()
    run = launch(guarded(body), 3, start)
    _, err = run.communicate(timeout=20)
    assert time.monotonic() - began_s < 5
    assert run.returncode == 1
    assert err.startswith("rank 1 failed: ArithmeticError: lost\nTraceback")
    assert "peer is gone" not in err
    assert left_behind(run.pid) == []


def test_an_error_for_the_user_needs_no_traceback(launch: Launch, start: str) -> None:
    run = launch(guarded("    raise ConfigError('tp=9 is too many; use 8')"), 1, start)
    assert run.communicate(timeout=20)[1] == "rank 0 failed: tp=9 is too many; use 8\n"


def test_a_killed_rank_ends_the_run(launch: Launch, start: str, tmp_path: Path) -> None:
    run = launch(guarded(WAIT), 2, start)
    pids = rank_pids(tmp_path, 2)
    os.kill(pids[1], signal.SIGKILL)
    began_s = time.monotonic()
    _, err = run.communicate(timeout=20)
    assert time.monotonic() - began_s < 5
    assert run.returncode == 128 + signal.SIGKILL
    assert err.startswith("rank 1 failed: killed by SIGKILL")
    assert not any(is_running(pid) for pid in pids)


def test_a_crash_in_native_code_shows_where(launch: Launch, start: str) -> None:
    run = launch(guarded("    ctypes.string_at(0)"), 1, start)
    _, err = run.communicate(timeout=20)
    assert err.startswith(
        "rank 0 failed: killed by SIGSEGV\nFatal Python error: Segmentation fault"
    )
    assert 'program.py", line' in err
    assert run.returncode == 128 + signal.SIGSEGV


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on_and_stop_cleanly(
    launch: Launch, start: str, tmp_path: Path, number: signal.Signals
) -> None:
    body = f"    try:\n    {WAIT}\n    finally: print('swept up', flush=True)"
    run = launch(guarded(body), 2, start)
    pids = rank_pids(tmp_path, 2)
    time.sleep(0.2)
    began_s = time.monotonic()
    run.send_signal(number)
    out, err = run.communicate(timeout=20)
    assert time.monotonic() - began_s < 2
    assert (run.returncode, err) == (128 + number, "")
    assert out == "swept up\n" * 2
    assert not any(is_running(pid) for pid in pids)


def test_a_rank_stuck_in_native_code_is_killed(launch: Launch, start: str, tmp_path: Path) -> None:
    """A mutex taken twice: like a spinning collective, it never comes back to the interpreter."""
    body = (
        "    mutex = ctypes.create_string_buffer(64); lock = ctypes.CDLL(None).pthread_mutex_lock\n"
        "    lock(mutex); lock(mutex)"
    )
    run = launch(guarded(body), 2, start)
    pids = rank_pids(tmp_path, 2)
    time.sleep(0.2)
    began_s = time.monotonic()
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=20)
    assert 1.5 < time.monotonic() - began_s < 4
    assert run.returncode == 130
    assert not any(is_running(pid) for pid in pids)


def test_no_rank_survives_its_killed_launcher(launch: Launch, start: str, tmp_path: Path) -> None:
    run = launch(guarded(WAIT), 2, start)
    pids = rank_pids(tmp_path, 2)
    with contextlib.ExitStack() as held:  # any other launcher on this machine sweeps what is free
        for path in left_behind(run.pid):
            descriptor = os.open(path, os.O_RDONLY)
            held.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        run.kill()
        assert seconds_until_gone(pids) < 2
        run.communicate(timeout=5)
        assert left_behind(run.pid), "a killed launcher cannot sweep; the next start must"
    sweep_stale()
    assert left_behind(run.pid) == []


def test_a_guarded_rank_dies_with_any_launcher(tmp_path: Path, python_path: str) -> None:
    """As under torchrun and mpirun: a parent that knows nothing of us."""
    (tmp_path / "program.py").write_text(guarded(WAIT))
    code = (
        "import subprocess, sys, os, time\n"
        "for rank in '01':\n"
        "    e = dict(os.environ, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE='2', LOCAL_WORLD_SIZE='2',"
        " TORCHELASTIC_RUN_ID='none')\n"
        "    subprocess.Popen([sys.executable, '-m', 'program', sys.argv[1]], env=e)\n"
        "time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env={"PYTHONPATH": python_path}
    )
    pids = rank_pids(tmp_path, 2)
    time.sleep(0.1)
    parent.kill()
    parent.wait()
    assert seconds_until_gone(pids) < 2


def test_fork_imports_once_and_shares_it(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "heavy.py").write_text(
        "import os; open(os.path.dirname(__file__) + '/imports', 'a').write('x')\n"
        "MAKER = os.getpid()"
    )
    program = "import heavy, os; assert heavy.MAKER == os.getppid()"
    for start in ("fork", "auto"):
        run = launch(program, 3, start, options="preload=['heavy']")
        assert run.communicate(timeout=20) == ("", "")
        assert run.returncode == 0
    assert (tmp_path / "imports").read_text() == "xx"


def test_auto_does_not_fork_beside_other_threads(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "threads.py").write_text(
        "import threading as t, time; t.Thread(target=time.sleep, args=(1,), daemon=True).start()"
    )
    program = "import sys; assert 'threads' not in sys.modules"
    run = launch(program, 2, "auto", options="preload=['threads']")
    assert run.communicate(timeout=20) == ("", "")
    refused = launch(program, 2, "fork", options="preload=['threads']")
    assert "start=fork needs a process with one thread" in refused.communicate(timeout=20)[1]
    assert refused.returncode == 1


def test_exit_codes_reach_the_caller(launch: Launch, start: str) -> None:
    run = launch("import sys; sys.exit(7)", 2, start)
    _, err = run.communicate(timeout=20)
    assert run.returncode == 7
    assert err.endswith("failed: exit code 7 without a message\n")


def test_a_reader_that_leaves_ends_the_run_quietly(launch: Launch, start: str) -> None:
    body = "    for _ in range(10**9 if seat.rank == 0 else 0): print('text', flush=True)\n" + (
        "    time.sleep(60)"
    )
    run = launch(guarded(body), 2, start)
    assert run.stdout is not None and run.stderr is not None
    assert run.stdout.readline() == "text\n"
    run.stdout.close()
    assert run.wait(timeout=10) == 128 + signal.SIGPIPE
    assert run.stderr.read() == ""


def test_sweep_takes_what_nobody_owns(tmp_path: Path) -> None:
    gone = 2**22 + 1
    for name in (f"tpinfer-{gone}-run-a-plans", f"tpinfer-{os.getpid()}-run-a-plans", "other-1-x"):
        (tmp_path / name).touch()
    (tmp_path / f"tpinfer-{gone}-run-b-rendezvous").mkdir()
    (tmp_path / f"tpinfer-{gone}-run-b-rendezvous" / "store").touch()
    deepspeed = f"deepspeed_allreduce_buffer_0_tpinfer-{gone}-run-a-g0_0_1"
    (tmp_path / deepspeed).touch()
    (tmp_path / "deepspeed_allreduce_buffer_0_127.0.0.1_29500_0").touch()
    reused = tmp_path / f"tpinfer-{os.getpid()}-old"
    reused.touch()
    os.utime(reused, (1.0, 1.0))
    names = sorted(path.name for path in sweep_stale(tmp_path))
    assert names == sorted(
        [
            deepspeed,
            f"tpinfer-{gone}-run-a-plans",
            f"tpinfer-{gone}-run-b-rendezvous",
            reused.name,
        ]
    )
    (tmp_path / deepspeed).touch()
    mine = f"tpinfer-{os.getpid()}-run-a-plans"
    assert sorted(p.name for p in remove_run("run-a", tmp_path)) == [deepspeed, mine]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["deepspeed_allreduce_buffer_0_127.0.0.1_29500_0", "other-1-x"]
