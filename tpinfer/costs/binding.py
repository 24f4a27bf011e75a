"""On which cores a rank runs and with how many threads, by the host's memory nodes. Pure.

Ranks are bound to whole memory nodes, never to single cores: a node keeps a rank's weights and
cache beside its cores, and within it the kernel can still give rank 0's other threads (scheduler,
tokenizer, server) whatever core is idle just then, such as that of a rank that waits in a sum.
Bound to single cores those threads would take turns with rank 0's own products, and all ranks would
wait for it. So a host with one node is left to the kernel.
"""

from dataclasses import dataclass

from tpinfer.sharding.partition import cut_evenly


@dataclass(frozen=True, slots=True)
class CoreLayout:
    """What a rank's process may run on."""

    nodes: tuple[tuple[int, ...], ...]
    """Usable hardware threads of each memory node that has any."""
    siblings: tuple[tuple[int, ...], ...] = ()
    """Usable hardware threads of each core; empty where the kernel does not say."""
    num_granted: int | None = None
    """Hardware threads' worth of CPU time, where a cgroup grants less than there are."""

    def num_cores(self, threads: tuple[int, ...]) -> int:
        """Cores behind some hardware threads; each counts once, whatever runs on it."""
        if not self.siblings:
            return len(threads)
        return sum(bool(set(core) & set(threads)) for core in self.siblings)


@dataclass(frozen=True, slots=True)
class ThreadWishes:
    """What the user has said in other ways."""

    num_threads: int | None = None
    """OMP_NUM_THREADS, where it is the user's."""
    affinity_variable: str | None = None
    """Variable that tells OpenMP where its threads run, such as GOMP_CPU_AFFINITY."""
    bound_by: str | None = None
    """Launcher that has bound this rank already, such as mpirun."""
    num_sharing: int | None = None
    """Ranks that it has bound to the same cores; None where that is unknown, and may be all."""


@dataclass(frozen=True, slots=True)
class Binding:
    """Where one rank runs."""

    cores: tuple[int, ...] | None
    """Hardware threads to bind the process to; None leaves it as it is."""
    place_reason: str
    num_threads: int
    threads_reason: str

    @property
    def place(self) -> str:
        """For people."""
        return "as it is" if self.cores is None else _cores(self.cores)


def choose_binding(
    layout: CoreLayout, local_rank: int, local_world: int, wishes: ThreadWishes | None = None
) -> Binding:
    """Where rank `local_rank` of the `local_world` on this host runs."""
    wishes = wishes or ThreadWishes()
    cores, why = _place(layout, local_rank, local_world, wishes)
    if wishes.num_threads is not None:
        return Binding(cores, why, wishes.num_threads, "OMP_NUM_THREADS says so")
    everything = tuple(thread for node in layout.nodes for thread in node)
    if cores is None or wishes.bound_by is not None:
        here, sharing = everything, wishes.num_sharing or local_world
    else:
        here, sharing = cores, max(1, local_world // len(layout.nodes))
    count, threads = layout.num_cores(here), len(here)
    reason = f"{_counted(count, 'core')} over {_counted(sharing, 'rank')}"
    if count < threads:
        reason += f"; {threads} hardware threads are not counted twice"
    granted = layout.num_granted
    if granted is not None and granted < layout.num_cores(everything):
        count = min(count, max(1, granted * len(here) // len(everything)))
        reason = (
            f"{granted} cores' worth of time, which the cgroup grants, over {local_world} ranks"
        )
    return Binding(cores, why, max(1, count // sharing), reason)


def _place(
    layout: CoreLayout, local_rank: int, local_world: int, wishes: ThreadWishes
) -> tuple[tuple[int, ...] | None, str]:
    nodes = layout.nodes
    if wishes.affinity_variable is not None:
        return None, f"{wishes.affinity_variable} is set"
    if wishes.bound_by is not None:
        return None, f"{wishes.bound_by} has bound it already"
    if len(nodes) < 2:
        return None, (
            "one memory node: every core is equally near, and rank 0's scheduler runs on whichever "
            "is idle"
        )
    everything = sum(map(len, nodes))
    if layout.num_granted is not None and layout.num_granted < everything:
        return None, (
            f"a cgroup grants {layout.num_granted} of {everything} cores' time: whose turn it is "
            "where is the kernel's to say"
        )
    if local_world == 1:
        return None, f"one rank uses the cores and the memory of all {len(nodes)} nodes"
    if local_world % len(nodes) and len(nodes) % local_world:
        return None, f"{local_world} ranks do not divide over {len(nodes)} nodes"
    units = cut_evenly(max(len(nodes), local_world), [1.0] * local_world)
    first, last = units[local_rank]
    if local_world > len(nodes):
        first = first * len(nodes) // local_world
        last = first + 1
    cores = tuple(sorted(thread for node in nodes[first:last] for thread in node))
    named = f"node {first}" if last - first == 1 else f"nodes {first}-{last - 1}"
    return cores, (
        f"{local_world} ranks on {len(nodes)} nodes: {named} {_cores(cores)}; its "
        "memory lies there too, since pages go to the node that first touches them"
    )


def _cores(cores: tuple[int, ...]) -> str:
    return f"core{'' if len(cores) == 1 else 's'} {core_ranges(cores)}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def core_ranges(cores: tuple[int, ...]) -> str:
    """(0, 1, 2, 8) as `0-2,8`."""
    parts: list[list[int]] = []
    for core in sorted(cores):
        if parts and core == parts[-1][1] + 1:
            parts[-1][1] = core
        else:
            parts.append([core, core])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)
