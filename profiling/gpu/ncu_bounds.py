"""What Nsight Compute's counters say bounds a kernel, and how often the ledger's verdict on its op
is the same.

By the counters: the share of its peak that DRAM sustained over a kernel against that of the
multiprocessors (`dram__throughput`, `sm__throughput`, both `.avg.pct_of_peak_sustained_elapsed`).
The larger one bounds it; where neither reaches LEAST_PCT, its own latency does. Nsight's own advice
calls kernels latency-bound below 60 %; here it is less, because a kernel of few microseconds spends
a third of them beginning and ending and yet moves what it moves at the rate of the memory.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

DRAM_PCT = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
SM_PCT = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
TIME = "gpu__time_duration.sum"
LEAST_PCT = 40.0
_OP = re.compile(r"tpinfer\.op ([\w.]+)")


def op_in(texts: Sequence[str]) -> str:
    """The op that an NVTX range in some column of a row names; empty for none."""
    found = [match[1] for text in texts if text for match in _OP.finditer(text)]
    return found[-1] if found else ""


def bound_by_counters(kernels: Sequence[Mapping[str, Any]]) -> str:
    """`memory`, `compute` or `latency` for the kernels of one op, by their mean over time."""
    spent = sum(one[TIME] for one in kernels)
    dram, sm = (
        sum(one[name] * one[TIME] for one in kernels) / spent if spent else 0.0
        for name in (DRAM_PCT, SM_PCT)
    )
    if max(dram, sm) < LEAST_PCT:
        return "latency"
    return "memory" if dram >= sm else "compute"


def bounds(kernels: Sequence[Mapping[str, Any]], expected: Mapping[str, str]) -> dict[str, Any]:
    """Per op what its kernels are bound by and what the ledger expects; and the share of the time
    of ops in which both agree. `expected`: op -> `memory`, `compute` or `latency`."""
    by_op: dict[str, list[Mapping[str, Any]]] = {}
    for one in kernels:
        if one.get("op") in expected and DRAM_PCT in one and SM_PCT in one:
            by_op.setdefault(one["op"], []).append(one)
    ops: dict[str, Any] = {}
    agreed = spent = 0.0
    for op, mine in by_op.items():
        found, took = bound_by_counters(mine), sum(one[TIME] for one in mine)
        ops[op] = {"counters": found, "ledger": expected[op], "us": took / 1e3}
        spent += took
        agreed += took * (found == expected[op])
    return {"agree": agreed / spent if spent else None, "us": spent / 1e3, "ops": ops}
