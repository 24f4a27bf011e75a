"""`tpinfer topo probe`: measure what the ranks of this machine reach and write the measured layer
of its topology."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tpinfer.cli.generate_flags import check_output
from tpinfer.cli.rank_start import run_on_ranks
from tpinfer.config.clock_samples import describe_reasons
from tpinfer.config.errors import ConfigError
from tpinfer.config.measured import Clocks, DeviceMeasurement, GroupMeasurement, OpTime
from tpinfer.config.measured_yaml import measured_path, read_measured, write_measured
from tpinfer.config.topology_reader import load_topology
from tpinfer.config.units import format_rate, format_size

if TYPE_CHECKING:
    from tpinfer.launching.seat import Seat

LONGEST_S = 600.0


def add_probe_flags(group: "argparse._ArgumentGroup") -> None:
    """Declare the flags of `probe` alone."""
    group.add_argument("--tp", type=int, metavar="N",
                       help="ranks that measure at once (1, or the launcher's)")  # fmt: skip
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    group.add_argument("--seconds", type=float, default=30.0, metavar="S",
                       help="about how long to measure (30)")  # fmt: skip
    # What it measures is a claim to speed.
    group.set_defaults(share_device=False, nccl_library=None)


def run_probe(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Be the launcher, or one rank; returns the exit code."""
    return run_on_ranks(
        args, argv, lambda tp: _check(args, tp), lambda s: _run_rank(args, s), False
    )


def target_path(args: argparse.Namespace) -> Path:
    """Where the measured layer goes. A shipped topology's goes to the working directory."""
    if args.output:
        return Path(args.output)
    file = Path(args.file)
    return measured_path(file if file.is_file() else Path(f"{file.name}.yaml"))


def _check(args: argparse.Namespace, tp: int) -> None:
    if args.file is None:
        raise ConfigError(
            "topo probe needs the FILE that describes this machine; `tpinfer topo discover -o "
            "FILE` writes it"
        )
    if tp < 1:
        raise ConfigError(f"--tp {tp} must be 1 or more")
    if not 1 <= args.seconds <= LONGEST_S:
        raise ConfigError(f"--seconds {args.seconds:g} must lie in 1..{LONGEST_S:g}")
    check_output("--output", str(target_path(args)))
    topology = load_topology(args.file)
    if args.device == "cuda" and topology.hosts[0].computes_on_cpu:
        raise ConfigError(
            f"--device cuda, but {topology.file} describes CPU ranks; name a topology with GPUs "
            "(`tpinfer topo discover` writes this machine's)"
        )
    topology.groups(tp)


def _run_rank(args: argparse.Namespace, seat: "Seat") -> int:
    from tpinfer.cli.stream import Progress
    from tpinfer.engine.machine_probe import probe_machine

    if args.tp is not None and args.tp != seat.world:
        raise ConfigError(f"--tp {args.tp}, but {seat.world} ranks were started; start {args.tp}")
    progress = Progress(sys.stderr)

    def say(text: str) -> None:
        if seat.rank == 0:
            progress.show(text)

    found = probe_machine(load_topology(args.file), seat, args.seconds, say)
    progress.finish()
    if seat.rank:
        return 0
    path = target_path(args)
    known = read_measured(path).with_newer(found) if path.is_file() else found
    write_measured(known, path)
    print(f"wrote {path}")
    _print_device(found.devices[0], seat.world)
    for group in found.groups:
        _print_group(group)
    return 0


def _print_device(found: DeviceMeasurement, num_ranks: int) -> None:
    each = "of each rank, all at once" if num_ranks > 1 else "of the one rank"
    print(f"\nmemory read, {each}")
    for read in found.memory:
        rate = format_rate(read.bytes_per_s)
        print(f"  {format_size(read.working_set_bytes):>10}  {read.level:<5}{rate:>12}")
    rows = sorted({gemm.rows for gemm in found.gemms})
    print("\nGFLOP/s by rows of a product")
    print(f"  {'':<10}" + " ".join(f"{count:>6}" for count in rows))
    for dtype in dict.fromkeys(gemm.dtype for gemm in found.gemms):
        rates = {g.rows: f"{g.flops_per_s / 1e9:.0f}" for g in found.gemms if g.dtype is dtype}
        print(f"  {dtype.value:<10}" + " ".join(f"{rates.get(count, '-'):>6}" for count in rows))
    print(f"\nsmall op {(found.eager_floor_s or 0) * 1e6:.1f} us")
    for copy in found.copies:
        print(f"copy {copy.path} {format_rate(copy.bytes_per_s)}")
    print(f"clocks: {describe_clocks(found.clocks)}")
    _print_ops(found.ops)
    if found.host_time:
        step, row = (value * 1e6 for value in (found.host_time.step_s, found.host_time.row_s))
        print(f"host of a step {step:.0f} us, and {row:.1f} us a row drawn")


def _print_ops(ops: tuple[OpTime, ...]) -> None:
    if ops:
        print("\nops in steps: us each, us a row drawn, GB/s, GFLOP/s (of linears by rows)")
    for op in ops:
        print(f"  {op.kind:<11}{_op_text(op)}   fit off by {op.error:.0%}")


def _op_text(op: OpTime) -> str:
    parts = [f"{op.floor_s * 1e6:7.1f}", f"{op.row_s * 1e6:6.2f}"]
    parts += [
        f"{rate / 1e9:7.1f}" if rate else f"{'-':>7}" for rate in (op.bytes_per_s, op.flops_per_s)
    ]
    parts += [f"{rows}:{rate / 1e9:.0f}" for rows, rate in op.rates.items()]
    return " ".join(parts)


def describe_clocks(clocks: Clocks | None) -> str:
    """`compute 1410 of 1980 MHz, memory 2619 of 2619 MHz, held back by power cap`."""
    if clocks is None:
        return "nothing here tells them"
    named = (
        ("compute", clocks.compute_mhz, clocks.most_compute_mhz),
        ("memory", clocks.memory_mhz, clocks.most_memory_mhz),
    )
    parts = [
        f"{name} {now}{'' if most is None else f' of {most}'} MHz"
        for name, now, most in named
        if now is not None
    ]
    held = f", held back by {describe_reasons(clocks.throttled_by)}" if clocks.throttled_by else ""
    return (", ".join(parts) or "no frequency told") + held


def _print_group(found: GroupMeasurement) -> None:
    sizes = sorted({size for fit in found.collectives for size in fit.points})
    heads = " ".join(f"{format_size(size):>8}" for size in sizes)
    print(f"\ncollectives of {len(found.places)} ranks, us by bytes")
    print(f"  {'':<28}{heads}   fit off by")
    for fit in found.collectives:
        times = " ".join(f"{fit.points[size] * 1e6:8.1f}" for size in sizes)
        print(f"  {fit.op + ' by ' + fit.by:<28}{times}   {fit.error:.0%}")
    _print_ops(found.ops)
