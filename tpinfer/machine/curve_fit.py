"""Fit measured times of collectives by two straight lines, of which the lesser counts.

A collective has a way that is quick to start (one shot, LL) and one that moves more (two shots,
Simple), each `start + sent / rate`. Six numbers of this kind describe an all-reduce from 512 bytes
to 512 MB within 6 to 10 %.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_LEAST_START_S, _LEAST_SECONDS_PER_BYTE = 1e-9, 1e-15


@dataclass(frozen=True, slots=True)
class TwoLines:
    """`min(a + sent / b1, c + sent / b2)`, in seconds and bytes per second, a <= c."""

    a_s: float
    b1_bytes_per_s: float
    c_s: float
    b2_bytes_per_s: float
    error: float
    """Mean absolute relative error over the fitted points."""

    def seconds(self, sent_bytes: float) -> float:
        """Time of one call."""
        return min(
            self.a_s + sent_bytes / self.b1_bytes_per_s, self.c_s + sent_bytes / self.b2_bytes_per_s
        )


def fit_two_lines(sent_bytes: Sequence[float], seconds: Sequence[float]) -> TwoLines:
    """The two lines with the least relative error, found for each place where one may give way to
    the other. Two points or more, by rising bytes. Raises ValueError for fewer, or times that are
    not above zero."""
    sent, times = np.asarray(sent_bytes, float), np.asarray(seconds, float)
    if len(sent) < 2 or len(sent) != len(times) or not (times > 0).all():
        raise ValueError(
            f"{len(sent)} sizes with {len(times)} times cannot be fitted; give two or more "
            "of each, all times above 0"
        )
    one = _line(sent, times)
    found = [_made(one, one, sent, times)]
    for cut in range(2, len(sent) - 1):
        found.append(
            _made(_line(sent[:cut], times[:cut]), _line(sent[cut:], times[cut:]), sent, times)
        )
    return min(found, key=lambda lines: lines.error)


def _line(sent: np.ndarray, times: np.ndarray) -> tuple[float, float]:
    """(start, seconds per byte), both above zero, with least squares of the relative error."""
    weights = 1 / times
    rows = np.stack((weights, sent * weights), 1)
    (start, slope), *_ = np.linalg.lstsq(rows, np.ones_like(times), rcond=None)
    if slope < _LEAST_SECONDS_PER_BYTE:
        slope = _LEAST_SECONDS_PER_BYTE
        start = float(np.median(times - slope * sent))
    if start < _LEAST_START_S:
        start = _LEAST_START_S
        slope = max(
            float(np.median((times - start) / np.maximum(sent, 1.0))), _LEAST_SECONDS_PER_BYTE
        )
    return float(start), float(slope)


def _made(
    first: tuple[float, float], second: tuple[float, float], sent: np.ndarray, times: np.ndarray
) -> TwoLines:
    (a, slope_a), (c, slope_c) = sorted((first, second))
    predicted = np.minimum(a + sent * slope_a, c + sent * slope_c)
    error = float(np.mean(np.abs(predicted / times - 1)))
    return TwoLines(a, 1 / slope_a, c, 1 / slope_c, error)
