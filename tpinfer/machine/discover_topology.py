"""A topology file for the hosts that are here: this one, or all that mpirun started ranks on."""

import json
import platform
import time
from collections.abc import Mapping
from datetime import UTC, datetime

from tpinfer.config.catalogue import Catalogue, read_catalogue
from tpinfer.config.errors import TopologyError
from tpinfer.config.strict_yaml import quoted
from tpinfer.config.topology_reader import parse_topology
from tpinfer.config.units import exact_rate, exact_time
from tpinfer.machine.discover import discover_machine
from tpinfer.machine.gpu_survey import survey_gpus
from tpinfer.machine.kfd import survey_kfd
from tpinfer.machine.nvml_driver import open_driver
from tpinfer.machine.peers import Peers, answer_pings, broadcast, gather, measure_offset
from tpinfer.machine.topology_text import HostFacts, gather_facts, host_lines

_UNKNOWN_FABRIC_BYTES_PER_S = 1.25e9
"""10 Gb/s, where no network card says what it does."""
FILE = "the discovered topology"


def discover_host() -> HostFacts:
    """What this host has: of GPUs those of NVIDIA's driver, without one those of AMD's."""
    driver, _ = open_driver()
    if driver is None:
        gpus = survey_kfd()
    else:
        try:
            gpus = survey_gpus(driver)
        finally:
            driver.close()
    return gather_facts(platform.node() or "host", discover_machine(), gpus)


def discovered_text(facts: HostFacts, slots: Mapping[str, int] | None = None) -> str:
    """The topology file of this host or, with the `slots` of a hostfile, of hosts just like it.

    Raises TopologyError for more slots than devices.
    """
    catalogue = read_catalogue()
    if slots is None:
        return _whole([_entry(facts, catalogue)], facts.gpus.driver_version)
    entries = []
    for name, count in slots.items():
        is_here = _is_same(name, facts.name)
        entries.append(_entry(facts, catalogue, name, count, "nvml" if is_here else "assumed"))
    return _whole(entries, facts.gpus.driver_version)


def discover_together(
    facts: HostFacts, peers: Peers, slots: Mapping[str, int] | None = None
) -> str | None:
    """The topology file of all hosts, on rank 0; None elsewhere. A collective call.

    The first rank of each host speaks for it. With the `slots` of a hostfile, only its hosts count,
    in its order.
    """
    catalogue = read_catalogue()
    own = {"name": facts.name, "driver": facts.gpus.driver_version}
    count = None
    if slots is not None:
        count = next((n for name, n in slots.items() if _is_same(name, facts.name)), None)
    try:
        own["entry"] = _entry(facts, catalogue, facts.name, count)
    except TopologyError as error:
        own["error"] = str(error)
    found = [json.loads(text) for text in gather(peers, json.dumps(own).encode())]
    names = [one["name"] for one in found]
    leaders = [rank for rank, name in enumerate(names) if names.index(name) == rank]
    leaders = json.loads(broadcast(peers, json.dumps(leaders).encode()))
    if peers.rank:
        if peers.rank in leaders:
            answer_pings(peers)
        return None
    for rank in leaders[1:]:
        offset = measure_offset(peers, rank)
        found[rank]["offset"] = (offset.ns, offset.error_ns)
    hosts = [found[rank] for rank in leaders]
    for host in hosts:
        if "error" in host:
            raise TopologyError(f"host {host['name']}: {host['error']}")
    if slots is not None:
        hosts = [_named(name, hosts) for name in slots]
    entries = [_with_offset(host) for host in hosts]
    return _whole(entries, hosts[0]["driver"])


def _named(name: str, hosts: list[dict]) -> dict:
    for host in hosts:
        if _is_same(name, host["name"]):
            return host
    known = ", ".join(host["name"] for host in hosts)
    raise TopologyError(
        f"host {name} of the hostfile has no rank here; mpirun started some on {known}: give it "
        "the same hosts"
    )


def _is_same(name: str, other: str) -> bool:
    """Whether two names mean one host: `node1` and `node1.cluster.local` do."""
    one_is_short = "." not in name or "." not in other
    return name == other or (one_is_short and name.split(".")[0] == other.split(".")[0])


def _entry(
    facts: HostFacts,
    catalogue: Catalogue,
    name: str | None = None,
    count: int | None = None,
    origin: str = "nvml",
) -> dict:
    """A host's lines, and what a fabric to it would be."""
    num_cards = len(facts.gpus.cards)
    most = num_cards or facts.machine.num_cores
    if count is not None and count > most:
        raise TopologyError(
            f"the hostfile gives {name} {count} slots, but this host has {most} "
            f"{'GPUs' if num_cards else 'cores'}; lower slots"
        )
    here = name is None or _is_same(name, facts.name)
    lines = host_lines(facts, catalogue, None if here else name, count, origin)
    total = sum(port.bytes_per_s for port in facts.nics)
    share = total / max(1, count or num_cards or 1)
    most_rate = max((port.bytes_per_s for port in facts.nics), default=0.0)
    return {
        "name": facts.name if here else name,
        "lines": lines,
        "fabric": facts.nics[0].type if facts.nics else "tcp",
        "rails": sum(port.rdma for port in facts.nics) or 1,
        "bytes_per_s": min(share, most_rate),
    }


def _with_offset(host: dict) -> dict:
    entry = host["entry"]
    if "offset" in host:
        ns, error_ns = host["offset"]
        sign = "-" if ns < 0 else ""
        note = f" # against the first host, by ping-pong, +- {exact_time(error_ns / 1e9)}"
        entry["lines"].append(f"    clock_offset: {sign}{exact_time(abs(ns) / 1e9)}{note}")
    return entry


def _whole(entries: list[dict], driver: str | None) -> str:
    """The file. What it says is read back, so that it never says what cannot be read."""
    names = [entry["name"] for entry in entries]
    now = datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    lines = [
        "# Found by `tpinfer topo discover`. Rates are what ports and memory carry at most;",
        "# `tpinfer topo probe` measures what of it can be reached.",
        "version: 1",
        f"name: {quoted(names[0] if len(names) == 1 else f'{names[0]}-x{len(names)}')}",
        f"discovered: {{date: {quoted(now)}" + (f", driver: {quoted(driver)}}}" if driver else "}"),
        "hosts:",
        *(line for entry in entries for line in entry["lines"]),
    ]
    if len(entries) > 1:
        types = {entry["fabric"] for entry in entries}
        rate = min(entry["bytes_per_s"] for entry in entries)
        row = [
            "kind: NET",
            f"type: {types.pop() if len(types) == 1 else 'tcp'}",
            f"rails: {min(entry['rails'] for entry in entries)}",
            f"hosts: [{', '.join(quoted(name) for name in names)}]",
            f"bw: {exact_rate(rate or _UNKNOWN_FABRIC_BYTES_PER_S)}",
            f"from: {'nvml' if rate else 'assumed'}",
        ]
        lines += ["fabric:", f"  - {{{', '.join(row)}}}"]
    text = "\n".join(lines) + "\n"
    parse_topology(text, FILE)
    return text
