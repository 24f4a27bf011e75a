"""Bind this rank to cores, before it starts threads: those it starts later inherit the binding."""

import os
from collections.abc import Callable, Sequence

from tpinfer.config.environment import Environment
from tpinfer.costs.binding import ThreadWishes
from tpinfer.launching.seat import Seat


def bind_thread(cores: Sequence[int] | None) -> Callable[[], None]:
    """Bind the calling thread to `cores`; returns what takes it back, on this thread again. None,
    and cores that are gone by now, change nothing."""
    if cores is None or not hasattr(os, "sched_setaffinity"):
        return lambda: None
    former = os.sched_getaffinity(0)
    if not former.issuperset(cores):
        return lambda: None
    os.sched_setaffinity(0, cores)
    return lambda: os.sched_setaffinity(0, former)


def thread_wishes(
    environment: Environment, seat: Seat, num_usable: int, num_cores_of_parent: int | None = None
) -> ThreadWishes:
    """What the user, or a launcher, has said about this rank's threads. `num_usable` are the
    hardware threads it may run on, `num_cores_of_parent` those of the launcher's own process on
    this host; None asks the kernel."""
    asked = environment.omp_num_threads
    # What our launcher writes for itself, and torchrun's 1, are nobody's wish.
    own = seat.launcher == "tpinfer" and asked == max(1, num_usable // seat.local_world)
    if own or (seat.launcher == "torchrun" and asked == 1):
        asked = None
    is_narrow = num_usable < (os.cpu_count() or 1)
    variable = environment.affinity_variable
    if seat.launcher not in ("mpirun", "slurm") or seat.local_world == 1 or not is_narrow:
        return ThreadWishes(asked, variable)
    whole = _num_cores_of_parent() if num_cores_of_parent is None else num_cores_of_parent
    sharing = None  # where the parent has no more, all may have been given the same few cores
    if whole > num_usable:
        sharing = -(-seat.local_world * num_usable // whole)
    return ThreadWishes(asked, variable, seat.launcher, sharing)


def _num_cores_of_parent() -> int:
    """Hardware threads of the process that started this one, which launchers leave unbound; 0 where
    the kernel does not say."""
    try:
        return len(os.sched_getaffinity(os.getppid()))
    except (AttributeError, OSError):
        return 0
