"""A prediction against what was measured, word by word: what was predicted, what came, and how much
of the difference is waiting for a later rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tpinfer.costs.leaves import ROLLUP
from tpprof.errors import TraceError
from tpprof.report.wording import TITLES, plural
from tpprof.results import Report

_DILATED = 1.05
_WORTH_A_LINE = 0.01
"""Share of the larger total below which a word is left out of the sentences."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Mean seconds of one window."""

    what: str
    """`output token` or `first token`."""
    num_windows: int
    words: dict[str, float]
    wait_s: float
    """Of communication, waiting for ranks that came later."""
    dilation: float | None
    """How many times as long the run took for being recorded; None where nobody knows."""
    late: tuple[tuple[int, float], ...]
    """(rank waited for, seconds), most first."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What was expected of one output token and of a first token."""

    output_token_s: Mapping[str, float]
    """By the six words."""
    first_token_s: Mapping[str, float]
    relative: tuple[float, float]
    """How far below and above the prediction 80 of 100 measurements should lie."""
    mode: str


def measured_in(report: Report, source: str) -> list[Measured]:
    """What the report says of output tokens and of first tokens. Raises TraceError."""
    kinds = (
        ("output token", [w.label for w in report.windows if _is_decode(w.label)]),
        ("first token", [w.label for w in report.windows if w.label.startswith("ttft")]),
    )
    found = [_mean(report, what, labels) for what, labels in kinds if labels]
    if not found:
        labels = ", ".join(sorted({w.label for w in report.windows})[:3]) or "none"
        raise TraceError(
            f"--compare {source}: it has no windows of decode steps or tokens (its windows: "
            f"{labels}); write it with `tpprof analyze TRACES --window steps --json {source}`, or "
            "--window itl or ttft"
        )
    return found


def _is_decode(label: str) -> bool:
    return label.startswith("itl") or (label.startswith("step") and "decode" in label)


def _mean(report: Report, what: str, labels: Sequence[str]) -> Measured:
    chosen = set(labels)
    splits = [
        split
        for window in report.windows
        if window.label in chosen
        for split in window.ranks
        if split.rank == report.rank_shown
    ]
    count = max(1, len(splits))
    words = {word: sum(one.rollup.get(word, 0) for one in splits) / count / 1e9 for word in ROLLUP}
    wait_s = sum(one.leaves.get("comm_wait", 0) for one in splits) / count / 1e9
    return Measured(what, len(splits), words, wait_s, report.dilation, _late(report, wait_s))


def _late(report: Report, wait_s: float) -> tuple[tuple[int, float], ...]:
    """The wait dealt out over the ranks that came last, as the report's collectives say."""
    waited: dict[int, int] = {}
    for one in report.collectives:
        if report.rank_shown in one.ranks and one.last_rank >= 0:
            spent = one.wait_ns[one.ranks.index(report.rank_shown)]
            waited[one.last_rank] = waited.get(one.last_rank, 0) + spent
    total = sum(waited.values())
    if not total or not wait_s:
        return ()
    found = [(rank, wait_s * spent / total) for rank, spent in waited.items() if spent]
    return tuple(sorted(found, key=lambda pair: (-pair[1], pair[0])))


def render_comparison(prediction: Prediction, measured: Sequence[Measured]) -> str:
    """A table and sentences for each kind of window, in at most 100 columns."""
    return "\n".join(_block(prediction, one) for one in measured)


def _block(prediction: Prediction, measured: Measured) -> str:
    is_later = measured.what == "output token"
    predicted = prediction.output_token_s if is_later else prediction.first_token_s
    totals = sum(predicted.values()), sum(measured.words.values())
    lines = [
        f"Predicted against measured, ms per {measured.what} "
        f"(mean of {plural(measured.num_windows, 'window')})",
        f"{'':<15}{'predicted':>11}{'measured':>11}{'difference':>12}",
    ]
    rows = [*((word, predicted[word], measured.words[word]) for word in predicted)]
    for word, before, after in [*rows, ("total", *totals)]:
        change = f"{1e3 * (after - before):+.3f}"
        name = TITLES.get(word, word)
        lines.append(f"{name:<15}{1e3 * before:>11.3f}{1e3 * after:>11.3f}{change:>12}")
    least = _WORTH_A_LINE * max(totals)
    order = sorted(rows, key=lambda row: -abs(row[2] - row[1]))
    lines += [
        _sentence(word, before, after, measured)
        for word, before, after in order
        if abs(after - before) > least
    ]
    low, high = prediction.relative
    is_inside = totals[0] * (1 - low) <= totals[1] <= totals[0] * (1 + high)
    interval = f"[{1e3 * totals[0] * (1 - low):.3f}, {1e3 * totals[0] * (1 + high):.3f}]"
    lines.append(
        f"The total is {'inside' if is_inside else 'outside'} the interval of the prediction "
        f"{interval} ({prediction.mode})."
    )
    if measured.dilation is not None and measured.dilation > _DILATED:
        lines.append(
            f"The run took {measured.dilation:.2f} times as long for being recorded: compare how "
            "words share the time, not the times."
        )
    return "\n".join(lines)


def _sentence(word: str, before: float, after: float, measured: Measured) -> str:
    """`predicted 3.1 ms communication, measured 4.9: 1.6 of it waiting for rank 3`."""
    text = f"predicted {1e3 * before:.2f} ms {TITLES[word]}, measured {1e3 * after:.2f}"
    if word != "communication" or not measured.wait_s:
        return text
    waits = [f"{1e3 * spent:.2f} of it waiting for rank {rank}" for rank, spent in measured.late]
    return f"{text}: " + (
        ", ".join(waits[:2]) or f"{1e3 * measured.wait_s:.2f} of it waiting for a later rank"
    )
