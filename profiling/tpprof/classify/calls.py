"""Costs of recorded operator calls, each distinct (name, shapes) looked at once."""

from dataclasses import dataclass

import numpy as np

from tpinfer.config.dtypes import DType
from tpprof.classify.operators import cost_of, is_view
from tpprof.events import NONE, Trace

DTYPES = tuple(DType)


@dataclass(frozen=True)
class CallCosts:
    """Columns of n calls; -1 where there is no model."""

    flops: np.ndarray
    num_bytes: np.ndarray
    dtype: np.ndarray
    """int8: index into DTYPES."""
    is_view: np.ndarray
    """bool: does nothing itself."""


def call_costs(trace: Trace, ops: np.ndarray) -> CallCosts:
    """ops: rows of operators, int64 [n]."""
    name, shapes = trace.name[ops].astype(np.int64), trace.shapes[ops].astype(np.int64)
    width = len(trace.strings) + 1
    code, first = dense_codes(name * width + shapes + 1)
    flops, moved = np.full((2, len(first)), NONE, np.int64)
    dtype, view = np.zeros(len(first), np.int8), np.zeros(len(first), bool)
    for i, (called, told) in enumerate(
        zip(name[first].tolist(), shapes[first].tolist(), strict=True)
    ):
        view[i] = is_view(trace.strings[called])
        found = cost_of(trace.strings[called], trace.strings[told] if told >= 0 else "")
        if found is not None:
            flops[i], moved[i] = found.flops, found.num_bytes
            dtype[i] = DTYPES.index(found.dtype)
    return CallCosts(flops[code], moved[code], dtype[code], view[code])


def dense_codes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [n]: 0, 1, ... for equal values; one place of each)."""
    if not len(values):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    order = np.argsort(values, kind="stable")
    new = np.ones(len(values), bool)
    new[1:] = values[order][1:] != values[order][:-1]
    code = np.empty(len(values), np.int64)
    code[order] = np.cumsum(new) - 1
    return code, order[new]
