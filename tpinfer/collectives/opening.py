"""From a choice to an open group: the facts are gathered here, the decision is `choose`'s."""

import contextlib
import importlib.util
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tpinfer.collectives.build_ring import build_ring
from tpinfer.collectives.choose import (
    CollectiveChoice,
    CollectiveFacts,
    choose_collective,
    deepspeed_reason,
)
from tpinfer.collectives.deepspeed_shm import DeepSpeedGroup, library_path, why_not
from tpinfer.collectives.group import Group, SingleGroup
from tpinfer.collectives.host_staged import HostStagedGroup
from tpinfer.collectives.mpi import MpiGroup
from tpinfer.collectives.shared_memory import open_shared_memory
from tpinfer.collectives.sized import SizedGroup
from tpinfer.config.errors import RankError
from tpinfer.costs.collective_sizes import CollectiveCurves
from tpinfer.launching.seat import Seat

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


def gather_facts(
    device_type: str,
    world: int,
    local_world: int,
    launcher: str,
    machine_facts: tuple[frozenset[str], int, int],
    num_gpus: int,
) -> CollectiveFacts:
    """Facts of this machine. machine_facts: CPU flags, usable cores, free bytes of /dev/shm."""
    library, ring_reason = build_ring()
    flags, num_cores, shm_free_bytes = machine_facts
    not_safe = why_not(flags, local_world, num_cores, shm_free_bytes)
    return CollectiveFacts(
        device_type=device_type,
        world=world,
        local_world=local_world,
        launcher=launcher,
        num_gpus=num_gpus,
        has_mpi=importlib.util.find_spec("mpi4py") is not None,
        has_native_ring=library is not None,
        ring_reason=ring_reason,
        deepspeed_reason=deepspeed_reason(library_path().is_file(), not_safe),
        machine=platform.machine(),
    )


def open_group(
    wanted: str,
    seat: Seat,
    device: torch.device,
    timeout_s: float,
    machine_facts: tuple[frozenset[str], int, int],
    progress: Callable[[str], None] = lambda text: None,
    curves: CollectiveCurves | None = None,
    shared: str | None = None,
) -> tuple[Group, CollectiveChoice]:
    """Choose and connect. A collective call. `curves`: see `choose_collective`. `progress` hears
    of strangers and ranks of other hosts that were turned away. `shared`: None where each rank has
    a device of its own, else `CollectiveFacts.nccl_shares`. Raises ConfigError or RankError.
    """
    num_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if seat.world == 1:
        facts = CollectiveFacts(
            device.type, 1, 1, seat.launcher, num_gpus, False, False, "", "one rank"
        )
    else:
        facts = gather_facts(
            device.type, seat.world, seat.local_world, seat.launcher, machine_facts, num_gpus
        )
    facts = replace(facts, shares_device=shared is not None, nccl_shares=shared or "")
    choice = choose_collective(wanted, facts, curves)
    if choice.name == "symmetric_memory":
        group, choice = _open_symmetric(choice, seat, device, timeout_s)
    else:
        group = _open(choice, seat, device, timeout_s, machine_facts[1], progress)
    if choice.variant == "symmetric":
        group, choice = _with_pool(group, choice, device)
    if choice.large is not None:
        try:
            group = _beside(group, choice, seat, device, timeout_s, machine_facts[1])
        except BaseException:
            group.abort()
            group.close()
            raise
    if seat.rank == 0 and seat.world > 1:
        with contextlib.suppress(OSError):  # not made, or somebody else's files are in it
            _meeting_root(seat).rmdir()  # all have met: even SIGKILL leaves nothing from here on
    return group, choice


def open_part(
    whole: Group, choice: CollectiveChoice, seat: Seat, ranks: range, device: torch.device,
    timeout_s: float, num_cores: int,
) -> Group:  # fmt: skip
    """Connect `ranks`, this one among them, by the backend that connects all. Every rank of the run
    calls it at once, each with the ranks of its own part; a part is adjoining ranks, of one host or
    of several. Raises RankError."""
    place, size = seat.rank - ranks.start, len(ranks)
    if choice.name == "mpi":
        return MpiGroup(place, size, ranks.start)
    if choice.name == "shared_memory":
        name = f"{seat.run_id}-g{seat.generation}-part{ranks.start}"
        native = False if choice.variant == "python" else None
        # A part spins only where the whole may: its ranks share their cores with the other parts.
        cores = num_cores if seat.local_world <= num_cores else 0
        return open_shared_memory(name, place, size, timeout_s, cores, native)
    if seat.world > seat.local_world:
        return _open_over_hosts(
            choice, seat, device, timeout_s, "part", (place, size, f"{ranks.start}/")
        )
    from tpinfer.collectives.torch_groups import directory_store

    directory = _meeting_root(seat) / f"g{seat.generation}" / f"part{ranks.start}"
    if seat.rank == 0:
        _meeting_place(seat)
    whole.barrier()
    directory.mkdir(mode=0o700, exist_ok=True)
    store = directory_store(directory, size, timeout_s)
    part = _open_torch(choice, store, (place, size), seat, device, timeout_s)
    part.barrier()
    whole.barrier()
    if seat.rank == 0:
        shutil.rmtree(directory.parent, ignore_errors=True)
        with contextlib.suppress(OSError):
            _meeting_root(seat).rmdir()
    return part


def _beside(
    small: Group, choice: CollectiveChoice, seat: Seat, device: torch.device, timeout_s: float,
    num_cores: int,
) -> Group:  # fmt: skip
    """`small` with the second backend that `choice` names. The two meet under names of their own;
    DeepSpeed's op is built around our ring, so these two share one."""
    large_choice = choice.large
    assert large_choice is not None, "there is a second backend"
    if large_choice.variant == "deepspeed":
        named = f"{seat.run_id}-g{seat.generation}"
        large: Group = DeepSpeedGroup(small, library_path(), named)
    elif isinstance(small, DeepSpeedGroup) and large_choice.name == small.name:
        large = small.ring
    else:
        large = _open(large_choice, seat, device, timeout_s, num_cores, lambda text: None)
    return SizedGroup(small, large, choice.from_bytes)


def _open(
    choice: CollectiveChoice, seat: Seat, device: torch.device, timeout_s: float, num_cores: int,
    progress: Callable[[str], None],
) -> Group:  # fmt: skip
    if choice.name == "none":
        return SingleGroup()
    if choice.name == "mpi":
        return MpiGroup(seat.rank, seat.world)
    if choice.name == "shared_memory":
        name = f"{seat.run_id}-g{seat.generation}-ring"
        native = False if choice.variant == "python" else None
        ring = open_shared_memory(name, seat.rank, seat.world, timeout_s, num_cores, native)
        if choice.variant == "deepspeed":
            return DeepSpeedGroup(ring, library_path(), f"{seat.run_id}-g{seat.generation}")
        return ring
    if seat.world > seat.local_world:
        whole = seat.rank, seat.world, ""
        return _open_over_hosts(choice, seat, device, timeout_s, "whole", whole, progress)
    # torch.distributed is slow to import and most CPU runs never need it.
    from tpinfer.collectives.torch_groups import directory_store

    directory = _meeting_place(seat)
    store = directory_store(directory, seat.world, timeout_s)
    group = _open_torch(choice, store, (seat.rank, seat.world), seat, device, timeout_s)
    group.barrier()
    if seat.rank == 0:
        shutil.rmtree(directory, ignore_errors=True)
    return group


def _open_symmetric(
    choice: CollectiveChoice, seat: Seat, device: torch.device, timeout_s: float
) -> tuple[Group, CollectiveChoice]:
    """The group, and the choice as it came out."""
    from torch._C._distributed_c10d import PrefixStore

    from tpinfer.collectives.torch_groups import directory_store

    directory = _meeting_place(seat)
    store = directory_store(directory, seat.world, timeout_s)
    rest = _open_torch(choice, store, (seat.rank, seat.world), seat, device, timeout_s)
    try:
        from tpinfer.collectives.device_group import open_device_group

        name = f"tpinfer-{seat.run_id}-g{seat.generation}"
        apart = PrefixStore("symmetric", store)
        group, words, why = open_device_group(rest, apart, name, device)
        group.barrier()
    except BaseException:
        rest.abort()
        rest.close()
        raise
    if seat.rank == 0:
        shutil.rmtree(directory, ignore_errors=True)
    variant = f"({words})" if group is not rest else ""
    return group, replace(
        choice, name=group.name, variant=variant, reason=f"{choice.reason}; {why}"
    )


def _with_pool(
    nccl: Group, choice: CollectiveChoice, device: torch.device
) -> tuple[Group, CollectiveChoice]:
    """NCCL with a symmetric pool where it can be had, and the choice as it came out."""
    from tpinfer.collectives.nccl_pool import open_pool_group
    from tpinfer.collectives.torch_groups import TorchGroup

    assert isinstance(nccl, TorchGroup), "the choice is NCCL's"
    try:
        group, words, why = open_pool_group(nccl, nccl.process_group, device)
    except BaseException:
        nccl.abort()
        nccl.close()
        raise
    return group, replace(choice, variant=words, reason=f"{choice.reason}; {why}")


def _open_over_hosts(
    choice: CollectiveChoice, seat: Seat, device: torch.device, timeout_s: float, purpose: str,
    place: tuple[int, int, str], progress: Callable[[str], None] = lambda text: None,
) -> Group:  # fmt: skip
    """place: this rank's index in the group, the group's size, and what its keys begin with."""
    from tpinfer.collectives.meeting import meet
    from tpinfer.collectives.torch_groups import MeetingStore

    index, size, name = place
    with meet(seat, purpose, timeout_s, progress) as meeting:
        store = MeetingStore(meeting, name)
        group = _open_torch(choice, store, (index, size), seat, device, timeout_s, meeting.address)
        group.barrier()
    return group


def _open_torch(
    choice: CollectiveChoice, store: "Store", place: tuple[int, int], seat: Seat,
    device: torch.device, timeout_s: float, address: str = "127.0.0.1",
) -> Group:  # fmt: skip
    from tpinfer.collectives.torch_groups import open_gloo, open_nccl

    if (choice.rest or choice.name) == "gloo":
        gloo = open_gloo(store, *place, timeout_s, address)
        if device.type == "cpu":
            return gloo
        return HostStagedGroup(gloo, device)
    return open_nccl(store, place, device, timeout_s, shuts_down=not seat.ends_process)


def _meeting_place(seat: Seat) -> Path:
    """A directory only this user can enter, the same for all ranks of the run."""
    directory = _meeting_root(seat) / f"g{seat.generation}"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = directory.stat()
    if owner.st_mode & 0o077:
        raise RankError(f"{directory} can be entered by others; remove it and start again")
    return directory


def _meeting_root(seat: Seat) -> Path:
    if seat.rendezvous is not None:
        return seat.rendezvous
    return Path(tempfile.gettempdir()) / f"tpinfer-{seat.run_id}"
