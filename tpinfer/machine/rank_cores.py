"""Which cores of this machine a rank gets: the facts that `costs.binding` decides by."""

from tpinfer.config.environment import read_environment
from tpinfer.config.topology import Topology
from tpinfer.costs.binding import Binding, CoreLayout, choose_binding
from tpinfer.launching.binding import thread_wishes
from tpinfer.launching.seat import Seat
from tpinfer.machine.discover import Machine


def rank_binding(seat: Seat, machine: Machine, topology: Topology | None = None) -> Binding:
    """Where a CPU rank runs: by the memory nodes that a topology of this one host lists, else by
    what the kernel says."""
    nodes = machine.numa_nodes
    if topology is not None and len(topology.hosts) == 1 and topology.hosts[0].numa_cores:
        listed = topology.hosts[0].numa_cores
        usable = (tuple(c for c in node if c in machine.cores) for node in listed)
        nodes = tuple(node for node in usable if node) or nodes
    num_usable = len(machine.cores)
    granted = machine.num_cores if machine.num_cores < num_usable else None
    layout = CoreLayout(nodes, machine.core_siblings, granted)
    wishes = thread_wishes(read_environment(), seat, num_usable)
    return choose_binding(layout, seat.local_rank, seat.local_world, wishes)
