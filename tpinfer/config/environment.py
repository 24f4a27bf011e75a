"""The only reader of the process environment. Everything else gets these records as arguments.

Ranks are recognised by what started them: tpinfer's own launcher, torchrun, Open MPI or another
mpirun, or a Slurm step. A process that none of them started has no `rank`.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tpinfer.config.errors import ConfigError

Launcher = Literal["tpinfer", "torchrun", "mpirun", "slurm"]


@dataclass(frozen=True, slots=True)
class RankEnvironment:
    """Where this process stands among the ranks of its run, as its launcher says."""

    launcher: Launcher
    rank: int
    world: int
    local_rank: int
    """Index among the ranks of this host."""
    local_world: int
    """Ranks on this host."""
    job_id: str
    """The launcher's name for the run, the same on all ranks; not unique in time, may be empty."""
    restart_count: int = 0
    """How often an elastic launcher has started this group again."""
    master_addr: str | None = None
    """Host of rank 0, where the launcher says."""
    master_port: int | None = None

    def __post_init__(self) -> None:
        pairs = (("rank", self.rank, self.world), ("local rank", self.local_rank, self.local_world))
        for name, index, count in pairs:
            if not 0 <= index < count:
                raise ConfigError(
                    f"{self.launcher} says {name} {index} of {count}; unset variables left over "
                    "from another launcher"
                )


@dataclass(frozen=True, slots=True)
class Environment:
    """Everything tpinfer takes from environment variables."""

    rank: RankEnvironment | None
    """None where nothing started this process as a rank."""
    rendezvous: Path | None
    """TPINFER_RENDEZVOUS: directory in which the ranks of a run meet."""
    error_file: Path | None
    """TPINFER_ERROR_FILE: where a failing rank leaves its error for the launcher."""
    hf_cache: Path
    """Hugging Face's cache of hub checkpoints."""
    user_cache: Path
    """tpinfer's own cache, for what it compiles."""
    omp_num_threads: int | None
    """OMP_NUM_THREADS."""
    affinity_variable: str | None
    """The variable, where one is set, that tells OpenMP where its threads run."""
    test_worker: str | None
    """Name of the pytest-xdist worker, such as `gw0`; keeps parallel tests' files apart."""
    visible_gpus: tuple[str, ...] | None
    """CUDA_VISIBLE_DEVICES: indices or UUIDs; None where it is unset."""
    plan_port: int | None
    """TPINFER_PLAN_PORT: where rank 0 listens for ranks of other hosts."""
    token: str | None = field(repr=False)
    """TPINFER_TOKEN: the secret that ranks of several hosts share."""
    token_file: Path | None
    """TPINFER_TOKEN_FILE: a file that holds it instead."""


SPIN_COUNT = "2000"
"""Rounds of libgomp's waiting loop; of 2,000, 20,000 and none the fastest on two busy cores."""


_AFFINITY = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")


def read_environment(environ: Mapping[str, str] | None = None) -> Environment:
    """Read `environ`, by default this process's. Raises ConfigError naming the variable."""
    found = os.environ if environ is None else environ
    home = Path(found.get("HOME") or Path.home())
    cache = Path(found.get("XDG_CACHE_HOME") or home / ".cache")
    hub = found.get("HF_HUB_CACHE") or found.get("HUGGINGFACE_HUB_CACHE")
    hf_home = Path(found.get("HF_HOME") or cache / "huggingface")
    gpus = found.get("CUDA_VISIBLE_DEVICES")
    listed = [name.strip() for name in (gpus or "").split(",")]
    return Environment(
        rank=_rank(found),
        rendezvous=_path(found, "TPINFER_RENDEZVOUS"),
        error_file=_path(found, "TPINFER_ERROR_FILE"),
        hf_cache=Path(hub).expanduser() if hub else hf_home.expanduser() / "hub",
        user_cache=cache.expanduser() / "tpinfer",
        omp_num_threads=_optional_count(found, "OMP_NUM_THREADS"),
        affinity_variable=next((name for name in _AFFINITY if found.get(name)), None),
        test_worker=found.get("PYTEST_XDIST_WORKER") or None,
        visible_gpus=None if gpus is None else tuple(filter(None, listed)),
        plan_port=_optional_integer(found, "TPINFER_PLAN_PORT"),
        token=found.get("TPINFER_TOKEN") or None,
        token_file=_path(found, "TPINFER_TOKEN_FILE"),
    )


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `extra` on top, for a process about to be started."""
    return {**os.environ, **extra}


def export_variables(values: Mapping[str, str]) -> None:
    """Set variables of this process, for native libraries that read settings from nowhere else."""
    os.environ.update(values)


def export_defaults(values: Mapping[str, str]) -> None:
    """As `export_variables`, but what the user has set stays."""
    export_variables({name: value for name, value in values.items() if name not in os.environ})


def calm_thread_pools() -> None:
    """Let OpenMP's threads spin only shortly before they sleep, unless the user has said how long.

    Call before torch is imported. By default they spin long; where another process wants a core,
    every op then waits for a thread that cannot run: 29 ms a token of the story model instead of 3
    on two busy cores.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def _rank(found: Mapping[str, str]) -> RankEnvironment | None:
    if "TPINFER_LAUNCHER" in found or ("TORCHELASTIC_RUN_ID" in found and "RANK" in found):
        return _torchrun_rank(found)
    if "OMPI_COMM_WORLD_RANK" in found:
        job = found.get("PMIX_NAMESPACE") or found.get("OMPI_MCA_ess_base_jobid") or ""
        return _mpi_rank(
            found, job, "OMPI_COMM_WORLD_", ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        )
    if "RANK" in found and "WORLD_SIZE" in found:
        return _torchrun_rank(found)
    if "SLURM_PROCID" in found and _integer(found, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _slurm_rank(found)
    if "PMI_RANK" in found and "MPI_LOCALRANKID" in found:
        names = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
        return _mpi_rank(found, found.get("PMI_ID", ""), "", names)
    return None


def _torchrun_rank(found: Mapping[str, str]) -> RankEnvironment:
    world = _integer(found, "WORLD_SIZE")
    rank = _integer(found, "RANK")
    return RankEnvironment(
        launcher="tpinfer" if found.get("TPINFER_LAUNCHER") == "tpinfer" else "torchrun",
        rank=rank,
        world=world,
        local_rank=_integer(found, "LOCAL_RANK", rank),
        local_world=_integer(found, "LOCAL_WORLD_SIZE", world),
        job_id=found.get("TORCHELASTIC_RUN_ID", ""),
        restart_count=_integer(found, "TORCHELASTIC_RESTART_COUNT", 0),
        master_addr=found.get("MASTER_ADDR"),
        master_port=_optional_integer(found, "MASTER_PORT"),
    )


def _mpi_rank(
    found: Mapping[str, str], job_id: str, prefix: str, names: tuple[str, str, str, str]
) -> RankEnvironment:
    rank, world, local_rank, local_world = (_integer(found, prefix + name) for name in names)
    return RankEnvironment(
        "mpirun",
        rank,
        world,
        local_rank,
        local_world,
        job_id,
        0,
        found.get("MASTER_ADDR"),
        _optional_integer(found, "MASTER_PORT"),
    )


def _slurm_rank(found: Mapping[str, str]) -> RankEnvironment:
    """A task of an `srun` step; a batch script has SLURM_PROCID too, but no several tasks."""
    world = _integer(found, "SLURM_STEP_NUM_TASKS")
    per_node = _tasks_per_node(found.get("SLURM_STEP_TASKS_PER_NODE") or str(world))
    node = _integer(found, "SLURM_NODEID", 0)
    if node >= len(per_node):
        raise ConfigError(
            f"SLURM_NODEID={node} lies outside SLURM_STEP_TASKS_PER_NODE="
            f"{found.get('SLURM_STEP_TASKS_PER_NODE')!r}; start the ranks with one srun"
        )
    return RankEnvironment(
        launcher="slurm",
        rank=_integer(found, "SLURM_PROCID"),
        world=world,
        local_rank=_integer(found, "SLURM_LOCALID"),
        local_world=per_node[node],
        job_id=f"{found.get('SLURM_JOB_ID', '')}.{found.get('SLURM_STEP_ID', '')}",
        restart_count=_integer(found, "SLURM_RESTART_COUNT", 0),
        master_addr=found.get("MASTER_ADDR"),
        master_port=_optional_integer(found, "MASTER_PORT"),
    )


def _tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE={text!r} is not of the form 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _integer(found: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = found.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise ConfigError(f"{name} is not set though others of its launcher are; set all or none")
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"{name}={text!r} is not a whole number; let the launcher set it"
        ) from None


def _optional_integer(found: Mapping[str, str], name: str) -> int | None:
    return _integer(found, name) if found.get(name) else None


def _optional_count(found: Mapping[str, str], name: str) -> int | None:
    """A thread count; of OpenMP's list, one per nesting level, the first counts."""
    text = found.get(name, "").split(",")[0].strip()
    return int(text) if text.isdigit() and int(text) > 0 else None


def _path(found: Mapping[str, str], name: str) -> Path | None:
    return Path(found[name]) if found.get(name) else None
