"""What an engine in its steady state does, in closed form: as many requests in flight as the load
and the cache allow, each joined by the prompts of the others.

The way between analytic search and calibration; waiting times and percentiles need the simulation.
"""

from dataclasses import dataclass, replace

from tpinfer.costs.ops import StepAggregates
from tpinfer.planner.step_model import Split, StepModel


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of one kind, all alike."""

    input_len: int
    output_len: int
    concurrency: int
    """Requests in flight; more than fit wait for room."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What keeps requests out of a step."""

    kv_tokens: float
    """Tokens that the cache of one replica holds."""
    max_num_seqs: int = 2048
    max_num_batched_tokens: int = 8192
    reserves_output: bool = True
    """Whether a request is admitted only if its whole output fits too; else blocks are taken as it
    grows, and half of the output is there on the average."""

    def batch(self, load: Load) -> float:
        """Requests that run at once; below 1 where not even one fits."""
        share = 1.0 if self.reserves_output else 0.5
        fits = self.kv_tokens / (load.input_len + share * load.output_len)
        return min(load.concurrency, self.max_num_seqs, fits)


@dataclass(frozen=True, slots=True)
class AverageStep:
    """The average step between two tokens of a request."""

    tpot: Split
    batch: float
    """Requests that decode in it."""

    @property
    def output_tokens_per_s(self) -> float:
        """Of one replica."""
        return self.batch / self.tpot.total


def average_step(model: StepModel, load: Load, limits: Limits, share: float = 1.0) -> AverageStep:
    """The average step where each of the batch's requests is followed by another at once.

    Between two tokens of a request the others need `share * (batch - 1) * input / output` prompt
    tokens. They come in chunks: part of the steps carry one beside the decodes. Where even every
    step with a full token budget is too little, prompts bind and fewer requests decode. `share` is
    below 1 where requests come in waves and their prompts meet few decodes.
    """
    batch = max(1.0, limits.batch(load))
    budget = max(1.0, limits.max_num_batched_tokens - batch)
    prompt_tokens = share * (batch - 1) * load.input_len / load.output_len
    if prompt_tokens > budget:
        prompt_tokens = budget
        batch = 1 + budget * load.output_len / (load.input_len * share)
    chunk = min(budget, max(prompt_tokens, load.input_len))
    part = prompt_tokens / chunk
    tpot = model.step(_step(load, batch, 0.0)) * (1 - part)
    if part:
        tpot += model.step(_step(load, batch, chunk)) * part
    return AverageStep(tpot, batch)


def saturated_tokens_per_s(
    model: StepModel, load: Load, limits: Limits, num_requests: int | None = None
) -> float:
    """Output tokens a second of one replica with more requests waiting than fit.

    `load.concurrency` is not read. A run of `num_requests` that all wait at its start ends with a
    rest that does not fill the batch: requests of one length stay in step with each other, the
    less so the longer their prompts take to enter.
    """
    full = average_step(model, replace(load, concurrency=limits.max_num_seqs), limits)
    if num_requests is None:
        return full.output_tokens_per_s
    waves, rest = divmod(num_requests, max(1.0, full.batch))
    step_s = full.tpot.total
    entering = full.batch * load.input_len / limits.max_num_batched_tokens / load.output_len
    apart = min(1.0, entering)
    seconds = waves * step_s
    if rest >= 1:
        last = average_step(model, replace(load, concurrency=int(rest)), limits)
        seconds += (1 - apart) * last.tpot.total + apart * rest / full.batch * step_s
    return num_requests / seconds


def _step(load: Load, batch: float, chunk: float) -> StepAggregates:
    """Decodes in the middle of their output, and `chunk` prompt tokens: whole prompts, or an
    average part of one."""
    context = load.input_len + load.output_len / 2
    size = min(chunk, load.input_len)
    seen = (size + load.input_len) / 2
    prompts = chunk / size if size else 0.0
    return StepAggregates(
        tokens=round(batch + chunk),
        rows=round(batch + chunk / load.input_len),
        full_rows=0,
        sk=round(batch * context + prompts * seen),
        sqsk=round(batch * context + chunk * seen),
        sqsq=round(batch + chunk * size),
        sk_window=round(batch * context + prompts * seen),
        pairs_window=round(batch * context + chunk * (seen - size / 2)),
    )
