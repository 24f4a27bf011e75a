"""Runs of the offline engine with made-up prompts, timed as a caller would time them.

`latency` sends one batch again and again; `throughput` hands over everything at once. Times are
from handing the prompts over to the last token on the host. The attribution of all timed runs is
added up, so its wall is the sum over their requests.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns

from tpinfer.bench.workload import Sample
from tpinfer.config.sampling import SamplingParams
from tpinfer.engine.attribution import Attribution
from tpinfer.engine.metrics import RunReport
from tpinfer.engine.rank_engine import Engine
from tpinfer.engine.requests import GenerationRequest, Timing

PERCENTILES = (10, 25, 50, 75, 90, 99)
Requests = Callable[[int], Sequence[GenerationRequest]]
"""What a run hands over, by its number."""


@dataclass(frozen=True, slots=True)
class BenchRun:
    """One timed hand-over of prompts."""

    wall_s: float
    timings: list[Timing]
    """One per continuation."""
    num_requests: int
    num_input_tokens: int
    num_output_tokens: int
    report: RunReport


@dataclass(frozen=True, slots=True)
class BenchResult:
    """All timed runs of one benchmark."""

    runs: list[BenchRun]

    @property
    def middle_run(self) -> BenchRun:
        """The run of median wall time, the faster one of two in the middle: what it counted and
        its time belong together."""
        middle = statistics.median_low(self.latencies_s)
        return next(run for run in self.runs if run.wall_s == middle)

    @property
    def ttft_s(self) -> float:
        """Median time to first token over all requests."""
        return statistics.median(t.ttft_s for run in self.runs for t in run.timings)

    @property
    def tpot_s(self) -> float:
        """Median over all requests of (last token - first) / (tokens - 1)."""
        return statistics.median(t.tpot_s for run in self.runs for t in run.timings)

    @property
    def output_tokens_per_s(self) -> float:
        """Median over the runs."""
        return statistics.median(run.num_output_tokens / run.wall_s for run in self.runs)

    @property
    def total_tokens_per_s(self) -> float:
        """Input and output tokens, median over the runs."""
        return statistics.median(
            (run.num_input_tokens + run.num_output_tokens) / run.wall_s for run in self.runs
        )

    @property
    def latencies_s(self) -> list[float]:
        """Wall time of each run."""
        return [run.wall_s for run in self.runs]

    def percentiles_s(self) -> dict[int, float]:
        """Linearly interpolated percentiles of `latencies_s`."""
        import numpy as np

        return {p: float(np.percentile(self.latencies_s, p)) for p in PERCENTILES}

    def attribution(self) -> Attribution | None:
        """Where the requests' wall time went, first and later tokens, summed over all runs."""
        parts = [part for run in self.runs for part in (run.report.ttft, run.report.decode)]
        found = [part for part in parts if part is not None]
        whole = found[0] if found else None
        for part in found[1:]:
            assert whole is not None, "there is a first part before any other"
            whole = whole + part
        return whole

    def to_json(self) -> dict[str, object]:
        """Our own keys; times in seconds."""
        attribution = self.attribution()
        return {
            "ttft_s": self.ttft_s,
            "tpot_s": self.tpot_s,
            "output_tokens_per_s": self.output_tokens_per_s,
            "total_tokens_per_s": self.total_tokens_per_s,
            "latencies_s": self.latencies_s,
            "attribution": attribution.to_json() if attribution else None,
        }


def requests_of(
    samples: Sequence[Sample], n: int = 1, temperature: float = 0.0, run: int = 0
) -> list[GenerationRequest]:
    """Requests that run to their full length, with `n` continuations each. Runs of other numbers
    do not share cached prefixes. Raises ConfigError for an n that the engine does not take."""
    return [
        GenerationRequest(
            sample.prompt_token_ids,
            SamplingParams(
                temperature=temperature, max_tokens=sample.output_len, ignore_eos=True, n=n
            ),
            cache_salt=f"run {run}",
        )
        for sample in samples
    ]


def run_batch(engine: Engine, requests: Sequence[GenerationRequest]) -> BenchRun:
    """Hand the requests over once and wait for the last token, turned into text where the engine
    has a tokenizer. A collective call at its end."""
    began_ns = perf_counter_ns()
    for _ in engine.generate(requests):
        continue
    wall_s = (perf_counter_ns() - began_ns) / 1e9
    results = engine.results()
    outputs = [output for result in results for output in result.outputs]
    return BenchRun(
        wall_s=wall_s,
        num_requests=len(results),
        timings=[output.timing for output in outputs if output.timing is not None],
        num_input_tokens=sum(len(result.prompt_token_ids) for result in results),
        num_output_tokens=sum(len(output.token_ids) for output in outputs),
        report=engine.report(),
    )


def measure(
    engine: Engine,
    requests: Requests,
    num_warmups: int,
    num_iters: int,
) -> BenchResult:
    """`num_warmups` runs that are not counted, then `num_iters` that are."""
    runs = [run_batch(engine, requests(number)) for number in range(num_warmups + num_iters)]
    return BenchResult(runs[num_warmups:])
