"""What TraceLens says of one run. Started by tpprof_peers.py with the Python that has TraceLens:
`tracelens_program.py OUT.json ARCH RANK0 [RANK1 ...]`; ARCH is a platform it knows, a JSON file of
a card's rates, or `-`.

Asks for what stands nearest to `tpprof analyze`: the performance report of each rank and, for
several ranks, its report on collectives.
"""

import json
import os
import sys
import tempfile
import warnings
from importlib.metadata import version
from typing import Any

from TraceLens.Reporting.generate_multi_rank_collective_report_pytorch import (
    generate_collective_report,
)
from TraceLens.Reporting.generate_perf_report_pytorch import generate_perf_report_pytorch

PACKAGES = ("TraceLens", "pandas")


def on_rank(path: str, arch: str, folder: str) -> dict[str, Any]:
    """One rank's file: time line, and how much of it has a roofline."""
    given = {"gpu_arch_json_path" if arch.endswith(".json") else "gpu_arch_platform": arch}
    report = generate_perf_report_pytorch(
        profile_json_path=path, output_csvs_dir=folder, **({} if arch == "-" else given)
    )
    ops = report["unified_perf_summary"]
    times = ops["Kernel Time (µs)_sum"]
    priced = ops["has_perf_model"].astype(bool)
    priced &= ops["Data Moved (MB)"].notna() if "Data Moved (MB)" in ops else False
    timeline = report["gpu_timeline"].set_index("type")["time ms"].to_dict()
    said: dict[str, Any] = {"timeline_ms": timeline, "kernel_ms": times.sum() / 1000}
    said["priced_ms"] = times[priced].sum() / 1000
    if "Pct Roofline_mean" in ops:
        rated = ops["Pct Roofline_mean"].notna()
        said["rated_ms"] = times[rated].sum() / 1000
        said["floor_ms"] = (times * ops["Pct Roofline_mean"] / 100)[rated].sum() / 1000
    return said


def collectives(paths: list[str], folder: str) -> dict[str, Any]:
    """Waiting time of each rank, and the collectives' latency (least time of any rank), added
    up."""
    report = generate_collective_report(
        trace_glob=os.path.join(os.path.dirname(paths[0]), "*rank*"),
        world_size=len(paths),
        output_csvs_dir=folder,
    )
    latency = report["nccl_summary_implicit_sync"]["Total comm latency (ms)"].sum()
    return {"ranks": report["straggler_summary"].to_dict("records"), "latency_ms": latency}


def main() -> int:
    target, arch, *files = sys.argv[1:]
    warnings.simplefilter("ignore")
    said: dict[str, Any] = {"versions": [f"{name} {version(name)}" for name in PACKAGES]}
    with tempfile.TemporaryDirectory() as folder:
        said["ranks"] = [on_rank(path, arch, folder) for path in files]
        if len(files) > 1:
            try:
                said["collectives"] = collectives(files, folder)
            except Exception as error:
                said["collectives"] = {"error": f"{type(error).__name__}: {error}"[:160]}
    with open(target, "w", encoding="utf-8") as file:
        json.dump(said, file, default=float)
    return 0


if __name__ == "__main__":
    sys.exit(main())
