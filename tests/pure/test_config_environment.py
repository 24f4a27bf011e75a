"""Ranks are recognised by their launcher's variables, and half-set variables are refused."""

import os
from pathlib import Path

import pytest

from tpinfer.config.environment import (
    SPIN_COUNT,
    RankEnvironment,
    calm_thread_pools,
    child_environment,
    read_environment,
)
from tpinfer.config.errors import ConfigError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "job",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-7",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_JOB_ID": "11",
    "SLURM_STEP_ID": "0",
}
HYDRA = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}


def rank(environ: dict[str, str]) -> RankEnvironment:
    found = read_environment(environ).rank
    assert found is not None
    return found


def test_nothing_set_is_no_rank():
    assert read_environment({}).rank is None


def test_torchrun():
    assert rank(TORCHRUN) == RankEnvironment("torchrun", 3, 4, 1, 2, "job", 2, "127.0.0.1", 29500)
    assert rank(TORCHRUN | {"TPINFER_LAUNCHER": "tpinfer"}).launcher == "tpinfer"


def test_open_mpi_hydra_and_slurm():
    assert rank(OPEN_MPI) == RankEnvironment("mpirun", 1, 2, 1, 2, "prterun-7")
    assert rank(HYDRA) == RankEnvironment("mpirun", 0, 2, 0, 2, "")
    assert rank(SLURM) == RankEnvironment("slurm", 5, 7, 1, 2, "11.0")


def test_a_batch_script_is_not_a_rank():
    assert read_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}).rank is None


def test_mpirun_inside_a_slurm_step_wins():
    assert rank(SLURM | OPEN_MPI).launcher == "mpirun"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (TORCHRUN | {"RANK": "x"}, "RANK='x'"),
        (TORCHRUN | {"RANK": "4"}, "rank 4 of 4"),
        ({k: v for k, v in TORCHRUN.items() if k != "WORLD_SIZE"}, "WORLD_SIZE is not set"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "2"}, "local rank 2 of 2"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "many"}, "many"),
        (SLURM | {"SLURM_NODEID": "4"}, "SLURM_NODEID=4"),
    ],
)
def test_inconsistent_variables_are_named(environ, message):
    with pytest.raises(ConfigError, match=message):
        read_environment(environ)


def test_hub_cache_follows_hugging_faces_order():
    assert read_environment({"HOME": "/h"}).hf_cache == Path("/h/.cache/huggingface/hub")
    assert read_environment({"HOME": "/h", "HF_HOME": "/x"}).hf_cache == Path("/x/hub")
    both = {"HF_HOME": "/x", "HF_HUB_CACHE": "/y"}
    assert read_environment(both).hf_cache == Path("/y")


def test_threads_worker_and_gpus():
    found = read_environment(
        {"OMP_NUM_THREADS": "4,2", "PYTEST_XDIST_WORKER": "gw1", "CUDA_VISIBLE_DEVICES": "0, 2"}
    )
    assert (found.omp_num_threads, found.test_worker) == (4, "gw1")
    assert found.visible_gpus == ("0", "2")
    assert read_environment({"CUDA_VISIBLE_DEVICES": ""}).visible_gpus == ()
    assert read_environment({}).visible_gpus is None


def test_children_get_the_extra_variables():
    assert child_environment({"TPINFER_X": "1"})["TPINFER_X"] == "1"


def test_thread_pools_are_calmed_unless_the_user_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    calm_thread_pools()
    assert os.environ["GOMP_SPINCOUNT"] == SPIN_COUNT
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    calm_thread_pools()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    calm_thread_pools()
    assert "GOMP_SPINCOUNT" not in os.environ
