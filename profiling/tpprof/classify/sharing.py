"""Costs of something that several kernels did together, divided so that the parts sum exactly."""

import numpy as np


def share_out(total: np.ndarray, unit: np.ndarray, length: np.ndarray) -> np.ndarray:
    """int64 [n]: each entry's part of its unit's total, in proportion to its length.

    total: int64 [n], not negative, equal for entries of one unit. unit: int64 [n], which entries
    belong together, any numbers. length: int64 [n], not negative; where all of a unit are zero
    they share alike. Parts of a unit sum to its total exactly.
    """
    if not len(total):
        return total.copy()
    order = np.argsort(unit, kind="stable")
    total, unit, length = total[order], unit[order], length[order]
    is_first = np.ones(len(unit), bool)
    is_first[1:] = unit[1:] != unit[:-1]
    first = np.flatnonzero(is_first)
    parts = np.empty(len(total), np.int64)
    if len(first) == len(unit):
        parts[order] = total
        return parts
    slot = np.cumsum(is_first) - 1
    weight = np.where(np.add.reduceat(length, first)[slot] > 0, length, 1)
    whole = np.add.reduceat(weight, first)
    running = np.cumsum(weight)
    upto = (running - (running - weight)[first][slot]) / whole[slot]
    reached = np.minimum(np.rint(np.clip(upto, 0, 1) * total).astype(np.int64), total)
    last = np.append(first[1:], len(unit)) - 1
    reached[last] = total[last]  # whatever rounding made of it
    below = np.concatenate((np.zeros(1, np.int64), reached[:-1]))
    below[first] = 0
    parts[order] = reached - below
    return parts
