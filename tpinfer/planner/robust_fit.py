"""A small robust least-squares fit of positive parameters around what is known of them.

Gauss-Newton with damping over the logarithms of the parameters. Each has a prior (a median and a
spread of its logarithm), so that what the measurements do not tell stays where it was; residuals
beyond `_BEND` spreads count linearly (Huber 1964), so that single odd rows do not steer. Ten
parameters and some hundred residuals: no library is needed for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
_BEND, _STEP, _LONGEST = 1.5, 0.03, 0.7
_ROUNDS, _TRIES, _ENOUGH = 10, 6, 1e-3


@dataclass(frozen=True, slots=True)
class Prior:
    """What is known of one parameter before anything is measured."""

    name: str
    median: float
    spread: float
    """Standard deviation of its logarithm."""


@dataclass(frozen=True, slots=True)
class FitResult:
    """Parameters in the priors' order, and the loss they leave."""

    values: tuple[float, ...]
    loss: float


def fit_logarithms(
    residuals: Callable[[tuple[float, ...]], Vector],
    priors: tuple[Prior, ...],
    residual_spread: float,
) -> FitResult:
    """Minimise the robust sum of residuals and the parameters' distance from their priors.

    residuals: parameters -> [n] float64, such as logarithms of predicted over measured.
    """
    centre: Vector = np.array([log(prior.median) for prior in priors])
    spread = np.array([prior.spread for prior in priors])

    def at(point: Vector) -> Vector:
        return residuals(tuple(map(float, np.exp(point)))) / residual_spread

    def loss(point: Vector, found: Vector) -> float:
        size = np.abs(found)
        rows = np.where(size < _BEND, 0.5 * size**2, _BEND * (size - 0.5 * _BEND))
        return float(rows.sum() + 0.5 * np.sum(((point - centre) / spread) ** 2))

    point: Vector = centre.copy()
    damping = 1e-2
    found = at(point)
    best = loss(point, found)
    for _ in range(_ROUNDS):
        slopes = np.stack(
            [(at(point + step) - found) / _STEP for step in np.eye(len(priors)) * _STEP], axis=1
        )
        weights = np.minimum(1.0, _BEND / np.maximum(np.abs(found), 1e-9))
        curvature = slopes.T @ (weights[:, None] * slopes) + np.diag(spread**-2.0)
        gradient = slopes.T @ (weights * found) + (point - centre) / spread**2
        for _ in range(_TRIES):
            damped = curvature + damping * np.diag(np.diag(curvature))
            newton = np.asarray(np.linalg.solve(damped, gradient), dtype=np.float64)
            move = np.clip(-newton, -_LONGEST, _LONGEST)
            tried = at(point + move)
            value = loss(point + move, tried)
            if value < best:
                break
            damping *= 5
        else:
            break
        gained, point, found, best = best - value, point + move, tried, value
        damping /= 4
        if gained < _ENOUGH * best:
            break
    return FitResult(tuple(map(float, np.exp(point))), best)
