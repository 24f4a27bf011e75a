"""The events of all ranks as one Arrow table in a file. Needs pyarrow, which must be installed.

One row an event, `rank` first; text columns are dictionaries. Times are int64 ns on each rank's
own clock. Read it with `pyarrow.feather.read_table`, Polars, DuckDB or pandas.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tpprof.errors import TraceError
from tpprof.events import Kind, Trace

_COLLECTIVE = ("num_bytes", "group_size", "sequence")


def write_arrow(path: Path, traces: Sequence[Trace]) -> int:
    """Write the table as an Arrow IPC file; returns the number of rows.

    Raises TraceError without pyarrow, or where the file cannot be written.
    """
    try:
        pyarrow: Any = importlib.import_module("pyarrow")
    except ImportError:
        raise TraceError(
            "--arrow needs the package pyarrow, which is not installed; pip install pyarrow"
        ) from None
    tables = [pyarrow.table(_columns(pyarrow, trace)) for trace in traces]
    table = pyarrow.concat_tables(tables).unify_dictionaries()
    try:
        with (
            pyarrow.OSFile(str(path), "wb") as sink,
            pyarrow.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_table(table)
    except OSError as error:
        raise TraceError(
            f"{path} cannot be written: {error.strerror or error}; name another file"
        ) from None
    return table.num_rows


def _columns(pyarrow: Any, trace: Trace) -> dict[str, Any]:
    """Columns by name; -1 in the trace becomes null."""
    lanes = trace.lanes
    kinds = [kind.name.lower() for kind in Kind]

    def of_lane(values: list[int]) -> Any:
        found = np.array(values or [-1], np.int64)
        return _nullable(pyarrow, found[trace.lane] if len(lanes) else np.empty(0, np.int64))

    def words(index: np.ndarray, texts: list[str]) -> Any:
        codes = pyarrow.array(index.astype(np.int32), mask=index < 0)
        return pyarrow.DictionaryArray.from_arrays(codes, pyarrow.array(texts, pyarrow.string()))

    columns = {
        "rank": pyarrow.array(np.full(len(trace), trace.rank, np.int32)),
        "start_ns": pyarrow.array(trace.start_ns),
        "end_ns": pyarrow.array(trace.end_ns),
        "kind": words(trace.kind.astype(np.int32), kinds),
        "name": words(trace.name, trace.strings),
        "device": of_lane([lane.device for lane in lanes]),
        "stream": of_lane([lane.tid if lane.is_device else -1 for lane in lanes]),
        "pid": of_lane([lane.pid for lane in lanes]),
        "tid": of_lane([-1 if lane.is_device else lane.tid for lane in lanes]),
        "launch": _nullable(pyarrow, trace.launch),
        "op": _nullable(pyarrow, trace.op),
        "graph_node": _nullable(pyarrow, trace.node),
        "num_blocks": _nullable(pyarrow, trace.num_blocks),
        "num_bytes": _nullable(pyarrow, trace.num_bytes),
        "shapes": words(trace.shapes, trace.strings),
    }
    found = trace.collectives
    spread = np.full(len(trace), -1, np.int64)
    for name in ("op", "group"):
        column = spread.copy()
        column[found.row] = getattr(found, name)
        columns[f"collective_{name}"] = words(column, trace.strings)
    for name in _COLLECTIVE:
        column = spread.copy()
        column[found.row] = getattr(found, name)
        columns[f"collective_{name}"] = _nullable(pyarrow, column)
    return columns


def _nullable(pyarrow: Any, values: np.ndarray) -> Any:
    return pyarrow.array(values.astype(np.int64), mask=values < 0)
