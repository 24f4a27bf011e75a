"""Two ranks however they are started: the same tokens, no open doors, and no trace left whoever is
killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cpu.cli_program import quick_generate
from tests.cpu.ranks import run_ranks
from tests.cpu.running import LAUNCHERS, Running, endless_model, files_of
from tests.cpu.tpinfer_command import REPOSITORY, json_lines, user_environment
from tpinfer.collectives.deepspeed_shm import library_path, why_not
from tpinfer.launching.sweep import sweep_stale
from tpinfer.machine.discover import discover_machine

pytestmark = pytest.mark.ranks
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}
SHORT = ("--prompt", "Once upon", "--greedy", "--ignore-eos", "--max-tokens", "8")


def deepspeed_is_used() -> bool:
    machine = discover_machine()
    facts = machine.cpu_flags, 2, machine.num_cores, machine.shared_memory_free_bytes
    return library_path().is_file() and why_not(*facts) is None


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless_model(tmp_path_factory.mktemp("models") / "endless")


@pytest.fixture
def errors(tmp_path: Path) -> Path:
    return tmp_path / "errors"


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """What one rank writes."""
    out = tmp_path_factory.mktemp("one") / "out.jsonl"
    done = quick_generate("test-launchers-one", *SHORT, "--json", out)
    assert done.value == 0, done.output
    return json_lines(out)[0]["token_ids"]


def mpirun() -> list[str]:
    options = ["-n", "2", "--bind-to", "none", "--oversubscribe", "--allow-run-as-root"]
    return ["mpirun", *options, sys.executable, "-m", "tpinfer", "generate"]


needs_mpi = pytest.mark.skipif(
    find_spec("mpi4py") is None or shutil.which("mpirun") is None,
    reason="mpi4py or mpirun is missing; pip install 'tpinfer[mpi]'",
)


@pytest.mark.parametrize(
    "launcher", ["fork", "processes", "torchrun", pytest.param("mpirun", marks=needs_mpi)]
)
def test_every_launcher_gives_the_same_tokens(
    launcher: str, expected: list[int], tmp_path: Path
) -> None:
    command = mpirun() if launcher == "mpirun" else LAUNCHERS[launcher]
    run = subprocess.Popen(
        [*command, *SHORT, "--json", str(tmp_path / "out.jsonl")],
        cwd=REPOSITORY, env=user_environment(), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    out, err = run.communicate(timeout=100)
    assert run.returncode == 0, err
    (entry,) = json_lines(tmp_path / "out.jsonl")
    assert entry["token_ids"] == expected
    assert out == "Once upon" + entry["text"] + "\n"
    assert files_of([run.pid]) == []


def test_two_runs_at_once_and_what_dead_ones_left(expected: list[int], tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    shm = Path("/dev/shm")
    stale = [
        shm / f"tpinfer-{gone.pid}-run-0123-plans",
        shm / f"deepspeed_allreduce_buffer_0_tpinfer-{gone.pid}-run-0123-g0_0_1",
    ]
    kept = shm / f"tpinfer-{os.getpid()}-run-4567-plans"
    for path in (*stale, kept):
        path.touch()
    try:
        runs = [
            subprocess.Popen(
                [*LAUNCHERS["fork"], *SHORT, "--json", str(tmp_path / f"{i}.jsonl")],
                cwd=REPOSITORY, env=user_environment(), stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
            for i in range(2)
        ]  # fmt: skip
        assert [run.wait(timeout=100) for run in runs] == [0, 0]
        assert [path for path in stale if path.exists()] == []
        assert kept.exists()
    finally:
        kept.unlink()
    for i in range(2):
        assert json_lines(tmp_path / f"{i}.jsonl")[0]["token_ids"] == expected


@pytest.mark.parametrize(
    ("launcher", "flags"),
    [("fork", ()), ("fork", ("--collective", "gloo")), ("processes", ()), ("torchrun", ())],
)
def test_a_killed_launcher_takes_its_ranks_along(
    launcher: str, flags: tuple[str, ...], endless: Path, errors: Path
) -> None:
    """Until then they listen on loopback at most, and nothing of theirs has a name in /dev/shm.

    torchrun's own process is another matter: its store binds all interfaces.
    """
    with Running(launcher, endless, errors, *flags) as run:
        assert len(run.ranks) == 2
        ours = run.ranks if launcher == "torchrun" else run.pids
        listening = run.listening(ours)
        assert listening <= LOOPBACK and bool(listening) == bool(flags)
        assert run.files() == []
        run.process.kill()
        run.assert_gone(2.0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run_and_is_named(rank: int, endless: Path, errors: Path) -> None:
    """With DeepSpeed's collective, where it is built: it waits in native code for ever."""
    with Running("fork", endless, errors, deepspeed=deepspeed_is_used()) as run:
        os.kill(run.ranks[rank], signal.SIGKILL)
        assert run.wait(5.0) == 128 + signal.SIGKILL
        assert run.told().startswith(f"rank {rank} failed: killed by SIGKILL")
        assert "Traceback" not in run.told()
        run.assert_gone(0.0)


def test_a_hung_rank_ends_the_run_and_its_step_is_told(endless: Path, errors: Path) -> None:
    """Not that it was killed, which is what follows."""
    with Running("fork", endless, errors, "--step-timeout", "2") as run:
        time.sleep(1.0)  # the first step has a longer deadline
        os.kill(run.ranks[1], signal.SIGSTOP)
        assert run.wait(25.0) == 1
        [failed] = [line for line in run.told().splitlines() if " failed: " in line]
        assert failed.startswith("rank 0 failed: step ")
        assert "is not done after 2 s; not reported by rank 1" in failed
        run.assert_gone(1.0)


@pytest.mark.parametrize(
    ("launcher", "deepspeed"), [("single", False), ("fork", False), ("fork", True)]
)
def test_an_interrupt_stops_cleanly(
    launcher: str, deepspeed: bool, endless: Path, errors: Path
) -> None:
    if deepspeed and not deepspeed_is_used():
        pytest.skip("DeepSpeed's op is not built, or not safe here")
    with Running(launcher, endless, errors, deepspeed=deepspeed) as run:
        run.process.send_signal(signal.SIGINT)
        assert run.wait(5.0) == 128 + signal.SIGINT
        assert run.told() == "stopped"
        run.assert_gone(0.0)


def test_ranks_under_torchrun_stop_when_it_is_interrupted(endless: Path, errors: Path) -> None:
    with Running("torchrun", endless, errors) as run:
        for pid in run.pids:  # as a terminal does it
            os.kill(pid, signal.SIGINT)
        run.wait(10.0)
        assert "stopped" in run.told() and "failed: " not in run.told()
        run.assert_gone(0.0)


@pytest.mark.skipif(not deepspeed_is_used(), reason="DeepSpeed's op is not built, or not safe here")
def test_deepspeeds_segments_are_swept_too(run_name: str) -> None:
    left: list[Path] = []
    for attempt in range(3):  # any other launcher on this machine may sweep before they are seen
        name = f"{run_name}-{attempt}"
        outcomes = run_ranks("tests.cpu.deepspeed_program:killed_while_opening", 2, name)
        assert [outcome.exit_status for outcome in outcomes] == [-signal.SIGKILL] * 2
        left = sorted(Path("/dev/shm").glob(f"deepspeed_*_tpinfer-*{name}*"))
        if len(left) == 2:
            break
    assert len(left) == 2
    sweep_stale()
    assert not any(path.exists() for path in left)


def test_more_ranks_asked_for_than_started(run_name: str) -> None:
    """What a rank under torchrun says; nobody waits for anybody."""
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    done = quick_generate(run_name, *SHORT, "--tp", "3", variables=launched)
    assert done.value == 1
    assert "rank 0 failed: --tp 3, but 2 ranks were started; start 3 ranks or" in done.output


def in_small_shm(size: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Two ranks where /dev/shm holds `size`."""
    mounted = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "--map-root-user", "--mount", "bash", "-c", mounted, "bash"]
    return subprocess.run(
        [*command, *LAUNCHERS["fork"], *SHORT, *flags],
        cwd=REPOSITORY, env=user_environment(), capture_output=True, text=True, timeout=100,
    )  # fmt: skip


def test_a_small_shm_is_named_and_gloo_is_the_way_out(expected: list[int]) -> None:
    probe = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    done = in_small_shm("2m")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "/dev/shm has 2.1 MB free and the group needs" in done.stderr
    assert "use --collective gloo" in done.stderr
    done = in_small_shm("2m", "--collective", "gloo")
    assert done.returncode == 0 and done.stdout.startswith("Once upon"), done.stderr
    done = in_small_shm("64k", "--collective", "gloo")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the step plans need about 1 MB of /dev/shm (No space left on device)" in done.stderr
