"""Seats from each launcher's variables, and names of runs that neither collide nor differ between
ranks.
"""

from pathlib import Path

import pytest

from tpinfer.config.environment import read_environment
from tpinfer.config.errors import ConfigError
from tpinfer.launching.seat import Seat, choose_device, count_gpus, seat_from_environment

TORCHRUN = {
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-host-77@1",
}
SLURM = {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_JOB_ID": "31",
    "SLURM_STEP_ID": "0",
}
RANK_NAMES = {
    "torchrun": ("RANK", "LOCAL_RANK"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "slurm": ("SLURM_PROCID", "SLURM_LOCALID"),
}
SHARED = {"torchrun": TORCHRUN, "mpirun": MPIRUN, "slurm": SLURM}


def seat(launcher: str, rank: int, **changed: str) -> Seat:
    own = dict.fromkeys(RANK_NAMES[launcher], str(rank))
    environ = {**SHARED[launcher], **own, **changed}
    return seat_from_environment(read_environment(environ), "cpu")


@pytest.mark.parametrize("launcher", SHARED)
def test_ranks_of_a_run_agree_on_its_name(launcher: str) -> None:
    first, second = seat(launcher, 0), seat(launcher, 1)
    assert (first.rank, second.rank, first.world, second.local_world) == (0, 1, 2, 2)
    assert first.launcher == launcher
    assert first.run_id == second.run_id
    assert all(letter.isalnum() or letter == "-" for letter in first.run_id)


@pytest.mark.parametrize(
    ("launcher", "name", "value"),
    [
        ("torchrun", "TORCHELASTIC_RUN_ID", "other"),
        ("torchrun", "MASTER_PORT", "29501"),
        ("torchrun", "TORCHELASTIC_RESTART_COUNT", "2"),
        ("mpirun", "PMIX_NAMESPACE", "prterun-host-78@1"),
        ("slurm", "SLURM_STEP_ID", "1"),
    ],
)
def test_other_runs_have_other_names(launcher: str, name: str, value: str) -> None:
    assert seat(launcher, 0).run_id != seat(launcher, 0, **{name: value}).run_id


def test_restarts_count_as_generations() -> None:
    assert seat("torchrun", 0).generation == 1


def test_our_launcher_names_the_run_itself() -> None:
    found = seat("torchrun", 1, TPINFER_LAUNCHER="tpinfer", TORCHELASTIC_RUN_ID="run-1f")
    assert (found.launcher, found.run_id) == ("tpinfer", "run-1f")


def test_a_lone_process_is_rank_0_of_1() -> None:
    found = seat_from_environment(read_environment({}), "cpu")
    assert (found.rank, found.world, found.launcher, found.device) == (0, 1, "single", "cpu")


@pytest.mark.parametrize(
    ("wanted", "local_rank", "local_world", "num_gpus", "device"),
    [
        ("auto", 1, 2, 2, "cuda:1"),
        ("auto", 1, 2, 1, "cpu"),
        ("auto", 0, 1, 0, "cpu"),
        ("cuda", 1, 2, 1, "cuda:0"),
        ("cpu", 0, 1, 8, "cpu"),
    ],
)
def test_devices(
    wanted: str, local_rank: int, local_world: int, num_gpus: int, device: str
) -> None:
    assert choose_device(wanted, local_rank, local_world, num_gpus) == device  # type: ignore[arg-type]


def test_ranks_share_a_gpu_where_they_may() -> None:
    assert choose_device("auto", 3, 4, 2, shares=True) == "cuda:1"
    assert choose_device("auto", 0, 1, 1, shares=True) == "cuda:0"
    for wanted, num_gpus in (("auto", 0), ("cpu", 1)):
        with pytest.raises(ConfigError, match="--share-device"):
            choose_device(wanted, 0, 2, num_gpus, shares=True)  # type: ignore[arg-type]


def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="use --device cpu"):
        choose_device("cuda", 0, 1, 0)


def test_gpus_are_counted_from_device_files(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert count_gpus(None, tmp_path) == 3
    assert count_gpus(("2",), tmp_path) == 1
    assert count_gpus(("0", "-1", "1"), tmp_path) == 1
    assert count_gpus((), tmp_path) == 0
    assert count_gpus(("0",), tmp_path / "none") == 0
