"""`tpinfer doctor`: what this machine has, what would be chosen on it, what is missing and how
to get it."""

import argparse
import importlib.util
import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from shutil import which

from tpinfer.config.errors import ConfigError, TpinferError
from tpinfer.config.units import format_size
from tpinfer.machine.discover import Machine, discover_machine

EPILOG = "Nothing is changed. The exit code is 0 when generating would work here, else 1.\n"
_PACKAGES = {
    "torch": "run",
    "safetensors": "run",
    "tokenizers": "run",
    "jinja2": "run",
    "numpy": "",
    "mpi4py": "mpi",
    "deepspeed": "cpu-collectives",
    "transformers": "test",
}
"""Package -> the extra that brings it; "" where tpinfer itself does."""
_NEEDED = ("torch", "tokenizers", "numpy")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare all flags."""
    parser.add_argument(
        "--tp", type=int, default=2, metavar="N", help="ranks to show the choices for (2)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Print the findings."""
    if args.tp < 1:
        raise ConfigError(f"--tp {args.tp} must be 1 or more")
    machine = discover_machine()
    packages = {name: _installed(name) for name in _PACKAGES}
    missing = _missing(machine, packages)
    choices = _choices(machine, args.tp) if packages["torch"] else []
    if args.json:
        value = {
            "machine": _machine_lines(machine),
            "packages": packages,
            "choices": choices,
            "missing": missing,
        }
        print(json.dumps(value, indent=2))
    else:
        _print(machine, packages, choices, missing, args.tp)
    return 0 if all(packages[name] for name in _NEEDED) else 1


def _print(
    machine: Machine,
    packages: dict[str, str | None],
    choices: Sequence[str],
    missing: Sequence[str],
    tp: int,
) -> None:
    print("This machine")
    for name, value in _machine_lines(machine).items():
        print(f"  {name:<14}{value}")
    print("\nPackages")
    for name, found in packages.items():
        extra = f"extra: {_PACKAGES[name]}" if _PACKAGES[name] else "install tpinfer again"
        print(f"  {name:<14}{found or f'not installed ({extra})'}")
    print(f"\nWhat --tp {tp} would use here")
    for line in choices or ["(needs torch to say)"]:
        print(f"  {line}")
    print("\nMissing" if missing else "\nNothing is missing.")
    for line in missing:
        print(f"  {line}")


def _machine_lines(machine: Machine) -> dict[str, str]:
    caches = ", ".join(
        f"L{c.level} {format_size(c.num_bytes)} x{c.num_instances}" for c in machine.caches
    )
    vectors = [
        flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in machine.cpu_flags
    ]
    gpus = "; ".join(str(gpu) for gpu in machine.gpus) or f"none ({machine.no_gpu_reason})"
    return {
        "processor": f"{machine.cpu_model}, {machine.num_cores} cores, {len(machine.numa_nodes)} "
        "NUMA node(s)",
        "vectors": ", ".join(vectors) or "none of AVX2, AVX-512, AMX",
        "caches": caches or "unknown",
        "memory": f"{format_size(machine.available_bytes)} free of "
        f"{format_size(machine.memory_bytes)}",
        "/dev/shm": f"{format_size(machine.shared_memory_free_bytes)} free of "
        f"{format_size(machine.shared_memory_bytes)}",
        "GPUs": gpus,
        "Python": f"{platform.python_version()} ({sys.executable})",
        "C compiler": next(
            (found for name in ("cc", "gcc", "clang") if (found := which(name))), "none"
        ),
    }


def _installed(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return version(name)
    except PackageNotFoundError:
        return "present"


def _choices(machine: Machine, tp: int) -> list[str]:
    """The runtime's own decisions, made by its own functions."""
    from tpinfer.collectives.choose import choose_collective
    from tpinfer.collectives.opening import gather_facts
    from tpinfer.config.engine import EngineConfig
    from tpinfer.config.huggingface import read_model_spec
    from tpinfer.costs.choices import Choice, choose_execution
    from tpinfer.embedded.locate import embedded_model
    from tpinfer.launching.seat import Seat, choose_device
    from tpinfer.machine.rank_cores import rank_binding

    try:
        device = choose_device("auto", 0, tp, len(machine.gpus))
        directory = embedded_model()
        config = EngineConfig(model_dir=directory, tp=tp)
        seat = Seat(0, tp, 0, tp, device, "doctor", 0, "tpinfer" if tp > 1 else "single")
        binding = rank_binding(seat, machine) if device == "cpu" else None
        chosen = choose_execution(
            config, read_model_spec(directory), device, tp, machine.num_cores, machine.cpu_flags,
            binding,
        )  # fmt: skip
        facts = machine.cpu_flags, machine.num_cores, machine.shared_memory_free_bytes
        device_type = device.partition(":")[0]
        found = gather_facts(device_type, tp, tp, "tpinfer", facts, len(machine.gpus))
        picked = choose_collective("auto", found)
    except TpinferError as error:
        return [str(error)]
    return chosen.with_choice(Choice("collective", picked.words, picked.reason)).explain()


def _missing(machine: Machine, packages: dict[str, str | None]) -> list[str]:
    lines = []
    lacking = [name for name in _NEEDED if not packages[name]]
    if lacking:
        lines.append(f"{', '.join(lacking)}: pip install 'tpinfer[run]' to generate text")
    if not any(which(name) for name in ("cc", "gcc", "clang")):
        lines.append(
            "a C compiler: install gcc; sums between CPU ranks are several times slower without it"
        )
    if machine.shared_memory_free_bytes < 64 << 20:
        lines.append(
            "room in /dev/shm: 64 MB or more (docker: --shm-size=1g), or pass --collective gloo"
        )
    if machine.gpus and not packages["torch"]:
        lines.append("a CUDA build of torch for the GPU that is here")
    return lines
