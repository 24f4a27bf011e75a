"""What HolisticTraceAnalysis says of one run. Started by tpprof_peers.py with the Python that has
HTA: `hta_program.py OUT.json RANK0 [RANK1 ...]`.

Asks for what stands nearest to `tpprof analyze`: temporal breakdown, kernel breakdown, overlap,
idle breakdown and stragglers, of the whole file, without plots.
"""

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from hta.trace_analysis import TraceAnalysis

PACKAGES = ("HolisticTraceAnalysis", "pandas")


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or its error in a few words."""
    try:
        return call()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:160]}


def main() -> int:
    target, *files = sys.argv[1:]
    ranks = list(range(len(files)))
    # As a rule HTA leaves out the last profiler step; the other tools read all.
    analysis = TraceAnalysis(
        trace_files=dict(enumerate(files)), trace_dir="", include_last_profiler_step=True
    )

    def temporal() -> Any:
        return analysis.get_temporal_breakdown(visualize=False).to_dict("records")

    def kernels() -> Any:
        kinds, each = analysis.get_gpu_kernel_breakdown(
            visualize=False, duration_ratio=1.0, num_kernels=10**6
        )
        each = each[["name", "sum (us)", "kernel_type", "rank"]]
        return {"kinds": kinds.to_dict("records"), "kernels": each.to_dict("records")}

    def overlap() -> Any:
        return analysis.get_comm_comp_overlap(visualize=False).to_dict("records")

    def idle() -> Any:
        found, _ = analysis.get_idle_time_breakdown(ranks=ranks, visualize=False)
        return found.to_dict("records")

    def stragglers() -> Any:
        return [int(rank) for rank in analysis.get_potential_stragglers(visualize=False)]

    said: dict[str, Any] = {"versions": [f"{name} {version(name)}" for name in PACKAGES]}
    for call in (temporal, kernels, overlap, idle, stragglers):
        said[call.__name__] = outcome(call)
    with open(target, "w", encoding="utf-8") as file:
        json.dump(said, file, default=float)
    return 0


if __name__ == "__main__":
    sys.exit(main())
