"""Which placements are worth it: thousands by their steady states, the best few by simulation, and
of those the ones that no other beats in everything."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tpinfer.planner.fit import Fit
from tpinfer.planner.placement import EngineSettings, sizes_to_try
from tpinfer.planner.plan import Plan
from tpinfer.planner.predict import Planner
from tpinfer.planner.simulate import settled_requests

MOST_ESTIMATES, MOST_SIMULATED = 10_000, 20
_FEWEST_SIMULATED, _MOST_SERVED = 4, 400_000
"""Fewer plans are simulated where many requests are in flight: by requests served in all."""
CHUNKS = (256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384)
"""Tokens of a step that are tried where the user names none."""
ROW_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Sequences of a step that are tried, as shares of the most."""
ALIKE = 0.05
"""Relative difference below which two plans are not worth two simulations."""
_MOST_MISFITS = 300


@dataclass(frozen=True, slots=True)
class Found:
    """What a search leads to."""

    plans: tuple[Plan, ...]
    """Best first; those that do not fit at the end."""
    num_estimated: int
    num_simulated: int
    front: frozenset[int]
    """Places in `plans` of those that no other one beats."""


def fixed(
    planner: Planner,
    sizes: tuple[int, int, int],
    settings: EngineSettings,
    num_requests: int | None = None,
) -> Found:
    """The plan of one placement."""
    plan = planner.simulate(planner.fit(sizes, settings), settings, num_requests)
    return Found((plan,), 0, int(plan.fits), frozenset({0} if plan.fits else ()))


def search(
    planner: Planner,
    settings: EngineSettings,
    is_free: tuple[bool, bool] = (True, True),
    num_requests: int | None = None,
) -> Found:
    """Try every placement with every engine setting that `is_free`: (sequences of a step, tokens of
    a step); of tokens the runtime's own choice for each placement goes before others."""
    estimates, misfits = estimate_all(planner, settings, is_free)
    served = num_requests or settled_requests(planner.workload)
    most = max(_FEWEST_SIMULATED, min(MOST_SIMULATED, _MOST_SERVED // served))
    chosen = shortlist([plan for plan, _ in estimates], most)
    plans = [
        planner.simulate(fit, plan.settings, num_requests)
        for plan, fit in (estimates[place] for place in chosen)
    ]
    plans.sort(key=merit)
    front = pareto(plans)
    count = len(estimates) + len(misfits)
    return Found((*plans, *misfits[:_MOST_MISFITS]), count, len(plans), front)


def estimate_all(
    planner: Planner, settings: EngineSettings, is_free: tuple[bool, bool] = (True, True)
) -> tuple[list[tuple[Plan, Fit]], list[Plan]]:
    """Up to MOST_ESTIMATES steady states of what fits, and the placements that do not."""
    estimates: list[tuple[Plan, Fit]] = []
    misfits: list[Plan] = []
    fitting = []
    for sizes in sizes_to_try(planner.topology, planner.spec):
        own = planner.with_chunk(sizes, settings) if is_free[1] else settings
        fit = planner.fit(sizes, own)
        if fit.fits:
            fitting.append((sizes, list(_settings(planner, sizes, own, is_free))))
        else:
            misfits.append(planner.estimate(fit, own))
    # Every placement gets its first settings before any gets its last.
    for place in range(max((len(tried) for _, tried in fitting), default=0)):
        for sizes, tried in fitting:
            if len(estimates) + len(misfits) >= MOST_ESTIMATES:
                return estimates, misfits
            if place < len(tried):
                fit = planner.fit(sizes, tried[place])
                if fit.fits:
                    estimates.append((planner.estimate(fit, tried[place]), fit))
    return estimates, misfits


def _settings(
    planner: Planner,
    sizes: tuple[int, int, int],
    settings: EngineSettings,
    is_free: tuple[bool, bool],
) -> Iterator[EngineSettings]:
    """Engine settings that make a difference for so many replicas, the given ones first."""
    work, most = planner.workload, settings.max_num_seqs
    if work.concurrency is not None:
        most = min(most, -(-work.concurrency // sizes[2]))
    shares = ROW_SHARES if is_free[0] else (1.0,)
    rows = dict.fromkeys(max(1, round(most * share)) for share in shares)
    given = settings.max_num_batched_tokens
    chunks = dict.fromkeys((given, *CHUNKS)) if is_free[1] else (given,)
    for count in rows:
        for chunk in chunks:
            yield replace(settings, max_num_seqs=count, max_num_batched_tokens=chunk)


def merit(plan: Plan) -> tuple[object, ...]:
    """Sorts plans, best first: those that fit, keep up and keep the promises; of these the cheapest
    for a token, then the fastest."""
    return (
        not plan.fits,
        not plan.keeps_up,
        bool(plan.slo_misses),
        plan.device_s_per_token,
        plan.tpot_s or 0.0,
        plan.ttft_s or 0.0,
    )


def pareto(plans: Sequence[Plan]) -> frozenset[int]:
    """Places of the plans that no other beats: in TTFT, TPOT, throughput and cost at once."""
    return frozenset(_front([_goals(plan) if plan.fits else None for plan in plans]))


def shortlist(plans: Sequence[Plan], most: int) -> list[int]:
    """Places of the `most` plans to look at closer: of each placement the best by merit that no
    other plan beats, then its second best, and so on; of near alike ones the better. What is
    beaten fills up."""
    front = sorted(_front([_goals(plan) for plan in plans]), key=lambda i: merit(plans[i]))
    beaten = sorted(set(range(len(plans))) - set(front), key=lambda i: merit(plans[i]))
    turns: dict[tuple[int, int, int], int] = {}
    ranked = []
    for place in _thinned(plans, front):
        plan = plans[place]
        sizes = plan.tp, plan.pp, plan.dp
        turns[sizes] = turns.get(sizes, 0) + 1
        ranked.append((turns[sizes], len(ranked), place))
    chosen = [place for _, _, place in sorted(ranked)]
    return (chosen + _thinned(plans, beaten[: 4 * most], chosen))[:most]


def _thinned(plans: Sequence[Plan], places: Sequence[int], before: Sequence[int] = ()) -> list[int]:
    """Those of `places` that differ in some goal by more than ALIKE from all that come before."""
    kept = list(before)
    for place in places:
        goals = _goals(plans[place])
        if not any(_are_alike(goals, _goals(plans[other])) for other in kept):
            kept.append(place)
    return kept[len(before) :]


def _are_alike(goals: tuple[float, ...], others: tuple[float, ...]) -> bool:
    return all(abs(a - b) <= ALIKE * abs(b) for a, b in zip(goals, others, strict=True))


def _goals(plan: Plan) -> tuple[float, ...]:
    """What is to be small."""
    return (
        plan.tpot_s or 0.0,
        plan.ttft_s or 0.0,
        -(plan.output_tokens_per_s or 0.0),
        plan.device_s_per_token,
    )


def _front(goals: Sequence[tuple[float, ...] | None]) -> list[int]:
    """Places that no other beats or equals in all goals; of equals the first stays."""
    order = sorted(
        ((one, place) for place, one in enumerate(goals) if one is not None),
    )
    kept: list[tuple[tuple[float, ...], int]] = []
    for one, place in order:  # whoever beats it stands before it
        if not any(all(a <= b for a, b in zip(other, one, strict=True)) for other, _ in kept):
            kept.append((one, place))
    return [place for _, place in kept]
