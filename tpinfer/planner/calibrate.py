"""Fits a few traits per (device, engine, precision) to measured points, and says how far the fit
can be trusted on what it has not seen.

Errors are of points held out of the fit, by whole tensor-parallel sizes or whole models; the error
of points that were fitted is given beside them and never alone. Intervals come from errors of held
out points too, and their coverage is counted on sizes whose own errors they do not rest on
(cross-conformal prediction, Vovk 2015).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil, log

import numpy as np

from tpinfer.config.errors import ConfigError
from tpinfer.planner.point_model import PointModels
from tpinfer.planner.precision import precision_named
from tpinfer.planner.published import Point
from tpinfer.planner.robust_fit import FitResult, Prior, Vector, fit_logarithms
from tpinfer.planner.traits import Traits

_DEFAULT = Traits()
PRIORS = (
    Prior("memory", _DEFAULT.memory, 0.08),
    Prior("compute", _DEFAULT.compute, 0.15),
    Prior("kv_read", _DEFAULT.kv_read, 0.2),
    Prior("attention", _DEFAULT.attention, 0.25),
    Prior("kernel_floor", _DEFAULT.kernel_floor, 0.25),
    Prior("collective", _DEFAULT.collective, 0.3),
    Prior("host_step_s", _DEFAULT.host_step_s, 0.5),
    Prior("host_row_s", _DEFAULT.host_row_s, 0.8),
    Prior("reserved_bytes", _DEFAULT.reserved_bytes, 0.5),
)
"""What is fitted, and how far from the datasheet each may lie: rates by some percent, what the
host and the engine's buffers take by a factor of two."""
_SPREAD = 0.07
"""Logarithmic spread of measurements around a good model: repeats and engine versions differ so."""
_MISFIT = 2.0
"""Residual of a point that does not fit in memory with the traits tried."""
_IMPOSSIBLE = 0.2
"""Part of a series that may lie below the least possible time before the series is set aside."""
_ROUNDING = 1e-9
LEVEL = 0.8
"""Part of measurements that an interval should hold."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A point with its prediction."""

    point: Point
    log_error: float
    """Logarithm of predicted over measured time."""

    @property
    def error(self) -> float:
        """Relative, of the time: 0.1 is predicted 10 % too slow."""
        return float(np.expm1(self.log_error))


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Errors of points that their fit had not seen."""

    by: str
    """`tp` or `model`."""
    folds: dict[str, tuple[Judged, ...]]
    """By what was held out."""

    @property
    def judged(self) -> tuple[Judged, ...]:
        """All folds."""
        return tuple(one for fold in self.folds.values() for one in fold)

    def coverage(self) -> float | None:
        """Part of the points that lie in the interval that the other folds' errors give."""
        if len(self.folds) < 2:
            return None
        hits = [
            inside(one.log_error, interval([o for name in self.folds if name != held
                                            for o in self.folds[name]]))
            for held, fold in self.folds.items()
            for one in fold
        ]  # fmt: skip
        return sum(hits) / len(hits)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What one group of points gave."""

    group: tuple[str, str, str]
    traits: Traits
    fitted: tuple[Judged, ...]
    """In-sample."""
    held_out: tuple[HeldOut, ...]
    set_aside: dict[str, tuple[Point, ...]]
    """Points that were not fitted, by the reason."""


def median_error(judged: Iterable[Judged]) -> float:
    """Median of the absolute relative errors; nan for none."""
    sizes = [abs(one.error) for one in judged]
    return float(np.median(sizes)) if sizes else float("nan")


def judge(points: Iterable[Point], models: PointModels, traits: Traits) -> tuple[Judged, ...]:
    """Points with the model's predictions; a point that does not fit gets a large error."""
    return tuple(Judged(point, _log_error(point, models, traits)) for point in points)


def calibrate(
    points: Sequence[Point], models: PointModels
) -> dict[tuple[str, str, str], Calibration]:
    """Every group of the points. Raises ConfigError for none."""
    if not points:
        raise ConfigError("there is no point to calibrate by; give TPOT or throughput rows")
    groups: dict[tuple[str, str, str], list[Point]] = defaultdict(list)
    for point in points:
        groups[point.group].append(point)
    return {group: _calibrate_group(group, groups[group], models) for group in sorted(groups)}


def fit_traits(points: Sequence[Point], models: PointModels) -> Traits:
    """Traits of one group's points; the cache's format is the one that fits better."""
    precision = precision_named(points[0].precision)
    formats = ("bf16", "fp8") if precision.weight_bytes <= 1 else ("auto",)
    names = [prior.name for prior in PRIORS]
    best: FitResult | None = None
    found = _DEFAULT
    for kv in formats:
        start = replace(_DEFAULT, kv=kv)

        def residuals(values: tuple[float, ...], start: Traits = start) -> Vector:
            traits = replace(start, **dict(zip(names, values, strict=True)))
            return np.array([_log_error(point, models, traits) for point in points])

        fit = fit_logarithms(residuals, PRIORS, _SPREAD)
        if best is None or fit.loss < best.loss:
            best = fit
            found = replace(start, **dict(zip(names, fit.values, strict=True)))
    device, engine, name = points[0].group
    return replace(
        found,
        name=f"{device}/{engine}/{name}",
        mode="calibrated",
        collectives_of=engine,
        origin=f"fitted to {len(points)} points",
    )


def interval(judged: Sequence[Judged]) -> tuple[float, float]:
    """Relative half-widths (below, above) of a prediction that hold `LEVEL` of such errors, by the
    ranks that conformal prediction takes."""
    errors = sorted(one.log_error for one in judged)
    count, tail = len(errors), (1 - LEVEL) / 2
    rank = min(count, ceil((count + 1) * (1 - tail)))
    high, low = errors[rank - 1], errors[count - rank]
    # Measured is predicted * exp(-error).
    return max(0.0, float(-np.expm1(-high))), max(0.0, float(np.expm1(-low)))


def inside(log_error: float, half_widths: tuple[float, float]) -> bool:
    """Whether a measurement with this error lies in the interval."""
    below, above = half_widths
    return -log(1 + above) - _ROUNDING <= log_error <= _ROUNDING - log(1 - below)


def _calibrate_group(
    group: tuple[str, str, str], points: list[Point], models: PointModels
) -> Calibration:
    kept, aside = _sort_out(points, models)
    traits = fit_traits(kept, models) if kept else _DEFAULT
    held = [
        _hold_out(kept, models, by, key)
        for by, key in (("tp", lambda p: f"tp={p.tp}"), ("model", lambda p: p.model))
        if len({key(point) for point in kept}) > 1
    ]
    if held:
        traits = replace(traits, interval=interval(held[0].judged))
    return Calibration(group, traits, judge(kept, models, traits), tuple(held), aside)


def _hold_out(
    points: list[Point], models: PointModels, by: str, key: Callable[[Point], str]
) -> HeldOut:
    folds = {}
    for name in sorted({key(point) for point in points}):
        traits = fit_traits([point for point in points if key(point) != name], models)
        folds[name] = judge([point for point in points if key(point) == name], models, traits)
    return HeldOut(by, folds)


def _sort_out(
    points: list[Point], models: PointModels
) -> tuple[list[Point], dict[str, tuple[Point, ...]]]:
    """Points to fit, and those that no model of this machine could match."""
    aside: dict[str, list[Point]] = defaultdict(list)
    series: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for point in points:
        try:
            models.value(point, _DEFAULT)
        except ConfigError as error:
            aside[str(error)].append(point)
        else:
            series[point.version, point.model].append(point)
    kept: list[Point] = []
    for (version, model), members in series.items():
        below = sum(
            not point.is_throughput and point.value < models.least_tpot_s(point, _DEFAULT)
            for point in members
        )
        if below > _IMPOSSIBLE * len(members):
            reason = (
                f"{below} of {len(members)} points of {version} with {model} take less time than "
                "the device's peak rates need for the stated prompts and concurrency: prompts came "
                "from a prefix cache, or fewer requests ran"
            )
            aside[reason].extend(members)
        else:
            kept += members
    return kept, {reason: tuple(members) for reason, members in aside.items()}


def _log_error(point: Point, models: PointModels, traits: Traits) -> float:
    try:
        value = models.value(point, traits)
    except ConfigError:
        return _MISFIT
    return log(point.value / value) if point.is_throughput else log(value / point.value)
