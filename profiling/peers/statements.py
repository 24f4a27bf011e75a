"""From the tools' answers to one table: per topic what the file holds (or what is true of a made
run), and what each tool says. Times in ms, `/` between ranks."""

from collections.abc import Sequence
from typing import Any

from made_runs import COMM_NAME

Answer = dict[str, Any]
HOST = ("host", "launch_latency", "dependency_wait", "host_tail", "idle_unexplained", "unrecorded")
NOTHING = "-"


def what_each_says(
    said: dict[str, Answer], facts: Sequence[Answer], truth: Answer | None
) -> list[str]:
    """Lines of a Markdown table."""
    tools = {"tpprof": _tpprof, "HTA": _hta, "TraceLens": _tracelens}
    columns = {"the file": _file(facts, truth)}
    columns |= {tool: tools[tool](answer) for tool, answer in said.items()}
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for topic in columns["the file"]:
        cells = (column.get(topic, NOTHING) for column in columns.values())
        lines.append(f"| {topic} | {' | '.join(cells)} |")
    return lines


def _ms(numbers: Sequence[float], per_ms: float = 1.0) -> str:
    return " / ".join(f"{number / per_ms:.2f}" for number in numbers) + " ms"


def _file(facts: Sequence[Answer], truth: Answer | None) -> dict[str, str]:
    names = sorted({name for one in facts for name in one["comm_names"]})
    counts = " / ".join(str(one["comm"]) for one in facts)
    column = {
        "wall": f"host {_ms([one['host_ms'] for one in facts])}; first to last kernel "
        f"{_ms([one['device_ms'] for one in facts])}",
        "busy": _ms([one["busy_ms"] for one in facts]),
        "communication": f"{counts} kernels, {_ms([one['comm_ms'] for one in facts])}"
        + (f": {', '.join(names)}" if names else ""),
        "wait, transfer": NOTHING,
        "idle": NOTHING,
        "roofline": f"kernels {_ms([one['kernel_ms'] for one in facts])}",
        "coverage": NOTHING,
    }
    if truth:
        column["wall"] = f"true {_ms(truth['wall_ns'], 1e6)}; {column['wall']}"
        column["wait, transfer"] = (
            f"true wait {_ms(truth['wait_ns'], 1e6)}, transfer {_ms(truth['transfer_ns'], 1e6)}; "
            "rank 1 is the late one"
        )
        idle = [sum(leaves.get(leaf, 0) for leaf in HOST) for leaves in truth["leaves"]]
        column["idle"] = f"true {_ms(idle, 1e6)}"
    return column


def _tpprof(report: Answer) -> dict[str, str]:
    ranks, coverage = report["ranks"], report["coverage"]
    comm = [
        sum(
            op["time_ns"]
            for op in report["ops"]
            if op["rank"] == one["rank"] and op["bound"] == "communication"
        )
        for one in ranks
    ]
    compute = [op for op in report["ops"] if op["bound"] != "communication"]
    rated = [op for op in compute if op["bound"] not in ("unmodelled", "communication")]
    time_ns, floor_ns = sum(op["time_ns"] for op in rated), sum(op["floor_ns"] for op in rated)
    idle = {leaf: [one["leaves"].get(leaf, 0) for one in ranks] for leaf in HOST}
    busy = [one["wall_ns"] - sum(one["leaves"].get(leaf, 0) for leaf in HOST) for one in ranks]
    gaps = [one["leaves"].get("graph_gap", 0) for one in ranks]
    column = {
        "busy": _ms([one - gap for one, gap in zip(busy, gaps, strict=True)], 1e6),
        "wall": f"{_ms([one['wall_ns'] for one in ranks], 1e6)}; leaves differ from it by "
        f"{max(abs(one['wall_ns'] - sum(one['leaves'].values())) for one in ranks)} ns; explained "
        f"{coverage['explained']:.0%}",
        "communication": f"{_ms(comm, 1e6)}, of it hidden "
        f"{_ms([one['comm_hidden_ns'] for one in ranks], 1e6)}",
        "idle": "; ".join(f"{leaf} {_ms(ns, 1e6)}" for leaf, ns in idle.items() if any(ns)),
        "roofline": f"{_ms([time_ns], 1e6)} rated, floor {_ms([floor_ns], 1e6)}"
        if time_ns
        else "no rates or no shapes: abstains",
        "coverage": ", ".join(f"{name} {share:.0%}" for name, share in coverage.items()),
    }
    column["wait, transfer"] = _split_of(report)
    return column


def _split_of(report: Answer) -> str:
    waits: dict[int, int] = {}
    moved: dict[int, int] = {}
    for one in report["collectives"]:
        for rank, wait, transfer in zip(
            one["ranks"], one["wait_ns"], one["transfer_ns"], strict=True
        ):
            waits[rank] = waits.get(rank, 0) + wait
            moved[rank] = moved.get(rank, 0) + transfer
    if not waits:
        left = [one["leaves"].get("comm_unsplit", 0) for one in report["ranks"]]
        return f"abstains: {_ms(left, 1e6)} not told apart" if any(left) else NOTHING
    last = [one["last_rank"] for one in report["collectives"]]
    latest = max(set(last), key=last.count)
    return (
        f"wait {_ms(list(waits.values()), 1e6)}, transfer {_ms(list(moved.values()), 1e6)}; rank "
        f"{latest} last in {last.count(latest) / len(last):.0%}"
    )


def _failed(answer: Any) -> str:
    return f"fails: {answer['error']}" if isinstance(answer, dict) and "error" in answer else ""


def _hta(said: Answer) -> dict[str, str]:
    column = {name: _failed(said[key]) for name, key in _HTA_PARTS.items()}
    if not column["wall"]:
        column["wall"] = f"{_ms([one['kernel_time(us)'] for one in said['temporal']], 1e3)}"
        parts = [
            [one[f"{part}_time(us)"] for one in said["temporal"]]
            for part in ("compute", "non_compute")
        ]
        whole = [sum(both) for both in zip(*parts, strict=True)]
        column["busy"] = f"{_ms(whole, 1e3)}, of it compute {_ms(parts[0], 1e3)}"
    if not column["communication"]:
        column["communication"] = _hta_kernels(said)
    if not column["wait, transfer"]:
        column["wait, transfer"] = f"stragglers {said['stragglers']}, no times"
    if not column["idle"]:
        spans = _failed(said["temporal"]) or _ms(
            [one["idle_time(us)"] for one in said["temporal"]], 1e3
        )
        kinds: dict[str, float] = {}
        for one in said["idle"]:
            kinds[one["idle_category"]] = kinds.get(one["idle_category"], 0) + one["idle_time"]
        split = ", ".join(f"{kind} {_ms([us], 1e3)}" for kind, us in kinds.items())
        column["idle"] = f"{spans}; of all streams: {split}"
    return column


_HTA_PARTS = {
    "wall": "temporal",
    "communication": "kernels",
    "wait, transfer": "stragglers",
    "idle": "idle",
}


def _hta_kernels(said: Answer) -> str:
    comm: dict[int, float] = {}
    for one in said["kernels"]["kernels"]:
        counts = one["kernel_type"] == "COMMUNICATION"
        comm[one["rank"]] = comm.get(one["rank"], 0) + one["sum (us)"] * counts
    overlap = _failed(said["overlap"]) or " / ".join(
        f"{one['comp_comm_overlap_pctg']:.1f} %" for one in said["overlap"]
    )
    missed = sorted(
        {
            one["name"].partition("(")[0]
            for one in said["kernels"]["kernels"]
            if COMM_NAME.search(one["name"]) and one["kernel_type"] != "COMMUNICATION"
        }
    )
    taken = f"; taken for computation: {', '.join(missed)}" if missed else ""
    return f"{_ms(list(comm.values()), 1e3)}; overlap {overlap}{taken}"


def _tracelens(said: Answer) -> dict[str, str]:
    ranks = said["ranks"]
    lines = [one["timeline_ms"] for one in ranks]
    kernels = sum(one["kernel_ms"] for one in ranks)
    share = sum(one["priced_ms"] for one in ranks) / kernels if kernels else 0.0
    rated = sum(one.get("rated_ms", 0) for one in ranks)
    floor = sum(one.get("floor_ms", 0) for one in ranks)
    column = {
        "wall": f"{_ms([one['total_time'] for one in lines])}",
        "busy": f"{_ms([one['busy_time'] for one in lines])}, of it computation "
        f"{_ms([one['computation_time'] for one in lines])}",
        "communication": f"{_ms([one['total_comm_time'] for one in lines])}, exposed "
        f"{_ms([one['exposed_comm_time'] for one in lines])}",
        "idle": f"{_ms([one['idle_time'] for one in lines])}, one number",
        "roofline": f"{_ms([rated])} rated, floor {_ms([floor])}" if rated else NOTHING,
        "coverage": f"per op whether it is priced ({share:.0%} of kernel time)",
    }
    found = said.get("collectives")
    if found:
        column["wait, transfer"] = _failed(found) or _waits(found)
    return column


def _waits(found: Answer) -> str:
    ordered = sorted(found["ranks"], key=lambda one: one["rank"])
    last = max(ordered, key=lambda one: one["pct_arrived_last"])
    return (
        f"wait {_ms([one['total_wait_time_us'] for one in ordered], 1e3)}, latency "
        f"{_ms([found['latency_ms']])}; rank {last['rank']} last in {last['pct_arrived_last']:.0f}%"
    )
