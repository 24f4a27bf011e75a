"""`tpinfer topo probe`: measure what the ranks of this machine reach and write the measured layer
of its topology."""

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from tpinfer.cli.generate_flags import check_output
from tpinfer.cli.rank_start import run_on_ranks
from tpinfer.config.errors import ConfigError
from tpinfer.config.measured import DeviceMeasurement, GroupMeasurement, Measurement
from tpinfer.config.measured_yaml import measured_path, read_measured, write_measured
from tpinfer.config.topology import Topology
from tpinfer.config.topology_reader import load_topology

if TYPE_CHECKING:
    from tpinfer.collectives.group import Group
    from tpinfer.config.measured import CollectiveFit
    from tpinfer.launching.seat import Seat
    from tpinfer.machine.measure import RankFigures

LONGEST_S = 600.0
_CPU_COLLECTIVES = ("shared_memory", "deepspeed", "gloo")


def add_probe_flags(parser: argparse.ArgumentParser) -> None:
    """Declare all flags."""
    parser.add_argument("--topology", required=True, metavar="FILE",
                        help="YAML of this machine, or the name of a shipped one")  # fmt: skip
    parser.add_argument("--tp", type=int, metavar="N",
                        help="ranks that measure at once (default 1, or the launcher's)")  # fmt: skip
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seconds", type=float, default=30.0, metavar="S",
                        help="about how long to measure (30)")  # fmt: skip
    parser.add_argument("-o", "--out", metavar="FILE",
                        help="measured layer (default X.measured.yaml beside X.yaml)")  # fmt: skip


def run_probe(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Be the launcher, or one rank; returns the exit code."""
    return run_on_ranks(args, argv, lambda tp: _check(args, tp), lambda s: _run_rank(args, s), False)


def target_path(args: argparse.Namespace) -> Path:
    """Where the measured layer goes. A shipped topology's goes to the working directory."""
    if args.out:
        return Path(args.out)
    file = Path(args.topology)
    return measured_path(file if file.is_file() else Path(f"{file.name}.yaml"))


def _check(args: argparse.Namespace, tp: int) -> None:
    if tp < 1:
        raise ConfigError(f"--tp {tp} must be 1 or more")
    if not 1 <= args.seconds <= LONGEST_S:
        raise ConfigError(f"--seconds {args.seconds:g} must lie in 1..{LONGEST_S:g}")
    check_output("--out", str(target_path(args)))
    topology = load_topology(args.topology)
    if args.device == "cuda" and topology.hosts[0].computes_on_cpu:
        raise ConfigError(
            f"--device cuda, but {topology.file} describes CPU ranks; name a topology with GPUs "
            "(`tpinfer topo discover` writes this machine's)"
        )
    topology.groups(tp)


def _run_rank(args: argparse.Namespace, seat: "Seat") -> int:
    import torch

    from tpinfer.cli.stream import Progress
    from tpinfer.collectives.opening import open_group
    from tpinfer.machine.discover import discover_machine
    from tpinfer.machine.measure import measure_collectives, measure_rank

    topology = load_topology(args.topology)
    if args.tp is not None and args.tp != seat.world:
        raise ConfigError(f"--tp {args.tp}, but {seat.world} ranks were started; start {args.tp}")
    machine, device = discover_machine(), torch.device(seat.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, machine.num_cores // seat.local_world))
    progress = Progress(seat.rank == 0)
    say = progress if seat.rank == 0 else lambda text: None
    facts = machine.cpu_flags, machine.num_cores, machine.shared_memory_free_bytes
    first, choice = open_group("auto", seat, device, 60.0, facts)
    groups = {_name(choice.name, choice.variant): first}
    try:
        groups |= _more_groups(seat, device, first, set(groups), facts)
        share = 0.6 if seat.world > 1 else 1.0
        figures = measure_rank(
            first, device, machine, _dtypes(device, machine.cpu_flags), _bind_linear,
            share * args.seconds, say,
        )  # fmt: skip
        fits: tuple[CollectiveFit, ...] = ()
        if seat.world > 1:
            fits = measure_collectives(groups, device, (1 - share) * args.seconds, say)
    finally:
        for group in groups.values():
            group.close()
    progress.done()
    if seat.rank == 0:
        _write(args, topology, seat, figures, fits)
    return 0


def _name(name: str, variant: str) -> str:
    return "deepspeed" if variant == "deepspeed" else name


def _more_groups(
    seat: "Seat",
    device: "torch.device",  # noqa: F821
    first: "Group",
    known: set[str],
    facts: tuple[frozenset[str], int, int],
) -> "dict[str, Group]":
    """The other backends that work here, each in a generation of its own. A collective call."""
    from dataclasses import replace

    from tpinfer.collectives.opening import open_group

    found: dict[str, Group] = {}
    if device.type != "cpu" or seat.world == 1 or seat.world != seat.local_world:
        return found
    for number, wanted in enumerate(_CPU_COLLECTIVES, 1):
        if wanted in known:
            continue
        first.barrier()  # nobody makes the next meeting place while the last one is taken away
        try:
            again = replace(seat, generation=seat.generation + number)
            found[wanted], _ = open_group(wanted, again, device, 60.0, facts)
        except ConfigError:  # every rank is refused alike, before any is met
            continue
    first.barrier()
    return found
