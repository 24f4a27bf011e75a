"""Where one rank sits: its numbers, its device and the name of its run. Does not start or join
anything.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tpinfer.config.engine import DeviceName
from tpinfer.config.environment import Environment, RankEnvironment
from tpinfer.config.errors import ConfigError
from tpinfer.steps.liveness import process_start_ticks

Starter = Literal["tpinfer", "torchrun", "mpirun", "slurm", "single"]


@dataclass(frozen=True, slots=True)
class Seat:
    """Everything a worker needs to know about its place in the run."""

    rank: int
    """Index in the run, 0 decides."""
    world: int
    """Ranks in the run."""
    local_rank: int
    """Index among the ranks of this host."""
    local_world: int
    """Ranks on this host."""
    device: str
    """`cpu` or `cuda:<index among the visible GPUs>`."""
    run_id: str
    """Name of the run, the same on all its ranks and of no other run; letters, digits and `-`."""
    generation: int
    """How often the group was built again; 0 the first time."""
    launcher: Starter
    """What started the ranks; `single` when nothing did."""
    rendezvous: Path | None = None
    """Directory made for the ranks to meet in; None where the launcher made none."""
    ends_process: bool = False
    """The process is the rank's own and ends with it; on a GPU through `guard.leave`, so that what
    ends with a process is left to that."""


def seat_from_environment(
    environment: Environment,
    device: DeviceName = "auto",
    num_gpus: int | None = None,
    *,
    shares: bool = False,
) -> Seat:
    """The seat its launcher gave to this process; a lone rank when there is no launcher.

    `num_gpus` are those the process may use, counted from the driver's device files when None;
    `shares`: several ranks may sit on one. Raises ConfigError for device=cuda without a GPU.
    """
    if num_gpus is None:
        num_gpus = count_gpus(environment.visible_gpus)
    found = environment.rank
    if found is None:
        place = choose_device(device, 0, 1, num_gpus, shares=shares)
        return Seat(0, 1, 0, 1, place, f"single-{os.getpid()}-{_start(os.getpid())}", 0, "single")
    return Seat(
        rank=found.rank,
        world=found.world,
        local_rank=found.local_rank,
        local_world=found.local_world,
        device=choose_device(device, found.local_rank, found.local_world, num_gpus, shares=shares),
        run_id=run_id_of(found),
        generation=found.restart_count,
        launcher=found.launcher,
        rendezvous=environment.rendezvous,
    )


def run_id_of(found: RankEnvironment) -> str:
    """A name all ranks of the run agree on and no other run has.

    Our own launcher hands out such a name. Others hand out one that may come again, so it is
    hashed with what else tells runs apart: the rendezvous address, how often the group was
    restarted, on a single host the user (hosts may number users differently), and there without a
    name (torchrun's is `none` unless `--standalone` or `--rdzv-id` gives one) the launcher's
    process.
    """
    if found.launcher == "tpinfer" and found.job_id:
        return re.sub(r"[^A-Za-z0-9-]", "-", found.job_id)
    is_one_host = found.world == found.local_world
    parts: list[object] = [found.launcher, found.job_id, found.restart_count]
    parts += [found.master_addr, found.master_port]
    parts += [os.getuid()] if is_one_host else []
    # torchrun's --standalone makes a name; a profiler may then stand between it and its ranks.
    named = found.job_id not in ("", ".", "none")
    if is_one_host and not named:
        parts += [os.getppid(), _start(os.getppid())]
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=6).hexdigest()
    return f"{found.launcher}-{digest}"


def choose_device(
    wanted: DeviceName, local_rank: int, local_world: int, num_gpus: int, *, shares: bool = False
) -> str:
    """`cuda:i` or `cpu` for one rank. Auto takes GPUs when every rank of the host has its own, or
    `shares` says that they need not.

    A launcher that shows each rank one GPU (Slurm's `--gpus-per-task`) looks like one GPU shared by
    all; asking for cuda then means that one. Raises ConfigError for cuda, or sharing, without a
    GPU.
    """
    if shares and (wanted == "cpu" or num_gpus == 0):
        why = "and none is visible here" if num_gpus == 0 else "and --device cpu takes none"
        raise ConfigError(f"--share-device puts ranks on one GPU, {why}; leave it out")
    if wanted == "cpu" or (wanted == "auto" and num_gpus < local_world and not shares):
        return "cpu"
    if num_gpus == 0:
        raise ConfigError("device=cuda needs a GPU and none is visible here; use --device cpu")
    return f"cuda:{local_rank % num_gpus}"


def count_gpus(visible: Sequence[str] | None, directory: Path = Path("/dev")) -> int:
    """GPUs this process may use: the driver's device files, cut down by CUDA_VISIBLE_DEVICES."""
    present = sum(1 for path in directory.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
    if visible is None or present == 0:
        return present
    # CUDA stops reading the list at the first entry that is no device, by custom `-1`.
    count = next((i for i, name in enumerate(visible) if name.startswith("-")), len(visible))
    return count


def _start(pid: int) -> int:
    return process_start_ticks(pid) or 0
