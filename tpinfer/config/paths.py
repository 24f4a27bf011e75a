"""Which path two devices of one host use: NCCL's rule for peer-to-peer copies.

NCCL 2.30, src/graph/paths.cc (ncclTopoCheckP2p): GPUs copy to each other directly over NVLink and
over PCIe up to a switch (PXB), but not through the CPU's host bridge; except on AMD processors for
groups with two GPUs at most, where they do even between sockets. NCCL_P2P_LEVEL overrides it. What
may not be copied directly goes through the host's memory (SHM).
"""

from dataclasses import replace

from tpinfer.config.machine_parts import Device, Host, Link

NVLINK_KINDS = ("NVL", "NVB", "C2C")
PCIE_KINDS = ("PIX", "PXB", "PHB", "SYS")
LEVELS = (*NVLINK_KINDS, *PCIE_KINDS)
"""Wires from near to far."""
_MOST_GPUS_ON_AMD = 2


def peer_level(host: Host, num_gpus: int) -> int:
    """How many of `LEVELS`, from the first on, a group with `num_gpus` GPUs of this host may use
    for peer-to-peer copies. NCCL sees the group's GPUs only, however many the host has."""
    if host.p2p == "false":
        return 0
    if host.p2p == "true":
        return len(LEVELS)
    if host.p2p != "auto":
        return LEVELS.index(host.p2p) + 1
    is_amd = host.cpu_vendor == "amd" and host.cpu_arch != "aarch64"
    if is_amd and num_gpus <= _MOST_GPUS_ON_AMD:
        return len(LEVELS)
    return LEVELS.index("PXB") + 1


def may_copy(host: Host, first: Device, second: Device, kind: str, num_gpus: int) -> bool:
    """Whether two devices use a wire of this kind without the host's memory between.

    MIG slices have no peer-to-peer copies (github.com/NVIDIA/nccl/issues/1716), nor do cards whose
    driver offers none over PCIe.
    """
    if first.mig or second.mig:
        return False
    offered = first.copies_to_peers and second.copies_to_peers
    if kind in PCIE_KINDS and host.p2p != "true" and not offered:
        return False
    return LEVELS.index(kind) < peer_level(host, num_gpus)


def paths_within(host: Host, first: str, second: str, num_gpus: int | None = None) -> list[Link]:
    """Paths that two devices of a host can use within a group that has `num_gpus` GPUs there (None:
    all). Empty where nothing joins them."""
    if host.computes_on_cpu:
        return list(host.links)
    joining = [link for link in host.links if link.joins(first, second)]
    one, other = host.device(first), host.device(second)
    count = num_gpus or len(host.devices)
    usable = [
        link
        for link in joining
        if link.kind not in LEVELS or may_copy(host, one, other, link.kind, count)
    ]
    if usable or not joining:
        return usable
    return [_staged(host, one, other, joining)]


def distance(link: Link) -> int:
    """How far its kind reaches: wires between GPUs, then a host's memory and networks, and last
    sockets, which ranks of a host use only where nothing nearer joins them."""
    if link.kind in LEVELS:
        return LEVELS.index(link.kind)
    return len(LEVELS) + (link.kind == "GLOO")


_SOCKET_SHARE = 0.75
"""Of the wire between sockets, in copies through host memory. Assumed: with NCCL's 16 GB/s it is
what the L40S servers of TensorRT-LLM's performance pages need, whose eight cards on two sockets sum
at 13 GB/s or more."""


def _staged(host: Host, first: Device, second: Device, wires: list[Link]) -> Link:
    """The path through the host's memory: over PCIe, as fast as its slowest wire on the way. The
    share of a wire that staged copies reach is PCIe's; the sockets' own wire reaches more."""
    on_pcie = [link for link in wires if link.kind in PCIE_KINDS]
    ports = [d.pcie_bytes_per_s for d in (first, second) if d.pcie_bytes_per_s is not None]
    wire = wires[0]
    if on_pcie:
        wire = min(on_pcie, key=lambda link: (distance(link), -link.bytes_per_s))
    traits = host.staged
    share = traits.attainable if traits else wire.attainable
    rate = min(ports, default=wire.bytes_per_s)
    if on_pcie and wire.kind != "SYS":
        rate = min(rate, wire.bytes_per_s)
    elif on_pcie and (not ports or wire.bytes_per_s * _SOCKET_SHARE < rate * share):
        rate, share = wire.bytes_per_s, _SOCKET_SHARE
    return replace(
        wire,
        kind="SHM",
        bytes_per_s=rate,
        attainable=share,
        latency_s=traits.latency_s if traits else wire.latency_s,
        per_peer_s=traits.per_peer_s if traits else wire.per_peer_s,
        via="host memory",
        instead_of=wire.kind,
    )
