"""Calibration on made-up machines whose true traits are known, and what it says of its errors."""

from dataclasses import replace
from math import exp, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pure.planner_cases import shape
from tpinfer.config.errors import ConfigError
from tpinfer.planner.calibrate import (
    Judged,
    calibrate,
    fit_traits,
    inside,
    interval,
    judge,
    median_error,
)
from tpinfer.planner.point_model import PointModels
from tpinfer.planner.published import Point
from tpinfer.planner.robust_fit import Prior, fit_logarithms
from tpinfer.planner.steady_state import Load, saturated_tokens_per_s, steady_state
from tpinfer.planner.traits import Traits

MODELS = PointModels({name: shape(name) for name in ("llama-3.1-8b", "llama-3.1-70b")})
POINT = Point(
    "h100-sxm-80g", "vllm", "made up", "bf16", "llama-3.1-8b", 1, 1, 1024, 512, 16, None, 1.0
)
TRUE = Traits(
    memory=0.92, compute=0.8, kv_read=1.3, kernel_floor=1.3, collective=1.4, host_step_s=0.9e-3,
    host_row_s=2e-5,
)  # fmt: skip


def measured(noise: float, seed: int = 1, traits: Traits = TRUE) -> list[Point]:
    """Two models, four sizes, three shapes, four loads, as a machine with `traits` would run
    them."""
    rng = np.random.default_rng(seed)
    points = []
    for model in ("llama-3.1-8b", "llama-3.1-70b"):
        for tp in (1, 2, 4, 8):
            if (model, tp) == ("llama-3.1-70b", 1):
                continue  # 141 GB do not fit
            for lengths in ((1024, 1024), (1024, 128), (4096, 512)):
                for load in (1, 8, 32, 128):
                    point = replace(
                        POINT, model=model, tp=tp, input_len=lengths[0], output_len=lengths[1],
                        concurrency=load,
                    )  # fmt: skip
                    true = MODELS.value(point, traits)
                    points.append(replace(point, value=true * exp(noise * rng.standard_normal())))
    return points


def test_known_traits_are_found_again() -> None:
    found = fit_traits(measured(0.01), MODELS)
    for name in ("memory", "compute", "kv_read", "kernel_floor", "collective"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=0.12), name
    assert found.host_row_s == pytest.approx(TRUE.host_row_s, rel=0.25)
    assert found.mode == "calibrated" and found.name == "h100-sxm-80g/vllm/bf16"
    assert median_error(judge(measured(0.0), MODELS, found)) < 0.02


def test_odd_rows_do_not_steer() -> None:
    points = measured(0.02)
    for i in range(0, len(points), 12):
        points[i] = replace(points[i], value=points[i].value * 3)
    found = fit_traits(points, MODELS)
    assert median_error(judge(measured(0.0), MODELS, found)) < 0.04


def test_the_format_of_the_cache_is_found() -> None:
    for kv in ("bf16", "fp8"):
        start = [replace(p, precision="fp8") for p in measured(0.0)]
        true = replace(TRUE, kv=kv)
        points = [
            replace(p, value=MODELS.value(p, true))
            for p in start
            if p.model == "llama-3.1-8b" and p.tp < 4
        ]
        assert fit_traits(points, MODELS).kv == kv


def test_left_out_points_are_predicted_and_intervals_hold() -> None:
    (found,) = calibrate(measured(0.05), MODELS).values()
    by = {held.by: held for held in found.held_out}
    assert set(by) == {"tp", "model"} and set(by["tp"].folds) == {"tp=1", "tp=2", "tp=4", "tp=8"}
    assert len(by["tp"].judged) == len(found.fitted) == 84
    assert 0.02 < median_error(by["tp"].judged) < 0.08
    cover = by["tp"].coverage()
    assert cover is not None and 0.65 <= cover <= 0.95
    below, above = found.traits.interval
    assert 0.03 < below < 0.2 and 0.03 < above < 0.2


def test_what_beats_the_peak_is_set_aside_with_the_reason() -> None:
    good = measured(0.02)
    fast = [
        replace(p, version="cached", value=MODELS.least_tpot_s(p, Traits()) * 0.9)
        for p in good[:10]
    ]
    (found,) = calibrate([*good, *fast], MODELS).values()
    ((reason, points),) = found.set_aside.items()
    assert reason.startswith("10 of 10 points of cached with llama-3.1-8b take less time")
    assert list(points) == fast and len(found.fitted) == len(good)


def test_what_does_not_fit_is_set_aside() -> None:
    point = replace(POINT, model="llama-3.1-70b")
    (found,) = calibrate([*measured(0.02), point], MODELS).values()
    assert [points for points in found.set_aside.values()] == [(point,)]


def test_nothing_to_calibrate_by_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no point"):
        calibrate([], MODELS)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "other"}, "model other"),
        ({"device": "other"}, "device 'other'"),
        ({"engine": "other"}, "engine 'other'"),
        ({"precision": "other"}, "precision 'other'"),
    ],
)
def test_unknown_names_say_what_is_known(change: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        MODELS.value(replace(POINT, **change), Traits())


@given(st.lists(st.floats(-0.5, 0.5), min_size=10, max_size=200))
def test_an_interval_holds_its_part_of_the_errors_it_came_from(errors: list[float]) -> None:
    judged = [Judged(POINT, error) for error in errors]
    bounds = interval(judged)
    assert sum(inside(error, bounds) for error in errors) >= 0.8 * len(errors) - 1e-9


@given(st.floats(0.3, 3), st.floats(0.3, 3))
def test_a_fit_lies_between_prior_and_measurements(first: float, second: float) -> None:
    priors = (Prior("a", 1.0, 0.5), Prior("b", 2.0, 0.5))

    def residuals(values: tuple[float, ...]) -> np.ndarray:
        return np.array(
            [log(values[0] / first)] * 400 + [log(values[0] * values[1] / second)] * 400
        )

    found = fit_logarithms(residuals, priors, 0.05)
    assert found.values[0] == pytest.approx(first, rel=0.1)
    assert found.values[0] * found.values[1] == pytest.approx(second, rel=0.1)
    told = fit_logarithms(lambda values: np.zeros(1), priors, 0.05)
    assert told.values == pytest.approx((1.0, 2.0)) and told.loss == pytest.approx(0.0)


@settings(max_examples=30)
@given(st.integers(1, 400), st.integers(16, 8000), st.integers(16, 4000))
def test_more_load_is_slower_for_each_and_more_for_all(
    running: int, prompt: int, output: int
) -> None:
    model = MODELS.step_model(POINT, Traits())
    one, more = (
        steady_state(model, Load(prompt, output, count, 8192)) for count in (running, running + 1)
    )
    assert more.tpot.total >= one.tpot.total * (1 - 1e-3)
    assert more.tokens_per_s >= one.tokens_per_s * (1 - 5e-3)


def test_a_run_that_ends_is_below_one_that_goes_on() -> None:
    model = MODELS.step_model(POINT, Traits())
    load = Load(128, 1024, 256, 8192)
    endless = saturated_tokens_per_s(model, load, 256)
    assert saturated_tokens_per_s(model, load, 256, 256) == pytest.approx(endless)
    assert saturated_tokens_per_s(model, load, 256, 260) < 0.8 * endless
    assert saturated_tokens_per_s(model, load, 256, 25_601) == pytest.approx(endless, rel=0.02)
