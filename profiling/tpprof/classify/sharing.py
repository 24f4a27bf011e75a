"""Costs of something that several kernels did together, divided so that the parts sum exactly."""

import numpy as np


def share_out(total: np.ndarray, unit: np.ndarray, length: np.ndarray) -> np.ndarray:
    """int64 [n]: each entry's part of its unit's total, in proportion to its length.

    total: int64 [n], equal for entries of one unit; below 2**53. unit: int64 [n], which entries
    belong together, any numbers. length: int64 [n]; where all of a unit are zero they share alike.
    Parts of a unit sum to its total exactly.
    """
    if not len(total):
        return total.copy()
    order = np.argsort(unit, kind="stable")
    ids, first, count = np.unique(unit[order], return_index=True, return_counts=True)
    slot = np.repeat(np.arange(len(ids)), count)
    weight = length[order].astype(np.float64)
    sums = np.add.reduceat(weight, first)
    weight = np.where(sums[slot] > 0, weight, 1.0)
    running = np.cumsum(weight)
    before = (running - weight)[first]
    whole = np.add.reduceat(weight, first)
    upto = (running - before[slot]) / whole[slot]
    last = first + count - 1
    upto[last] = 1.0  # whatever rounding made of it
    reached = np.rint(np.clip(upto, 0, 1) * total[order]).astype(np.int64)
    below = np.concatenate((np.zeros(1, np.int64), reached[:-1]))
    below[first] = 0
    parts = np.empty(len(total), np.int64)
    parts[order] = reached - below
    return parts
