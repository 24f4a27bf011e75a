"""Sentences that say what to do first, each with the time it is about, the largest first.

The times are what the report measured: an upper bound of what a fix gives back, because other
ranks and other work may fill the gap. `whatif` replays the ranks and says how much would be left.
"""

from dataclasses import dataclass

from tpprof.ranks.wait import EARLIER, HOST_LATE
from tpprof.report.clock_wording import reasons_of
from tpprof.report.collective_sums import waits_by_cause
from tpprof.report.op_sums import OpSum, sum_ops
from tpprof.report.wording import duration, percent, printable
from tpprof.results import Report, Split

_LEAST_SHARE = 0.01
"""Of the wall: below it nothing is advised."""
_MOST = 5
_MOST_DILATION = 1.05
_SPARSE = 0.5
"""Coverage below which the report asks for a better recording."""


@dataclass(frozen=True, slots=True)
class _Finding:
    gain_ns: int
    sentence: str


def advise(report: Report) -> list[str]:
    """At most five sentences about the rank shown; then what would make the report surer."""
    shown = next((one for one in report.ranks if one.rank == report.rank_shown), None)
    if shown is None or not report.wall_ns:
        return []
    if report.emulation:
        return [
            f"{report.emulation[:1].upper()}{report.emulation[1:]}: take no advice from its times; "
            "record the run on a machine with a GPU for every rank."
        ]
    ops = sum_ops(report.ops, report.rank_shown)
    findings = [*_waiting(report), *_transfer(report, ops), *_host(shown), *_kernels(report, ops)]
    findings += _clocks(report)
    findings += [*_small(report), *_idle(report), *_queue(report)]
    least = _LEAST_SHARE * report.wall_ns
    worth = sorted((f for f in findings if f.gain_ns >= least), key=lambda f: -f.gain_ns)
    return [finding.sentence for finding in worth[:_MOST]] + _recording(report)


def _of_wall(report: Report, spent_ns: int) -> str:
    return f"{duration(spent_ns)} ({percent(spent_ns, report.wall_ns)} of the wall)"


def _waiting(report: Report) -> list[_Finding]:
    """One per rank that others wait for: counted on whichever rank waited longest for it."""
    worst: dict[int, tuple[int, str, int]] = {}
    for split in report.ranks:
        by_rank: dict[int, tuple[int, str]] = {}
        for (late, doing), spent in waits_by_cause(report, split.rank).items():
            total, most = by_rank.get(late, (0, doing))
            by_rank[late] = total + spent, most
        for late, (spent, doing) in by_rank.items():
            if late >= 0 and spent > worst.get(late, (0, "", 0))[0]:
                worst[late] = spent, doing, split.rank
    findings = []
    for late, (spent, doing, waiting) in worst.items():
        mostly = f", mostly {while_doing(doing)}" if doing else ""
        text = (
            f"Rank {late} comes last to collectives{mostly}: rank {waiting} waits "
            f"{_of_wall(report, spent)} for it. Find out why rank {late} is slower there (its "
            "share of the work, its clocks, its host) before touching the network."
        )
        findings.append(_Finding(spent, text))
    return findings


def while_doing(doing: str) -> str:
    """What a late rank did, as part of a sentence; `doing` as `ranks.wait` says it."""
    if doing == HOST_LATE:
        return "because its host had not launched them yet"
    if doing.startswith(EARLIER):
        return f"because it is still in {printable(doing.removeprefix(EARLIER))}"
    return f"while it runs {printable(doing)}"


def _transfer(report: Report, ops: list[OpSum]) -> list[_Finding]:
    transfer = report.leaves.get("comm_transfer", 0)
    floor = sum(one.floor_ns for one in ops if one.bound == "communication")
    if not transfer:
        return []
    if floor and transfer > floor:
        text = (
            f"Transfer takes {_of_wall(report, transfer)}, its ceiling allows {duration(floor)}. "
            "A better collective for these sizes (one-shot below about 256 KB, NVLS, a larger "
            "bucket) can win the difference."
        )
        return [_Finding(transfer - floor, text)]
    text = (
        f"Transfer takes {_of_wall(report, transfer)}. Send less (a lower-precision all-reduce, "
        "fewer ranks) or hide it under compute."
    )
    return [_Finding(transfer, text)]


def _host(shown: Split) -> list[_Finding]:
    host = shown.leaves.get("host", 0) + shown.leaves.get("host_tail", 0)
    launch = shown.leaves.get("launch_latency", 0)
    findings = []
    if host:
        part, spent = max(shown.host_parts.items(), key=lambda item: item[1], default=("", 0))
        most = f", {percent(spent, host)} of it in {printable(part)}" if part else ""
        text = (
            f"The host keeps the device waiting for {duration(host)} "
            f"({percent(host, shown.wall_ns)} of the wall){most}. Replay graphs, prepare the next "
            "step while this one runs, or make that part cheaper."
        )
        findings.append(_Finding(host, text))
    if launch:
        text = (
            f"Launches on their way cost {duration(launch)} ({percent(launch, shown.wall_ns)} of "
            "the wall). A graph launches all kernels of a step at once."
        )
        findings.append(_Finding(launch, text))
    return findings


def _kernels(report: Report, ops: list[OpSum]) -> list[_Finding]:
    """The op that is furthest above its limit."""
    modelled = [o for o in ops if o.floor_ns and o.bound in ("compute", "memory", "balanced")]
    if not modelled:
        return []
    worst = max(modelled, key=_lost_by_kernel)
    lost = _lost_by_kernel(worst)
    ceiling = {"compute": "arithmetic", "memory": "memory"}.get(worst.bound, "nearest")
    text = (
        f"{printable(worst.key)} reaches {percent(worst.floor_ns, worst.time_ns)} of its "
        f"{ceiling} ceiling: {_of_wall(report, lost)} lies above it"
        f"{' beside what the clock costs' if worst.clocks_ns else ''}. Try another kernel or "
        "layout for it first."
    )
    return [_Finding(lost, text)]


def _lost_by_kernel(one: OpSum) -> int:
    """What full clocks would not give back."""
    return one.lost_ns - (one.clocks_ns or 0)


_REMEDIES = {
    "power cap": "Its power limit holds it back: spread the work over more ranks, or do it with "
    "fewer FLOPs of a narrower dtype",
    "thermal": "It is too hot: look at its cooling and its neighbours",
    "clocks set by the user": "Somebody set its clocks lower",
}
"""Part of a reason -> what to do."""


def _clocks(report: Report) -> list[_Finding]:
    """Of the rank shown."""
    one = next((o for o in report.device_clocks if o.rank == report.rank_shown), None)
    if one is None or not one.clocks_ns or one.compute_mhz is None:
        return []
    most = next(iter(one.reasons_ns), "")
    remedy = next((text for name, text in _REMEDIES.items() if name in most), "")
    text = (
        f"The device ran below its full clock ({reasons_of(one)}), and that alone is "
        f"{_of_wall(report, one.clocks_ns)} of what kernels lost. "
        f"{remedy or 'Find out what holds its clock'}."
    )
    return [_Finding(one.clocks_ns, text)]


def _small(report: Report) -> list[_Finding]:
    latency = report.leaves.get("latency", 0)
    gaps = report.leaves.get("graph_gap", 0)
    findings = []
    if latency:
        text = (
            f"Kernels too small to reach a ceiling take {_of_wall(report, latency)}. Fuse them "
            "with their neighbours, or give them more work with a larger batch."
        )
        findings.append(_Finding(latency, text))
    if gaps:
        text = (
            f"Gaps between the kernels of a graph take {_of_wall(report, gaps)}. Fewer, larger "
            "kernels or programmatic dependent launch close them."
        )
        findings.append(_Finding(gaps, text))
    return findings


_IDLE = {
    "copy": "Copies and fills, with nothing else running, take {}. Keep tensors where they are "
    "used; copy from pinned memory on a stream of its own.",
    "dependency_wait": "The device waits {} for another stream or event. Record the events nearer "
    "to the work they are for, or drop the ones nobody needs.",
    "idle_unexplained": "The device is idle for {} and the recording does not say why. Record the "
    "runtime's calls and stream waits too.",
}
"""Leaf -> sentence, with a place for the time."""


def _idle(report: Report) -> list[_Finding]:
    spent = {leaf: report.leaves.get(leaf, 0) for leaf in _IDLE}
    return [_Finding(ns, _IDLE[leaf].format(_of_wall(report, ns))) for leaf, ns in spent.items()]


def _queue(report: Report) -> list[_Finding]:
    queue = report.leaves.get("queue", 0)
    if not queue:
        return []
    text = (
        f"Requests wait {_of_wall(report, queue)} to be admitted. Allow more rows or KV blocks, "
        "or add replicas."
    )
    return [_Finding(queue, text)]


def _recording(report: Report) -> list[str]:
    """What to record or pass so that the next report says more."""
    sentences = []
    least = _LEAST_SHARE * report.wall_ns
    if report.dilation is not None and report.dilation > _MOST_DILATION:
        sentences.append(
            f"The run took {report.dilation:.2f} times as long while it was recorded: believe how "
            "kernels compare, not gaps and host time. Record without stacks, or with graphs."
        )
    unmodelled, unsplit = (report.leaves.get(leaf, 0) for leaf in ("unmodelled", "comm_unsplit"))
    if unmodelled > least and report.coverage.flop_model < _SPARSE:
        sentences.append(
            f"{_of_wall(report, unmodelled)} is kernels without a model of their work: pass "
            "--model config.json --tp N, or record with shapes."
        )
    if unsplit > least:
        sentences.append(
            f"{_of_wall(report, unsplit)} of communication could not be split into waiting and "
            "transfer: pass the traces of all ranks of the same run."
        )
    if report.leaves.get("unrecorded", 0) > least:
        spent = _of_wall(report, report.leaves["unrecorded"])
        sentences.append(
            f"In {spent} the recorder lost events: record fewer steps at a time, or with larger "
            "buffers."
        )
    return sentences
