"""Flags that several verbs share, and what they ask of the rooms below."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tpinfer.config.catalogue import read_catalogue
from tpinfer.config.ceilings import CeilingOverrides, Ceilings, slice_ceilings
from tpinfer.config.errors import ConfigError
from tpinfer.config.topology_reader import load_topology, shipped_topologies
from tpprof.errors import TraceError

if TYPE_CHECKING:
    from tpprof.analyze import AnalysisOptions
    from tpprof.events import Trace

WINDOWS = ("all", "steps", "ttft", "itl")
GROUPINGS = ("rank", "step", "phase", "layer", "op", "kernel", "stream")


def add_path_flags(parser: argparse.ArgumentParser) -> None:
    """The traces."""
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="trace files, directories or globs; one run"
    )


def add_limit_flags(parser: argparse.ArgumentParser) -> None:
    """What kernels are judged by."""
    group = parser.add_argument_group("limits that kernels are judged by")
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--topology", metavar="T", help="a topology file, or one that comes along such as dgx-h100"
    )
    source.add_argument(
        "--device", metavar="NAME", help="a card of the catalogue, such as h100-sxm-80g"
    )
    group.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE",
        help="change a value of the topology, such as hosts.box.links.0.bw=16GB/s; repeatable",
    )  # fmt: skip
    group.add_argument(
        "--model", type=Path, metavar="FILE",
        help="config.json of the model, to price kernels that carry no shapes",
    )  # fmt: skip
    group.add_argument(
        "--tp", type=int, metavar="N", help="tensor-parallel ranks of the run (as recorded)"
    )


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Where the report goes besides the terminal."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page to look at")


def read_paths(paths: Sequence[str]) -> "list[Trace]":
    """One trace a rank, lowest first. Raises TraceError for paths that hold none."""
    from tpprof.readers.read import read_traces

    return read_traces(paths)


def is_report(path: Path) -> bool:
    """Whether a .json file is a report and not a trace: by its first kilobyte."""
    if path.suffix != ".json" or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return b'"wall_ns"' in file.read(1024)
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}") from None


def ceilings_of(
    topology: str | None, device: str | None, num_ranks: int, settings: Sequence[str] = ()
) -> Ceilings | None:
    """Ceilings of one rank that --topology or --device names; None where neither is given.
    `settings` change the topology, as --set does.

    Raises TopologyError for a file that says nothing of them, ConfigError for an unknown card.
    """
    if settings and topology is None:
        raise ConfigError(f"--set {settings[0]} changes a topology; name one with --topology")
    if topology is not None:
        found = load_topology(topology, settings)
        ceilings = found.ceilings_of_rank(0, num_ranks)
        if ceilings is None:
            raise ConfigError(
                f"--topology {topology} gives no rates of its devices; add sku: or ceilings: to it"
            )
        return ceilings
    return None if device is None else _ceilings_of_card(device, num_ranks)


def _ceilings_of_card(name: str, num_ranks: int) -> Ceilings:
    """Its links are those of the first shipped machine with such cards; a card that none has is
    judged without a limit on communication."""
    cards = read_catalogue().gpus
    sku = next((sku for sku in cards if sku.lower() == name.lower()), None)
    if sku is None:
        raise ConfigError(f"--device {name} is not in the catalogue; it has {', '.join(cards)}")
    for shipped in shipped_topologies():
        machine = load_topology(shipped)
        devices = machine.hosts[0].devices
        if devices[0].sku == sku and num_ranks <= len(devices):
            found = machine.ceilings_of_rank(0, num_ranks)
            if found is not None:
                return found
    return slice_ceilings(cards[sku], CeilingOverrides(), 1, (0.0, float("inf")), sku)


def model_of(path: Path | None) -> Path | None:
    """The config.json that --model names, itself or by its directory. Raises ConfigError."""
    if path is None:
        return None
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        lacking = "holds no config.json" if path.is_dir() else "is no file"
        raise ConfigError(f"--model {path} {lacking}; give the config.json of the model")
    return file


def options_of(
    args: argparse.Namespace, traces: "Sequence[Trace]", window: str, by: str = ""
) -> "AnalysisOptions":
    """What the flags ask for. Raises TpinferError for files that cannot be used."""
    from tpprof.analyze import AnalysisOptions

    world = world_of(traces, args.tp)
    return AnalysisOptions(
        window=window,
        by=by,
        ceilings=ceilings_of(args.topology, args.device, world, args.set),
        model=model_of(args.model),
        tp=world,
    )


def world_of(traces: "Sequence[Trace]", asked: int | None = None) -> int:
    """Ranks of the run: as asked, as recorded, as run.json says, else as many as there are files.

    Raises ConfigError for less than one.
    """
    if asked is not None:
        if asked < 1:
            raise ConfigError(f"--tp {asked} must be 1 or more")
        return asked
    recorded = max((trace.world_size for trace in traces), default=0)
    noted = [_noted_world(Path(trace.source).parent) for trace in traces[:1]]
    return max([recorded if recorded > 0 else 0, *noted, len(traces)])


def _noted_world(directory: Path) -> int:
    try:
        found = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        return int(found["tp"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def spare_recordings(traces: "Sequence[Trace]", *targets: Path | None) -> None:
    """Raises TraceError where an output would replace one of the files that were read."""
    sources = {Path(trace.source).resolve() for trace in traces}
    for target in targets:
        if target is not None and target.resolve() in sources:
            raise TraceError(f"{target} is one of the recordings; name another file to write")


def write_text(path: Path, text: str) -> None:
    """Write a report's file. Raises TraceError where that fails."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TraceError(f"{path} cannot be written: {error.strerror}; name another file") from None
