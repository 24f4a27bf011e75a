"""The table of where a run's time went: six words per rank, adding up to the wall, with the
origin of the ceilings."""

import textwrap
from collections.abc import Sequence

from tpinfer.config.units import format_flops, format_rate, format_size
from tpinfer.costs.bound import arithmetic_rate
from tpinfer.costs.kv_capacity import MemoryPlan
from tpinfer.engine.attribution import Attribution, RankSplit
from tpinfer.engine.run_report import RunReport

_COLUMNS = {
    "compute": "compute",
    "memory": "memory",
    "communication": "communi-",
    "small_kernels": "small",
    "host": "host",
    "queue": "queue",
}
_SECOND_LINE = {"communication": "cation", "small_kernels": "kernels"}
_LABEL, _WALL, _CELL = 11, 10, 13
_COLUMNS_WIDE = 100


def render_run(report: RunReport) -> str:
    """Text of at most 100 columns (a file's long name in the origin is not broken)."""
    if report.ttft is None:
        return "Where the time went: nobody got a token, so there is nothing to show."
    blocks = [_heading()]
    requests = "" if report.num_requests == 1 else f", mean of {report.num_requests} prompts"
    blocks.append(_section(f"time to first token{requests}", report.ttft, report.num_requests))
    if report.decode is not None and report.num_decode_tokens:
        title = f"per output token, mean of {report.num_decode_tokens}"
        blocks.append(_section(title, report.decode, report.num_decode_tokens))
    blocks += [_wrapped(note) for note in _notes(report)]
    return "\n".join(blocks)


def _heading() -> str:
    first = f"{'ms':>{_LABEL}}{'wall':>{_WALL}}" + "".join(
        f"{c:>{_CELL}}" for c in _COLUMNS.values()
    )
    second = " " * (_LABEL + _WALL) + "".join(
        f"{_SECOND_LINE.get(c, ''):>{_CELL}}" for c in _COLUMNS
    )
    return f"Where the time went\n{first}\n{second.rstrip()}"


def _section(title: str, attribution: Attribution, count: int) -> str:
    return "\n".join([title, *(_row(split, count) for split in attribution.ranks)])


def _row(split: RankSplit, count: int) -> str:
    """Cells are the exact integer ns divided by `count`; they add up to the wall before
    rounding."""
    cells = []
    for spent_ns in split.rollup.values():
        share = 100 * spent_ns / split.wall_ns if split.wall_ns else 0.0
        text = f"{_milliseconds(spent_ns / count)} {share:3.0f}%" if spent_ns else "-"
        cells.append(f"{text:>{_CELL}}")
    label = f"rank {split.rank}"
    return f"{label:>{_LABEL}}{_milliseconds(split.wall_ns / count):>{_WALL}}" + "".join(cells)


def _milliseconds(spent_ns: float) -> str:
    """No exponent, and at most eight characters below a day."""
    value = spent_ns / 1e6
    digits = 3 if value < 100 else 0 if value < 999.5 or value >= 1e5 else 1
    return f"{value:.{digits}f}"


def _wrapped(note: str) -> str:
    return textwrap.fill(
        note, _COLUMNS_WIDE, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _notes(report: RunReport) -> list[str]:
    level, ceilings = report.level, report.ceilings
    notes = [
        f"Judged against {level.name}: weights and KV of a step take "
        f"{format_size(report.working_set_bytes)} a "
        f"rank, which {_fits(report)}.",
        f"Ceilings ({ceilings.origin}): {level.name} {format_rate(level.bytes_per_s)}, "
        f"{report.dtype} {format_flops(arithmetic_rate(report.dtype, ceilings))}, an op takes at "
        f"least {ceilings.kernel_floor_s * 1e6:.1f} us"
        + (
            f", an all-reduce {ceilings.collective_latency_s * 1e6:.1f} us."
            if _is_sharded(report)
            else "."
        ),
    ]
    if _is_sharded(report):
        notes.append(_communication_note(report))
    notes.append(_memory_note(report.memory))
    notes += [f"Warning: {text}" for text in report.ttft.warnings] if report.ttft else []
    return notes


def _fits(report: RunReport) -> str:
    levels = report.ceilings.memory
    if report.level is levels[-1] and len(levels) > 1:
        largest = levels[-2]
        return f"no cache holds ({largest.name}: {format_size(largest.capacity_bytes)})"
    return f"fits its {format_size(report.level.capacity_bytes)}"


def _is_sharded(report: RunReport) -> bool:
    return report.ttft is not None and len(report.ttft.ranks) > 1


def _communication_note(report: RunReport) -> str:
    whole = report.ttft if report.decode is None else report.decode
    assert whole is not None, "a report with a table has at least a time to first token"
    waits = sum(split.leaves.get("comm_wait", 0) for split in whole.ranks)
    transfers = sum(split.leaves.get("comm_transfer", 0) for split in whole.ranks)
    total = waits + transfers
    if not total:
        return "Communication could not be split into waiting and transfer."
    late = max(whole.ranks, key=lambda split: split.caused_wait_ns)
    named = (
        f", {100 * late.caused_wait_ns / waits:.0f}% of it for rank {late.rank}" if waits else ""
    )
    phase = "while decoding" if report.decode is not None else "during the prompt"
    return (
        f"Communication {phase}: {100 * waits / total:.0f}% waiting for a later rank{named}; "
        f"{100 * transfers / total:.0f}% transfer."
    )


def _memory_note(plans: Sequence[MemoryPlan]) -> str:
    weights, kv, activations = (
        format_size(max(getattr(plan, name) for plan in plans))
        for name in ("weight_bytes", "kv_bytes", "activation_bytes")
    )
    text = (
        f"Memory a rank: weights {weights}, KV cache {kv} = {plans[0].capacity_tokens} tokens, "
        f"activations up to {activations}."
    )
    share = max(plan.replicated_kv_bytes_per_token / plan.kv_bytes_per_token for plan in plans)
    if share:
        text += (
            f" {100 * share:.0f}% of a rank's KV is a second copy: the cut falls inside a group "
            "of heads."
        )
    return text
