"""From the lives of simulated requests to what people ask: times to first token and per output
token with percentiles, throughput, where the time went, and what held requests up.

Requests of the beginning, which all come at once, and those of the end, which have the machine to
themselves, are left out where enough are between.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from tpinfer.planner.simulate import RequestTimes, Run
from tpinfer.planner.split import Split

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and percentiles of one time, in seconds."""

    mean: float
    percentiles: tuple[float, ...]
    """At PERCENTILES."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one engine does with its requests."""

    ttft: Spread
    tpot: Spread
    """TPOT of a request: (end - first token) / (tokens - 1); 0 for requests of one token."""
    ttft_split: Split
    """Sums to the mean; queue is the wait before the first step. A later wait, of a request that
    was preempted, is in the words of the steps that ran meanwhile."""
    tpot_split: Split
    """Sums to the mean; queue is 0."""
    output_tokens_per_s: float
    requests_per_s: float
    num_running: float
    """Requests with a row, mean over steps."""
    short_of_kv: float
    """Share of steps in which requests waited for blocks."""
    short_of_rows: float
    """The same for rows."""
    num_preemptions: int
    num_requests: int
    """Those the means are over."""

    @property
    def binding(self) -> str:
        """The word that most of an output token's time goes to (of a first token's, where only one
        is generated)."""
        return largest_word(self.tpot_split if self.tpot_split.total else self.ttft_split)


def largest_word(split: Split) -> str:
    """The word with most of the time."""
    words = as_words(split)
    return max(words, key=lambda word: words[word])


def as_words(split: Split) -> dict[str, float]:
    """Seconds by the six words, in their order."""
    return {
        "compute": split.compute,
        "memory": split.memory,
        "communication": split.communication,
        "small_kernels": split.small_kernels,
        "host": split.host,
        "queue": split.queue,
    }


def outcome_of(*runs: Run) -> Outcome:
    """Means over the requests that met a settled engine; of the batches of a pipeline together,
    with throughput and running requests of one of them on the average."""
    kept = [(run, _measured(run)) for run in runs]
    measured = [one for _, members in kept for one in members]
    later = max(1, runs[0].workload.output_len - 1)
    each, num_steps = 1 / len(measured), sum(len(run.ends_s) for run in runs)
    queue = sum(one.started_s - one.arrived_s for one in measured) * each
    first, behind = Split(queue=queue), Split()
    for run, members in kept:
        sums, part = _SplitSums(run.splits), len(members) * each
        first += part * sums.mean(members, lambda one: (one.first_step - 1, one.first_token_step))
        behind += part * sums.mean(members, lambda one: (one.first_token_step, one.last_step))
    tokens_per_s = sum(_throughput(run, members) for run, members in kept) / len(runs)
    return Outcome(
        ttft=_spread([one.first_token_s - one.arrived_s for one in measured]),
        tpot=_spread([(one.ended_s - one.first_token_s) / later for one in measured]),
        ttft_split=first,
        tpot_split=behind * (1 / later),
        output_tokens_per_s=tokens_per_s,
        requests_per_s=tokens_per_s / runs[0].workload.output_len,
        num_running=sum(sum(run.num_running) for run in runs) / num_steps,
        short_of_kv=sum(sum(run.short_of_kv) for run in runs) / num_steps,
        short_of_rows=sum(sum(run.short_of_rows) for run in runs) / num_steps,
        num_preemptions=sum(one.num_preemptions for run in runs for one in run.requests),
        num_requests=len(measured),
    )


def _measured(run: Run) -> Sequence[RequestTimes]:
    """Those between beginning and end."""
    count, workload = len(run.requests), run.workload
    if workload.concurrency is None:
        first, last = count // 5, count
    else:
        first, last = workload.concurrency, count - workload.concurrency
    return (
        run.requests[first:last]
        if last - first >= min(workload.concurrency or 1, count)
        else (run.requests)
    )


def _throughput(run: Run, measured: Sequence[RequestTimes]) -> float:
    """Tokens a second. In a closed loop by Little's law: so many in flight, each for its life. Else
    what was drawn between the first of the measured requests' arrivals and the last arrival of
    all."""
    workload = run.workload
    if workload.concurrency is not None:
        in_flight = min(workload.concurrency, len(run.requests))
        life = sum(one.ended_s - one.arrived_s for one in measured) / len(measured)
        return in_flight * workload.output_len / life
    begin, end = measured[0].arrived_s, run.requests[-1].arrived_s
    if end <= begin:
        end = max(one.ended_s for one in measured)
    drawn = sum(
        count for count, at in zip(run.tokens, run.ends_s, strict=True) if begin < at <= end
    )
    return drawn / (end - begin)


def _spread(values: list[float]) -> Spread:
    ordered = sorted(values)
    last = len(ordered) - 1
    found = []
    for percent in PERCENTILES:
        place = last * percent / 100
        low = int(place)
        high = min(low + 1, last)
        found.append(ordered[low] + (ordered[high] - ordered[low]) * (place - low))
    return Spread(sum(ordered) / len(ordered), tuple(found))


class _SplitSums:
    """Running sums over steps, so that an interval of steps costs two look-ups a word."""

    def __init__(self, splits: Sequence[Split]) -> None:
        columns = zip(*(tuple(as_words(split).values()) for split in splits), strict=True)
        self._words = [list(accumulate(column, initial=0.0)) for column in columns]

    def mean(
        self,
        requests: Sequence[RequestTimes],
        steps: Callable[[RequestTimes], tuple[int, int]],
    ) -> Split:
        """Mean over requests of the steps behind the first number up to the second."""
        spans = [steps(one) for one in requests]
        found = [
            sum(words[last + 1] - words[before + 1] for before, last in spans) / len(spans)
            for words in self._words
        ]
        return Split(*found)
