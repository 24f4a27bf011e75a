"""`tpprof record`: run somebody's Python script under torch's profiler, one trace a rank.

The profiler is started and stopped inside each rank by `record_child`. The files are cleaned and
compressed here, outside the ranks: only what describes events and devices is kept.
"""

import argparse
import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

import tpinfer
from tpprof.cli import record_child
from tpprof.errors import TraceError
from tpprof.report.wording import plural

EPILOG = """examples:
  tpprof record -- python script.py --tokens 64
  tpprof record --out traces -- torchrun --nproc-per-node 2 script.py

The command must hold a file that ends in .py, or -m MODULE. Shapes are recorded, stacks are not.
The whole script is recorded, so keep it short: a few steps after warming up. Processes that it
starts itself are not recorded; engines that do (vLLM, SGLang) have profiler flags of their own.
With --twice the script runs once more without the recorder, which tells how much slower recording
made it. No environment variable is kept. The exit code is the script's.
"""
_KEPT = {
    "schemaVersion", "deviceProperties", "distributedInfo", "cupti_version",
    "cuda_runtime_version", "cuda_driver_version", "roctracer_version", "hip_runtime_version",
    "hip_driver_version", "record_shapes", "with_stack", "with_flops", "profile_memory",
    "with_modules", "displayTimeUnit", "baseTimeNanoseconds", "traceEvents",
}  # fmt: skip
"""Top-level keys of a Kineto file that describe events and devices. All others go."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare all flags."""
    parser.add_argument(
        "--out", type=Path, default=Path("traces"), metavar="DIR",
        help="where traces go, a directory without traces (traces)",
    )  # fmt: skip
    parser.add_argument(
        "--twice", action="store_true", help="run once more without recording, to measure dilation"
    )
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to run"
    )


def run(args: argparse.Namespace) -> int:
    """Record, clean, and say what came of it."""
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    script = _script_at(command)
    if script and not Path(command[script]).is_file():
        raise TraceError(f"{command[script]} does not exist; name the script to be recorded")
    out = _directory(args.out)
    code, recorded = _run(command, out, "record")
    if not recorded:
        raise TraceError(
            f"no rank wrote a trace (exit code {code}): the command must run Python with torch; "
            f"see what {command[0]} said above"
        )
    plain: list[dict[str, int]] = []
    if args.twice and code == 0:
        code, plain = _run(command, out, "time")
    for one in recorded:
        clean_trace(out / f"rank{one['rank']}.trace.json")
    dilation = _dilation(recorded, plain)
    _write_run(out, command, recorded, plain, dilation)
    slower = "" if dilation is None else f", {dilation:.3f} times as long as without recording"
    print(f"recorded {plural(len(recorded), 'rank')} in {out}{slower}")
    print(f"see where the time went: tpprof analyze {out}")
    return code


def with_runner(command: Sequence[str], runner: Sequence[str]) -> list[str]:
    """The command with `runner` before its script or -m MODULE. Raises TraceError without one."""
    script = _script_at(command)
    if script:
        return [*command[:script], *runner, *command[script:]]
    first = 3 if list(command[1:3]) == ["-m", "torch.distributed.run"] else 1
    if "-m" in command[first:]:
        i = command.index("-m", first)
        return [*command[:i], *runner, *command[i:]]
    raise TraceError(
        f"{' '.join(command) or 'nothing'!r} runs no Python script; write -- python script.py, "
        "-- torchrun ... script.py or -- python -m MODULE"
    )


def _script_at(command: Sequence[str]) -> int:
    """Place of the script in a command; 0 where it has none."""
    return next((i for i, word in enumerate(command) if i and word.endswith(".py")), 0)


def clean_trace(path: Path) -> Path:
    """Replace a Kineto file by a compressed one without anything but events and devices.

    Raises TraceError for a file that is not JSON; it is removed, for it could hold anything.
    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
    except (OSError, msgspec.DecodeError) as error:
        path.unlink(missing_ok=True)
        raise TraceError(
            f"{path.name} is not the JSON that torch's profiler writes ({error}); record fewer "
            "steps, or with another version of torch"
        ) from None
    kept = {name: value for name, value in found.items() if name in _KEPT}
    target = path.with_name(path.name + ".gz")
    with gzip.open(target, "wb", compresslevel=3) as out:
        out.write(msgspec.json.encode(kept))
    path.unlink()
    return target


def _directory(out: Path) -> Path:
    if any(out.glob("*.trace.json*")):
        raise TraceError(f"{out} holds traces already; remove them or pass another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TraceError(f"--out {out} cannot be made: {error.strerror}") from None
    return out


def _run(command: Sequence[str], out: Path, mode: str) -> tuple[int, list[dict[str, int]]]:
    """Exit code, and what each rank wrote of itself."""
    child = str(Path(record_child.__file__).resolve())
    root = str(Path(tpinfer.__file__).resolve().parents[1])
    runner = [child, str(out.resolve()), root, mode]
    whole = with_runner(command, runner)
    if shutil.which(whole[0]) is None:
        raise TraceError(f"{whole[0]} was not found; write a command that runs from here")
    # Without this its lines could come behind ours.
    sys.stdout.flush()
    code = subprocess.run(whole, check=False).returncode
    walls = sorted(out.glob("rank*.wall.json"))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in walls]
    for path in walls:
        path.unlink()
    return code, sorted(found, key=lambda one: one["rank"])


def _dilation(recorded: list[dict[str, int]], plain: list[dict[str, int]]) -> float | None:
    """Longest wall of a rank with the recorder over the longest without."""
    if not plain:
        return None
    without = max(one["wall_ns"] for one in plain)
    return max(one["wall_ns"] for one in recorded) / without if without else None


def _write_run(
    out: Path,
    command: Sequence[str],
    recorded: list[dict[str, int]],
    plain: list[dict[str, int]],
    dilation: float | None,
) -> None:
    """run.json, with the command's own arguments left out: they may hold secrets."""
    script = _script_at(command)
    facts = {
        "format_version": 1,
        "tp": max(one["world"] for one in recorded),
        "model": "",
        "dilation": dilation,
        "profiled_step_ns": [one["wall_ns"] for one in recorded],
        "unprofiled_step_ns": [one["wall_ns"] for one in plain],
        "command": [Path(command[script]).name] if script else [],
        "versions": {"python": sys.version.split()[0]},
    }
    (out / "run.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
