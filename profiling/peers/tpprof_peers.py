"""tpprof, HolisticTraceAnalysis and TraceLens on the same files: time, memory, what each says.

    python profiling/peers/tpprof_peers.py --hta PYTHON --tracelens PYTHON TRACE[,arch=A][,device=D]

PYTHON are interpreters of environments that have one of them. A TRACE (there may be several) is a
file, or a directory of one run's ranks; A is what TraceLens judges it by (a platform it knows, or a
JSON file), D the --device of tpprof. Four made runs are measured besides, unless --no-made: see
made_runs.py.

Each reading is a process of its own that starts, imports, reads, analyses and writes its answer;
the tools take turns. Wall and CPU seconds and the peak of resident memory are the kernel's, medians
of --times. Prints Markdown.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
MADE = ("late", "drift", "custom", "large")
TIMEOUT_S = 120


@dataclass(frozen=True)
class Run:
    """What is given to all tools."""

    name: str
    files: list[str]
    arch: str = "-"
    device: str = ""
    truth: dict[str, Any] | None = None


@dataclass
class Readings:
    """Of one tool on one run."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)
    said: dict[str, Any] = field(default_factory=lambda: {"versions": []})
    error: str = ""

    def row(self) -> str:
        """Cells of the table of times."""
        if self.error:
            return f"failed: {self.error} | | "
        columns = (self.wall_s, self.cpu_s, self.peak_mb)
        wall, cpu, peak = (statistics.median(column) for column in columns)
        return f"{wall:.2f} | {cpu:.2f} | {peak:.0f}"


def commands(run: Run, answer: str, hta: str, tracelens: str) -> dict[str, list[str]]:
    """What each tool is started with."""
    device = ["--device", run.device] if run.device else []
    ours = [sys.executable, "-m", "tpprof", "analyze", *run.files, "--json", answer, *device]
    found = {"tpprof": ours}
    if hta:
        found["HTA"] = [hta, str(HERE / "hta_program.py"), answer, *run.files]
    if tracelens:
        program = str(HERE / "tracelens_program.py")
        found["TraceLens"] = [tracelens, program, answer, run.arch, *run.files]
    return found


def read_once(command: list[str], answer: Path, to: Readings) -> None:
    """Start a tool and wait for it; its answer, or the last line it left behind."""
    answer.unlink(missing_ok=True)
    paths = os.pathsep.join((str(REPOSITORY / "profiling"), str(REPOSITORY)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as told:
        begun = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=told, env=environment, cwd=answer.parent
        )
        deadline = begun + TIMEOUT_S
        while True:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.perf_counter() > deadline:
                process.kill()
            time.sleep(0.002)
        wall_s = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            told.seek(0)
            lines = told.read().decode(errors="replace").strip().splitlines()
            to.error = (lines[-1] if lines else f"exit code {process.returncode}")[:120]
            return
    to.wall_s.append(wall_s)
    to.cpu_s.append(used.ru_utime + used.ru_stime)
    to.peak_mb.append(used.ru_maxrss * 1024 / 1e6)
    to.said = {"versions": [], **json.loads(answer.read_bytes())}


def measure(run: Run, hta: str, tracelens: str, times: int) -> dict[str, Readings]:
    """Readings of each tool, taken in turns."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        started = commands(run, str(answer), hta, tracelens)
        found = {tool: Readings() for tool in started}
        for _ in range(times):
            for tool, command in started.items():
                if not found[tool].error:
                    read_once(command, answer, found[tool])
    return found


def ask(*words: str) -> None:
    """Run made_runs.py, which needs much memory, apart from this process."""
    subprocess.run([sys.executable, str(HERE / "made_runs.py"), *words], check=True)


def facts_of(run: Run) -> list[dict[str, Any]]:
    """What each rank's file holds."""
    with tempfile.TemporaryDirectory() as folder:
        ask("facts", f"{folder}/facts.json", *run.files)
        return json.loads(Path(folder, "facts.json").read_text())


def given_run(text: str) -> Run:
    """Of TRACE[,arch=A][,device=D]."""
    name, *options = text.split(",")
    path = Path(name).resolve()
    paths = sorted(path.glob("*.json*")) if path.is_dir() else [path]
    chosen = dict(option.split("=", 1) for option in options)
    files = [str(one) for one in paths]
    return Run(path.name, files, chosen.get("arch", "-"), chosen.get("device", ""))


def made_runs(folder: Path) -> list[Run]:
    """Made, with what is true of them."""
    ask("make", str(folder))
    found = []
    for name in MADE:
        told = folder / f"{name}.truth.json"
        truth = json.loads(told.read_text()) if told.exists() else None
        judged = f",arch={folder / 'arch.json'},device=h100-sxm-80g" if truth else ""
        run = given_run(f"{folder / name}{judged}")
        found.append(Run(name, run.files, run.arch, run.device, truth))
    return found


def main() -> int:
    """Measure and print."""
    sys.path.insert(0, str(HERE))
    from statements import what_each_says

    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("traces", nargs="*", metavar="TRACE[,arch=A][,device=D]")
    parser.add_argument("--hta", default="", metavar="PYTHON", help="Python that has HTA")
    parser.add_argument("--tracelens", default="", metavar="PYTHON", help="... that has TraceLens")
    parser.add_argument("--times", type=int, default=3, help="readings of each")
    parser.add_argument("--no-made", action="store_true", help="only the given traces")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [given_run(text) for text in args.traces]
        runs += [] if args.no_made else made_runs(Path(folder))
        before = os.getloadavg()[0]
        found = [measure(run, args.hta, args.tracelens, args.times) for run in runs]
        after = os.getloadavg()[0]
        facts = [facts_of(run) for run in runs]
    versions = {text for each in found for one in each.values() for text in one.said["versions"]}
    print(f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores;")
    print(f"load {before:.1f} before, {after:.1f} after; {', '.join(sorted(versions))}\n")
    print("| run | events | tool | wall s | CPU s | peak MB |\n|---|---:|---|---:|---:|---:|")
    for run, readings, each in zip(runs, found, facts, strict=True):
        for tool, one in readings.items():
            print(f"| {run.name} | {sum(f['events'] for f in each)} | {tool} | {one.row()} |")
    for run, readings, each in zip(runs, found, facts, strict=True):
        said = {tool: one.said for tool, one in readings.items() if not one.error}
        print(f"\n### {run.name}\n")
        print("\n".join(what_each_says(said, each, run.truth)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
