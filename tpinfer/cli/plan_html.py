"""The page of `tpinfer plan --html`: what the plans are turned into pictures from."""

from typing import TYPE_CHECKING, Any

from tpinfer.config.errors import ConfigError

if TYPE_CHECKING:
    from tpinfer.planner.pictures import PrefillLaw, Roofline
    from tpinfer.planner.plan import Plan
    from tpinfer.planner.predict import Planner
    from tpinfer.planner.search import Found


def render_page(
    title: str, planner: "Planner", found: "Found", law: "PrefillLaw | None", is_free: bool
) -> str:
    """One HTML file that needs nothing else; `is_free` as `pictures.scaling`. Raises ConfigError
    where no plan fits."""
    from tpprof.report.op_sums import OpSum
    from tpprof.report.plan_page import PlanMark, PlanPage, render_plan_page

    from tpinfer.planner.pictures import roofline, scaling
    from tpinfer.planner.report import prefill_sentence

    fitting = [plan for plan in found.plans if plan.fits]
    if not fitting:
        raise ConfigError(
            f"--html: no plan fits, so there is nothing to draw ({found.plans[0].reason})"
        )
    best = fitting[0]
    roof = roofline(planner, best)
    sentences = [
        f"Mode {best.mode}: 80 of 100 measurements should lie from {100 * best.relative[0]:.0f} % "
        f"below to {100 * best.relative[1]:.0f} % above a time. Numbers from {best.origin}."
    ]
    if law is not None:
        sentences.insert(0, prefill_sentence(law))
    scaled = scaling(planner, best.settings, is_free)
    return render_plan_page(
        PlanPage(
            title=title,
            headline=_headline(best),
            mode=best.mode,
            plans=[
                PlanMark(**_mark(plan), is_on_front=place in found.front)
                for place, plan in enumerate(fitting)
            ],
            scaling=[(f"tp {plan.tp}", _words(plan)) for plan in scaled],
            steps=[OpSum(**step) for step in _steps(roof)],
            ceilings=_ceilings(roof),
            sentences=sentences,
        )
    )


def _headline(plan: "Plan") -> str:
    from tpinfer.planner.report import NAMES

    ranks = f"tp {plan.tp}" + "".join(
        f", {name} {count}" for name, count in (("pp", plan.pp), ("dp", plan.dp)) if count > 1
    )
    assert plan.tpot_s is not None, "a plan that fits has times"
    bound = NAMES.get(plan.binding, plan.binding)
    return f"{ranks}: {1e3 * plan.tpot_s:.3g} ms per output token, bound by {bound}"


def _words(plan: "Plan") -> dict[str, float]:
    from tpinfer.planner.outcome import as_words

    return as_words(plan.tpot_split) if plan.fits else {}


def _mark(plan: "Plan") -> dict[str, Any]:
    """Fields of the page's `PlanMark`."""
    from tpinfer.planner.report import NAMES, digits

    assert plan.tpot_s is not None and plan.ttft_s is not None, "a plan that fits has times"
    pairs = plan.intervals()
    shown = {"TTFT": ("ttft_s", 1e3, " ms"), "TPOT": ("tpot_s", 1e3, " ms")}
    shown |= {"tokens/s": ("output_tokens_per_s", 1.0, ""), "USD": ("cost_per_mtok", 1.0, "")}
    intervals = {
        name: f"[{digits(factor * pairs[key][0])}, {digits(factor * pairs[key][1])}]{unit}"
        for name, (key, factor, unit) in shown.items()
        if key in pairs
    }
    rows, tokens = plan.settings.max_num_seqs, plan.settings.max_num_batched_tokens
    return {
        "name": f"tp {plan.tp} pp {plan.pp} dp {plan.dp}",
        "tpot_s": plan.tpot_s,
        "ttft_s": plan.ttft_s,
        "tokens_per_s": plan.output_tokens_per_s or 0.0,
        "num_devices": plan.num_ranks,
        "cost_per_mtok": plan.cost_per_mtok,
        "bound": NAMES.get(plan.binding, plan.binding),
        "intervals": intervals,
        "split_s": _words(plan),
        "note": f"{rows} sequences and {tokens} tokens a step at most",
    }


def _steps(roof: "Roofline") -> list[dict[str, Any]]:
    """Fields of the page's `OpSum`s; the floor is the nearer ceiling."""
    best = max(roof.flops_per_s.values())
    width = max(roof.bytes_per_s.values())
    return [
        {
            "key": point.name,
            "time_ns": round(point.time_s * 1e9),
            "floor_ns": round(max(point.flops / best, point.bytes_moved / width) * 1e9),
            "count": 1,
            "flops": round(point.flops),
            "bytes": round(point.bytes_moved),
            "bound": point.bound,
        }
        for point in roof.points
    ]


def _ceilings(roof: "Roofline") -> dict[str, object]:
    return {
        "flops_per_s": dict(roof.flops_per_s),
        "memory": [{"name": name, "bytes_per_s": rate} for name, rate in roof.bytes_per_s.items()],
    }
