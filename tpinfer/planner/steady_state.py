"""What an engine in its steady state does, in closed form: requests of one kind in flight, and the
prompts of those that replace them among the decodes of the others.

The one closed form of the planner: search, estimates and calibration all stand on it. It knows
nothing of percentiles and of how much fits; `planner.simulate` and `planner.estimate` do.

A request spends p steps at its prompt and `output_len - 1` steps behind it. While it decodes it
meets the prompts of the others and never its own, which are its time to first token: counted in
both, prompts would be paid twice.
"""

from dataclasses import dataclass, replace
from math import ceil
from typing import Protocol

from tpinfer.costs.ops import StepAggregates, aggregate
from tpinfer.planner.split import Split


class StepPrices(Protocol):
    """What a step costs. `planner.step_model.StepModel` answers it."""

    def step(self, sums: StepAggregates) -> Split:
        """Time of a step by the six words; its queue is 0."""
        ...


_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Load:
    """Requests in flight, all alike."""

    input_len: int
    output_len: int
    running: float
    """How many have a place in steps, at their prompts or behind them; at least 1."""
    budget: int
    """Most tokens of a step."""
    in_waves: bool = False
    """Whether they came at once and are of one length, as in a closed loop of equal requests:
    those whose prompts shared a step end together, and are replaced together. Else they are spread
    evenly over their lives, as where lengths vary or requests come by chance."""
    window: int | None = None
    """Of the layers that slide."""
    num_cached: int = 0
    """Tokens of each prompt whose keys are there already; at least one is not."""
    num_stages: int = 1
    """Of the pipeline, each with another such batch in it: they follow each other, and wait behind
    one that has prompts. Waves come to all of them at once, and leave no bubble."""

    @property
    def prompt_len(self) -> int:
        """Tokens of a prompt that are computed."""
        return self.input_len - self.num_cached


@dataclass(frozen=True, slots=True)
class SteadyState:
    """Mean times of a request, without waits for a place."""

    ttft: Split
    """From its place to its first token; queue is the wait of a prompt where prompts are more than
    steps full of tokens can take."""
    tpot: Split
    """Between two tokens of it."""
    tokens_per_s: float
    """Output tokens of all that run."""
    decodes: float
    """Requests that decode in a step beside prompts."""


@dataclass(frozen=True, slots=True)
class _Mix:
    """How prompts and decodes share steps."""

    own_steps: float
    """Steps that a prompt takes."""
    chunk: float
    """Prompt tokens of a step that has any."""
    share: float
    """Of the steps between two tokens, those with prompts of others; above 1 where even every step
    is too few."""
    beside: float
    """Decodes in a step with prompts."""
    alone: float
    """Decodes in a step without."""


def steady_state(prices: StepPrices, load: Load) -> SteadyState:
    """The steady state of a load."""
    mix = _waves(load) if load.in_waves else _spread(load)
    if mix is None:
        return _crowded(prices, load)
    later = load.output_len - 1
    mixed = _step(prices, load, mix.beside, mix.chunk)
    tpot = Split()
    if later:
        plain = _step(prices, load, mix.alone, 0.0) if mix.share < 1 else mixed
        tpot = plain * (1 - mix.share) + mixed * mix.share
        if load.num_stages > 1 and not load.in_waves:
            slow = 1 - (1 - min(1.0, mix.share)) ** load.num_stages
            waits = (slow - mix.share) * (mixed.total - plain.total)
            tpot += Split(communication=max(0.0, waits))
    ttft = mixed * mix.own_steps
    life_s = ttft.total + later * tpot.total
    return SteadyState(ttft, tpot, load.running * load.output_len / life_s, mix.beside)


def saturated_tokens_per_s(
    prices: StepPrices, load: Load, most: float, num_requests: int | None = None
) -> float:
    """Output tokens a second with more requests waiting than the `most` that fit.

    `load.running` is not read. A run of `num_requests` that all wait at its start ends with a rest
    that does not fill the batch: requests of one length stay in step with each other, the less so
    the longer their prompts take to enter.
    """
    full = steady_state(prices, replace(load, running=most))
    if num_requests is None:
        return full.tokens_per_s
    batch = max(1.0, most)
    waves, rest = divmod(num_requests, batch)
    wave_s = batch * load.output_len / full.tokens_per_s
    apart = min(1.0, batch * load.prompt_len / load.budget / load.output_len)
    seconds = waves * wave_s
    if rest >= 1:
        last = steady_state(prices, replace(load, running=rest))
        last_s = rest * load.output_len / last.tokens_per_s
        seconds += (1 - apart) * last_s + apart * rest / batch * wave_s
    return num_requests * load.output_len / seconds


def _waves(load: Load) -> _Mix | None:
    """Prompts fill up steps one after the other, and the others' decodes are beside them."""
    running, later = max(1.0, load.running), load.output_len - 1
    # Of those whose prompts share a step none decodes in it.
    together = max(1.0, min(running, (load.budget - running) / max(1, load.prompt_len - 1)))
    room = max(1.0, load.budget - running + together)
    steps = float(ceil(running * load.prompt_len / room - _ROUNDING))
    own = steps
    if running > 1:  # a prompt begins where a step has tokens left, and may end in another
        own = max(1.0, min(steps, load.prompt_len / room + 1 - 1 / steps))
    if steps > later + own:
        return None
    chunk = running * load.prompt_len / steps
    share = max(0.0, steps - own) / later if later else 0.0
    return _Mix(own, chunk, share, running - running * own / steps, running)


def _spread(load: Load) -> _Mix | None:
    """Prompts at any time: part of the steps carry one, or each carries some."""
    running, later = max(1.0, load.running), load.output_len - 1
    own = ceil(load.prompt_len / max(1.0, load.budget - running + 1))
    decodes = 1 + (running - 1) * later / (later + own)
    room = max(1.0, load.budget - decodes)
    prompts = (running - 1) * load.prompt_len / (later + own)
    if prompts > room:
        return None
    chunk = min(room, max(prompts, load.prompt_len))
    return _Mix(own, chunk, prompts / chunk, decodes, decodes)


def _crowded(prices: StepPrices, load: Load) -> SteadyState:
    """Prompts bind: every step is full of tokens, and as many decode as their flow keeps up."""
    later = load.output_len - 1
    decodes = load.budget * later / (load.prompt_len + later)
    room = load.budget - decodes
    step = _step(prices, load, decodes, room)
    tokens_per_s = room / load.prompt_len * load.output_len / step.total
    ttft = step * max(1.0, load.prompt_len / room)
    life_s = load.running * load.output_len / tokens_per_s
    wait = Split(queue=max(0.0, life_s - ttft.total - later * step.total))
    return SteadyState(ttft + wait, step if later else Split(), tokens_per_s, decodes)


def _step(prices: StepPrices, load: Load, decodes: float, chunk: float) -> Split:
    """Decodes in the middle of their output, and `chunk` prompt tokens: whole prompts, or an
    average part of one."""
    context = load.input_len + load.output_len / 2
    size = min(chunk, load.prompt_len)
    seen = load.num_cached + (size + load.prompt_len) / 2
    prompts = chunk / size if size else 0.0
    near = min(context, load.window) if load.window else context
    part = aggregate([round(size)], [max(round(size), round(seen))], 0, 0, load.window)
    sums = StepAggregates(
        tokens=round(decodes + chunk),
        rows=round(decodes + chunk / load.prompt_len),
        full_rows=0,
        sk=round(decodes * context + prompts * seen),
        sqsk=round(decodes * context + chunk * seen),
        sqsq=round(decodes + chunk * size),
        sk_window=round(decodes * near + prompts * part.sk_window),
        pairs_window=round(decodes * near + prompts * part.pairs_window),
    )
    return prices.step(sums)
