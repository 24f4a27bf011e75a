"""Half-open intervals [start, end) as pairs of int64 columns: union, cuts, and who owns a moment.

Nothing here knows of events or ranks. Every function works on whole columns. "Disjoint" columns
are sorted and do not overlap; touching is allowed. Intervals with start == end hold no moment.
"""

import numpy as np

Columns = tuple[np.ndarray, np.ndarray]
"""(starts, ends), int64 [n] each."""


def merge(starts: np.ndarray, ends: np.ndarray) -> Columns:
    """Union of intervals in any order: disjoint, and none of them touch."""
    filled = ends > starts
    order = np.argsort(starts[filled], kind="stable")
    starts, ends = starts[filled][order], ends[filled][order]
    if not len(starts):
        return starts, ends
    reach = np.maximum.accumulate(ends)
    first = np.concatenate(([True], starts[1:] > reach[:-1]))
    last = np.concatenate((first[1:], [True]))
    return starts[first], reach[last]


def distinct(values: np.ndarray) -> np.ndarray:
    """The values ascending, each once. numpy's own hashes them first, which is slower here."""
    values = np.sort(values)
    keep = np.ones(len(values), bool)
    keep[1:] = values[1:] != values[:-1]
    return values[keep]


def clip(starts: np.ndarray, ends: np.ndarray, low: int, high: int) -> Columns:
    """Intersection of each interval with [low, high); rows stay, and may become empty."""
    starts = np.clip(starts, low, high)
    return starts, np.maximum(np.clip(ends, low, high), starts)


def intersect(one: Columns, other: Columns) -> Columns:
    """Moments in both of two disjoint columns, disjoint."""
    points = distinct(np.concatenate((*one, *other)))
    both = (locate(*one, points[:-1]) >= 0) & (locate(*other, points[:-1]) >= 0)
    return merge(points[:-1][both], points[1:][both])


def subtract(one: Columns, other: Columns) -> Columns:
    """Moments of the disjoint `one` outside the disjoint `other`, disjoint."""
    points = distinct(np.concatenate((*one, *other)))
    only = (locate(*one, points[:-1]) >= 0) & (locate(*other, points[:-1]) < 0)
    return merge(points[:-1][only], points[1:][only])


def first_come(starts: np.ndarray, ends: np.ndarray) -> Columns:
    """What each interval owns when the one that started earlier keeps what two share.

    Args: starts ascending; of equal starts the lower row counts as earlier.
    Returns: per row one interval, disjoint over the rows and together the union; empty (start ==
    end) where earlier rows own all of it. It is one interval because whatever covers a later
    moment of a row and started before it covers all moments of the row up to there.
    """
    if not len(starts):
        return starts, ends
    reach = np.maximum.accumulate(ends)
    owned = starts.copy()
    owned[1:] = np.maximum(starts[1:], reach[:-1])
    return np.minimum(owned, np.maximum(ends, starts)), np.maximum(ends, starts)


def locate(starts: np.ndarray, ends: np.ndarray, points: np.ndarray) -> np.ndarray:
    """int64 [points]: row of the disjoint column that holds each point, -1 where none does."""
    if not len(starts):
        return np.full(len(points), -1, np.int64)
    row = np.searchsorted(starts, points, side="right") - 1
    return np.where((row >= 0) & (points < ends[row]), row, -1)


def count_active(starts: np.ndarray, ends: np.ndarray, points: np.ndarray) -> np.ndarray:
    """int64 [points]: how many intervals, in any order, hold each point."""
    begun = np.searchsorted(np.sort(starts), points, side="right")
    return begun - np.searchsorted(np.sort(ends), points, side="right")


def covered_before(starts: np.ndarray, ends: np.ndarray, points: np.ndarray) -> np.ndarray:
    """int64 [points]: length of a disjoint column that lies before each point.

    The overlap with [a, b) is covered_before(b) - covered_before(a).
    """
    if not len(starts):
        return np.zeros(len(points), np.int64)
    total = np.concatenate(([0], np.cumsum(ends - starts)))
    row = np.searchsorted(starts, points, side="right")
    inside = np.maximum(ends[row - 1] - points, 0)
    return np.where(row > 0, total[row] - inside, 0)


def cut(starts: np.ndarray, ends: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, ...]:
    """Cut a disjoint column at points in any order: (starts, ends, row it was cut from).

    Points outside the column do nothing.
    """
    filled = np.flatnonzero(ends > starts)
    starts, ends = starts[filled], ends[filled]
    points = distinct(points)
    holder = locate(starts, ends, points)
    inner = holder >= 0
    inner[inner] = points[inner] > starts[holder[inner]]
    points, holder = points[inner], holder[inner]
    row = np.concatenate((np.arange(len(starts)), holder))
    begin = np.concatenate((starts, points))
    order = np.argsort(begin, kind="stable")
    row, begin = row[order], begin[order]
    stop = ends[row]
    same = row[1:] == row[:-1]
    stop[:-1][same] = begin[1:][same]
    return begin, stop, filled[row]


def innermost(starts: np.ndarray, ends: np.ndarray, points: np.ndarray) -> np.ndarray:
    """int64 [points]: of the intervals that hold a point, the row that started last; -1 for none.

    Args: rows sorted by (start, -end), so that of nested intervals this is the inner one. They
    need not nest. A tree of maxima over the ends is walked for all points at once, O(log n).
    """
    found = np.full(len(points), -1, np.int64)
    if not len(starts) or not len(points):
        return found
    levels = _maxima(ends)
    node = np.searchsorted(starts, points, side="right") - 1
    depth = np.full(len(points), -1, np.int64)
    for level, highest in enumerate(levels):
        # All rows from 0 to the end of `node` are still open; a left child stands alone in it.
        alone = (depth < 0) & (node >= 0) & (node % 2 == 0)
        hit = np.flatnonzero(alone)
        hit = hit[highest[node[hit]] > points[hit]]
        depth[hit] = level
        found[hit] = node[hit]
        node = np.where(alone, node - 1, node) >> 1
    for level in range(len(levels) - 1, 0, -1):
        below = np.flatnonzero(depth >= level)
        right = 2 * found[below] + 1
        found[below] = right - (levels[level - 1][right] <= points[below])
    return found


def _maxima(values: np.ndarray) -> list[np.ndarray]:
    """Maxima of 1, 2, 4, ... neighbours; each level has an even length but the last."""
    lowest = np.iinfo(np.int64).min
    levels = [values.astype(np.int64)]
    while len(levels[-1]) > 1:
        if len(levels[-1]) % 2:
            levels[-1] = np.append(levels[-1], lowest)
        levels.append(levels[-1].reshape(-1, 2).max(1))
    return levels


def longest_between(lengths: np.ndarray, first: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """int64 [queries]: row of the largest length in rows [first, stop), -1 where that is empty."""
    found = np.full(len(first), -1, np.int64)
    asked = np.flatnonzero(stop > first)
    if not len(asked):
        return found
    order = np.argsort(lengths, kind="stable")
    place = np.empty(len(lengths) + 1, np.int64)
    place[order] = np.arange(len(order))
    place[-1] = -1
    bounds = np.stack((first[asked], stop[asked]), 1).ravel()
    found[asked] = order[np.maximum.reduceat(place, bounds)[::2]]
    return found
