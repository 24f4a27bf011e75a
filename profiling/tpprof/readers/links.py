"""How rows find each other: by id, and by the time on a thread."""

import numpy as np

from ..events import NONE
from ..intervals import innermost
from .assembly import Rows


def first_with(ids: np.ndarray, rows: np.ndarray, asked: np.ndarray, lowest: int = 0) -> np.ndarray:
    """int64 [asked]: first row with each id, NONE where there is none.

    Args: ids ascending, with the row of each. Ids below `lowest` mean "none"; so does 0 where
    several rows have it.
    """
    if not len(ids):
        return np.full(len(asked), NONE, np.int64)
    at = np.searchsorted(ids, asked)
    hit = (asked >= lowest) & (ids[np.minimum(at, len(ids) - 1)] == asked)
    if np.count_nonzero(ids == 0) > 1:
        hit &= asked != 0
    return np.where(hit, rows[np.minimum(at, len(ids) - 1)], NONE)


def is_around(rows: Rows, op: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """bool: whether there is an operator, and it was running at that moment."""
    return (op >= 0) & (rows.start_ns[op] <= moment) & (moment <= rows.end_ns[op])


def enclosing_op(rows: Rows, ops: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """int64 [asked]: innermost operator that runs on the same lane when each row begins."""
    found = np.full(len(asked), NONE, np.int64)
    if not len(ops):
        return found
    order = ops[np.lexsort((-rows.end_ns[ops], rows.start_ns[ops], rows.lane[ops]))]
    lanes = rows.lane[order]
    for lane in np.unique(rows.lane[asked]):
        first, stop = np.searchsorted(lanes, [lane, lane + 1])
        here = order[first:stop]
        mine = np.flatnonzero(rows.lane[asked] == lane)
        row = innermost(rows.start_ns[here], rows.end_ns[here], rows.start_ns[asked[mine]])
        found[mine] = np.where(row >= 0, here[row] if len(here) else NONE, NONE)
    return found
