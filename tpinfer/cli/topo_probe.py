"""`tpinfer topo probe`: measure what the ranks of this machine reach and write the measured layer
of its topology."""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from tpinfer.cli.generate_flags import check_output
from tpinfer.cli.rank_start import run_on_ranks
from tpinfer.config.dtypes import DType
from tpinfer.config.errors import ConfigError
from tpinfer.config.measured import DeviceMeasurement, GroupMeasurement, Measurement
from tpinfer.config.measured_yaml import measured_path, read_measured, write_measured
from tpinfer.config.topology import Topology
from tpinfer.config.topology_reader import load_topology
from tpinfer.config.units import format_rate, format_size

if TYPE_CHECKING:
    import torch

    from tpinfer.collectives.group import Group
    from tpinfer.config.measured import CollectiveFit
    from tpinfer.launching.seat import Seat
    from tpinfer.machine.measure import MatMul, RankFigures

LONGEST_S = 600.0
_CPU_COLLECTIVES = ("shared_memory", "deepspeed", "gloo")


def add_probe_flags(parser: argparse.ArgumentParser) -> None:
    """Declare all flags."""
    parser.add_argument("--topology", required=True, metavar="FILE",
                        help="YAML of this machine, or the name of a shipped one")  # fmt: skip
    parser.add_argument("--tp", type=int, metavar="N",
                        help="ranks that measure at once (1, or the launcher's)")  # fmt: skip
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seconds", type=float, default=30.0, metavar="S",
                        help="about how long to measure (30)")  # fmt: skip
    parser.add_argument("-o", "--out", metavar="FILE",
                        help="measured layer (default X.measured.yaml beside X.yaml)")  # fmt: skip


def run_probe(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Be the launcher, or one rank; returns the exit code."""
    return run_on_ranks(
        args, argv, lambda tp: _check(args, tp), lambda s: _run_rank(args, s), False
    )


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
    progress = Progress(sys.stderr)

    def say(text: str) -> None:
        if seat.rank == 0:
            progress.show(text)

    facts = machine.cpu_flags, machine.num_cores, machine.shared_memory_free_bytes
    first, choice = open_group("auto", seat, device, 60.0, facts)
    groups = {_name(choice.name, choice.variant): first}
    try:
        groups |= _more_groups(seat, device, first, set(groups), facts)
        share = 0.6 if seat.world > 1 else 1.0
        budget_s = share * args.seconds
        figures = measure_rank(first, device, machine, _dtypes(device), _bind_linear, budget_s, say)
        fits: tuple[CollectiveFit, ...] = ()
        if seat.world > 1:
            fits = measure_collectives(groups, device, (1 - share) * args.seconds, say)
    finally:
        for group in groups.values():
            group.close()
    progress.finish()
    if seat.rank == 0:
        _write(args, topology, seat, figures, fits)
    return 0


def _name(name: str, variant: str) -> str:
    return "deepspeed" if variant == "deepspeed" else name


def _more_groups(
    seat: "Seat",
    device: "torch.device",
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


def _dtypes(device: "torch.device") -> list[DType]:
    """A GPU has units for all of them; a CPU without some is slow at them, which is worth
    knowing."""
    found = [DType.FLOAT32, DType.BFLOAT16]
    return [*found, DType.FLOAT16] if device.type == "cuda" else found


def _bind_linear(weight: "torch.Tensor", device: "torch.device") -> "MatMul":
    """As `worker.kernels` binds a rank's linears."""
    from tpinfer.layers.matmul import can_pack, packed_matmul, plain_matmul

    bind = packed_matmul if can_pack(weight.dtype, device) else plain_matmul
    return bind(weight, None)


def _write(
    args: argparse.Namespace,
    topology: Topology,
    seat: "Seat",
    figures: "RankFigures",
    fits: "tuple[CollectiveFit, ...]",
) -> None:
    import torch

    places = topology.groups(seat.world)[0]
    host = topology.host(places[0][0])
    on_cpu = host.computes_on_cpu
    devices = [device.id for device in host.devices] if on_cpu else [d for _, d in places]
    measured = DeviceMeasurement(
        host=host.name,
        devices=tuple(devices),
        num_sharing=seat.local_world if on_cpu else 1,
        memory=figures.memory,
        gemms=figures.gemms,
        eager_floor_s=figures.eager_floor_s,
        graph_floor_s=figures.graph_floor_s,
        copies=figures.copies,
    )
    new = Measurement(
        topology=topology.name,
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        driver=None,
        versions={"tpinfer": _tpinfer_version(), "torch": str(torch.__version__)},
        devices=(measured,),
        groups=(GroupMeasurement(places, fits),) if fits else (),
    )
    path = target_path(args)
    if path.is_file():
        new = read_measured(path).with_newer(new)
    write_measured(new, path)
    print(f"wrote {path}")
    _print(figures, fits, seat.world)


def _tpinfer_version() -> str:
    try:
        return version("tpinfer")
    except PackageNotFoundError:
        return "(not installed)"


def _print(figures: "RankFigures", fits: "tuple[CollectiveFit, ...]", num_ranks: int) -> None:
    each = "of each rank, all at once" if num_ranks > 1 else "of the one rank"
    print(f"\nmemory read, {each}")
    for read in figures.memory:
        rate = format_rate(read.bytes_per_s)
        print(f"  {format_size(read.working_set_bytes):>10}  {read.level:<5}{rate:>12}")
    rows = sorted({gemm.rows for gemm in figures.gemms})
    print("\nGFLOP/s by rows of a product")
    print(f"  {'':<10}" + " ".join(f"{count:>6}" for count in rows))
    for dtype in dict.fromkeys(gemm.dtype for gemm in figures.gemms):
        rates = {g.rows: f"{g.flops_per_s / 1e9:.0f}" for g in figures.gemms if g.dtype is dtype}
        print(f"  {dtype.value:<10}" + " ".join(f"{rates.get(count, '-'):>6}" for count in rows))
    print(f"\nsmall op {figures.eager_floor_s * 1e6:.1f} us")
    for copy in figures.copies:
        print(f"copy {copy.path} {format_rate(copy.bytes_per_s)}")
    if fits:
        print(f"\ncollectives of {num_ranks} ranks, us by bytes")
        sizes = sorted(fits[0].points)
        print(
            f"  {'':<28}" + " ".join(f"{format_size(size):>8}" for size in sizes) + "   fit off by"
        )
    for fit in fits:
        times = " ".join(f"{fit.points[size] * 1e6:8.1f}" for size in sorted(fit.points))
        print(f"  {fit.op + ' by ' + fit.by:<28}{times}   {fit.error:.0%}")
