"""Where ranks can go, and with what settings the engine is started there.

A replica is `pp` stages of `tp` ranks; there are `dp` of them. Groups of ranks are laid so that as
few as possible span hosts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tpinfer.config.errors import ConfigError, TopologyError
from tpinfer.config.model import ModelSpec
from tpinfer.config.topology import Place, Placement, Topology


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What the engine is started with, in so far as it bears on speed and memory."""

    max_num_seqs: int
    """Most sequences of a replica in one step."""
    max_num_batched_tokens: int = 2048
    memory_utilization: float = 0.9
    block_size: int = 16

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} {getattr(self, name)} must be 1 or more")
        if not 0 < self.memory_utilization <= 1:
            raise ConfigError(
                f"--memory-utilization {self.memory_utilization:g} must be above 0 and at most 1"
            )


def sizes_to_try(topology: Topology, spec: ModelSpec) -> Iterator[tuple[int, int, int]]:
    """Every (tp, pp, dp) with no more ranks than devices and as many query heads on each. Uneven
    cuts run too, but kernels of odd sizes are not what rates were measured on."""
    count = num_devices(topology)
    for tp in range(1, count + 1):
        if spec.num_heads % tp:
            continue
        for pp in range(1, count // tp + 1):
            for dp in range(1, count // (tp * pp) + 1):
                yield tp, pp, dp


def num_devices(topology: Topology) -> int:
    """Devices of all hosts."""
    return sum(len(host.devices) for host in topology.hosts)


def place(topology: Topology, tp: int, pp: int, dp: int) -> Placement:
    """Lay out so many ranks, the file's own way where it says one for these numbers.

    Raises TopologyError where there are too few devices, or none in one piece.
    """
    own = topology.placement
    if own is not None and (own.tp, own.pp, own.dp) == (tp, pp, dp):
        return own
    shares = own.shares if own is not None and own.tp == tp else None
    wanted, there = tp * pp * dp, num_devices(topology)
    if wanted > there and not (topology.hosts[0].computes_on_cpu and pp * dp == 1):
        raise TopologyError(
            f"tp={tp} x pp={pp} x dp={dp} are {wanted} ranks, and {topology.file} has {there} "
            "devices; lower one of them"
        )
    if any(host.computes_on_cpu for host in topology.hosts):
        return Placement(tp, pp, dp, shares=shares)
    groups = _groups(topology, tp)
    if len(groups) < pp * dp:
        raise TopologyError(
            f"tp={tp} fits {len(groups)} times into the hosts of {topology.file}, and pp={pp} x "
            f"dp={dp} want {pp * dp}; use a tp that divides the devices of a host"
        )
    return Placement(tp, pp, dp, groups=groups[: pp * dp], shares=shares)


def _groups(topology: Topology, tp: int) -> tuple[tuple[Place, ...], ...]:
    """Groups of `tp` devices: within hosts, or over whole hosts where one has too few."""
    found: list[tuple[Place, ...]] = []
    left: list[Place] = []
    for host in topology.hosts:
        places = [(host.name, device.id) for device in host.devices]
        if tp <= len(places):
            found += [tuple(places[i : i + tp]) for i in range(0, len(places) - tp + 1, tp)]
        else:
            left += places
            while len(left) >= tp:
                found.append(tuple(left[:tp]))
                left = []  # the next group begins on a host of its own
    return tuple(found)
