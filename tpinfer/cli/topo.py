"""`tpinfer topo`: find out what a machine is made of, look at it, and see what would hurt."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tpinfer.cli.set_flag import add_set_flag
from tpinfer.cli.topo_probe import add_probe_flags, run_probe
from tpinfer.config.errors import ConfigError
from tpinfer.config.topology import Topology

EPILOG = """FILE is a topology file or the name of a shipped one (dgx-h100); left out, this machine.

examples:
  tpinfer topo discover -o box.yaml
  mpirun -n 2 --host node1,node2 tpinfer topo discover --hostfile hosts -o cluster.yaml
  tpinfer topo show dgx-h100
  tpinfer topo check box.yaml --set placement.tp=4
  tpinfer topo probe box.yaml --tp 2
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare all flags."""
    parser.add_argument(
        "action",
        choices=["discover", "show", "check", "probe"],
        help="discover: write the topology file of this host, or under mpirun of all hosts; "
        "show: draw it with rates and where they come from; check: say what would hurt; probe: "
        "measure what ranks reach and write FILE.measured.yaml beside it",
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="for show, check and probe")
    parser.add_argument("-o", "--output", metavar="FILE", help="discover, probe: write it there")
    parser.add_argument(
        "--hostfile",
        metavar="FILE",
        help="discover: hosts and slots as DeepSpeed lists them; without mpirun all are taken to "
        "be like this one",
    )
    add_set_flag(parser)
    add_probe_flags(parser.add_argument_group("probe"))


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Do one action."""
    if args.action == "probe":
        if args.hostfile or args.set:
            raise ConfigError("topo probe takes neither --hostfile nor --set; see --help")
        return run_probe(args, argv)
    if args.action == "discover":
        if args.file is not None or args.set:
            raise ConfigError("topo discover takes no FILE and no --set; write with -o FILE")
        return _discover(args)
    if args.output or args.hostfile:
        raise ConfigError(f"topo {args.action} takes neither -o nor --hostfile; see --help")
    topology = _topology(args)
    if args.action == "show":
        from tpinfer.cli.topo_show import draw

        print(draw(topology))
        return 0
    return _check(topology)


def _discover(args: argparse.Namespace) -> int:
    from tpinfer.cli.generate_flags import check_output
    from tpinfer.config.environment import read_environment
    from tpinfer.machine.discover_topology import (
        discover_host,
        discover_together,
        discovered_text,
    )
    from tpinfer.machine.hostfile import read_hostfile

    if args.output:
        check_output("-o", args.output)
    slots = read_hostfile(Path(args.hostfile)) if args.hostfile else None
    rank = read_environment().rank
    if rank is not None and rank.launcher == "mpirun" and rank.world > 1:
        from tpinfer.machine.peers import MpiPeers

        text = discover_together(discover_host(), MpiPeers(), slots)
    else:
        text = discovered_text(discover_host(), slots)
    if text is None:
        return 0
    if args.output:
        Path(args.output).write_text(text, encoding="utf-8")
        print(f"{args.output} is written; `tpinfer topo check {args.output}` says what would hurt")
    else:
        sys.stdout.write(text)
    return 0


def _topology(args: argparse.Namespace) -> Topology:
    from tpinfer.config.topology_reader import load_topology, parse_topology

    if args.file is not None:
        return load_topology(args.file, args.set)
    from tpinfer.machine.discover_topology import discover_host, discovered_text

    return parse_topology(discovered_text(discover_host()), "this machine", None, args.set)


def _check(topology: Topology) -> int:
    from tpinfer.config.environment import read_environment
    from tpinfer.config.topology_check import check_topology

    found = check_topology(topology, read_environment().visible_gpus)
    for finding in found:
        print(f"{'hurts' if finding.hurts else 'note '}  {finding.where}: {finding.what}")
        print(f"       {finding.remedy}")
    if not any(finding.hurts for finding in found):
        print(f"{topology.file}: nothing here would hurt")
        return 0
    return 1
