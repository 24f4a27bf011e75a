"""Lists of Kineto events to columns, so that the events themselves can be freed block by block."""

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

import msgspec
import numpy as np

from ..events import NONE, Kind, Lane
from .assembly import LATEST_NS, MISSING, Rows, StringTable, join_rows, make_rows
from .kineto_json import EXACT_US, Arguments, Event

KINDS = {
    "cpu_op": Kind.OP,
    "operator": Kind.OP,
    "user_annotation": Kind.RANGE,
    "gpu_user_annotation": Kind.DEVICE_RANGE,
    "kernel": Kind.KERNEL,
    "gpu_memcpy": Kind.COPY,
    "memcpy": Kind.COPY,
    "gpu_memset": Kind.MEMSET,
    "memset": Kind.MEMSET,
    "cuda_runtime": Kind.LAUNCH,
    "cuda_driver": Kind.LAUNCH,
    "runtime": Kind.LAUNCH,
    "xpu_runtime": Kind.LAUNCH,
    "xpu_driver": Kind.LAUNCH,
    "mtia_runtime": Kind.LAUNCH,
    "privateuse1_runtime": Kind.LAUNCH,
    "privateuse1_driver": Kind.LAUNCH,
    "python_function": Kind.PYTHON,
    "cuda_sync": Kind.SYNC,
    "overhead": Kind.OVERHEAD,
}
"""Categories in lower case, with those of Kineto's first years."""
IGNORED = {"ac2g", "fwdbwd", "async_cpu_to_gpu", "trace", "cuda_event", "external_correlation"}
"""Categories that say nothing here: arrows, whose ids stand on the rows too, and the window."""
WITHOUT_LENGTH = frozenset("sftiIMCnNODPRcabe")
"""Phases of events that are no interval by themselves."""

_NO_ARGUMENTS = Arguments()
_ON_DEVICE = {Kind.KERNEL, Kind.COPY, Kind.MEMSET, Kind.DEVICE_RANGE, Kind.SYNC}
_OWN_RANGE = "tpinfer."
"""Ranges of this project's runtime; a file straight from the recorder calls them operators."""
_DIGITS = re.compile(r"(\d{1,18})\D*\Z")


class LaneTable(dict[tuple[Any, Any], int]):
    """Number of each lane in `lanes`, by what the events say: (pid, tid) or (device, stream)."""

    def __init__(self, lanes: dict[Lane, int], on_device: bool) -> None:
        super().__init__()
        self._lanes, self._on_device = lanes, on_device

    def __missing__(self, key: tuple[Any, Any]) -> int:
        first, second = as_number(key[0]), as_number(key[1])
        if self._on_device:
            lane = Lane(True, NONE, second, first)
        else:
            lane = Lane(False, first, abs(second))  # recorders print some tids as negative
        number = self[key] = self._lanes.setdefault(lane, len(self._lanes))
        return number


class CollectiveList:
    """What the events say of collectives, with the rows they stand on."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.arguments: list[Arguments] = []


class Columns:
    """Takes events, keeps columns. After the last block: `rows()` and the tables beside it."""

    def __init__(self) -> None:
        self.strings = StringTable()
        self.lanes: dict[Lane, int] = {}
        self.collectives = CollectiveList()
        self.unknown: Counter[str] = Counter()
        """Categories that nothing here reads, with their number of rows."""
        self.num_rounded = 0
        """Times that a float could not hold to the ns."""
        self._threads = LaneTable(self.lanes, on_device=False)
        self._streams = LaneTable(self.lanes, on_device=True)
        self._shape_of: dict[tuple[bytes, bytes], int] = {}
        self._pieces: list[Rows] = []
        self._correlation: list[np.ndarray] = []
        self._external: list[np.ndarray] = []
        self._count = 0

    def __len__(self) -> int:
        """Rows so far."""
        return self._count

    def add(self, events: Iterable[Event]) -> None:
        """Take a block of events; those without a length (arrows, marks, names) are passed over."""
        buckets: dict[str | None, list[Event]] = defaultdict(list)
        for event in events:
            if event.ph == "X":
                buckets[event.cat].append(event)
            elif event.ph not in WITHOUT_LENGTH:
                self.unknown[f"ph {event.ph}"] += 1
        for category, bucket in buckets.items():
            name = (category or "").lower()
            kind = KINDS.get(name)
            if kind is not None:
                self._add_bucket(kind, bucket)
            elif name not in IGNORED:
                self.unknown[category or "(none)"] += len(bucket)

    def rows(self) -> tuple[Rows, np.ndarray, np.ndarray]:
        """Rows, and beside them their correlation and External ids (int64, NONE without)."""
        none = [np.empty(0, np.int64)]
        correlation = np.concatenate(self._correlation or none)
        external = np.concatenate(self._external or none)
        rows = join_rows(self._pieces)
        own = [number for text, number in self.strings.items() if str(text).startswith(_OWN_RANGE)]
        rows.kind[(rows.kind == Kind.OP) & np.isin(rows.name, own)] = Kind.RANGE
        return rows, correlation, external

    def _add_bucket(self, kind: Kind, events: list[Event]) -> None:
        count = len(events)
        arguments = [event.args or _NO_ARGUMENTS for event in events]
        start = self._to_ns([event.ts for event in events])
        length = self._to_ns([event.dur for event in events])
        columns: dict[str, np.ndarray | int] = {
            "start_ns": start,
            "end_ns": np.where(length == MISSING, MISSING, start + np.maximum(length, -LATEST_NS)),
            "kind": int(kind),
            "name": self._texts(event.name for event in events),
            "lane": self._lane_column(kind, events, arguments),
        }
        correlation = external = np.full(count, NONE, np.int64)
        if kind is Kind.PYTHON:
            columns["ordinal"] = numbers([a.python_id for a in arguments])
        else:
            external = self._external_column(arguments)
        if kind.is_device or kind in (Kind.LAUNCH, Kind.SYNC):
            correlation = numbers([a.correlation for a in arguments])
            columns["num_blocks"] = self._grids(arguments)
        if kind.is_device:
            columns["node"] = graph_nodes([a.node for a in arguments])
        if kind in (Kind.COPY, Kind.MEMSET):
            columns["num_bytes"] = numbers([a.num_bytes for a in arguments])
        if kind is Kind.OP:
            columns["shapes"] = self._shape_column(arguments)
        if kind in (Kind.OP, Kind.KERNEL):
            self._note_collectives(arguments)
        columns.setdefault("ordinal", np.where(external >= 0, external, correlation))
        self._pieces.append(make_rows(count, **columns))
        self._correlation.append(correlation)
        self._external.append(external)
        self._count += count

    def _to_ns(self, values: list[Any]) -> np.ndarray:
        nanoseconds, rounded = to_ns(values)
        self.num_rounded += rounded
        return nanoseconds

    def _texts(self, texts: Iterable[Any]) -> np.ndarray:
        strings = self.strings
        return np.array([strings[text] for text in texts], np.int32)

    def _lane_column(
        self, kind: Kind, events: list[Event], arguments: list[Arguments]
    ) -> np.ndarray:
        if kind in _ON_DEVICE:
            lanes = self._streams
            keys = [
                (
                    event.pid if a.device is None else a.device,
                    event.tid if a.stream is None else a.stream,
                )
                for event, a in zip(events, arguments, strict=True)
            ]
        else:
            lanes = self._threads
            keys = [(event.pid, event.tid) for event in events]
        try:
            numbered = [lanes[key] for key in keys]
        except TypeError:  # a list or an object where a number belongs
            numbered = [lanes[str(first), str(second)] for first, second in keys]
        return np.array(numbered, np.int32)

    def _external_column(self, arguments: list[Arguments]) -> np.ndarray:
        external = numbers([a.external for a in arguments])
        if (external == NONE).any():
            old = numbers([a.external_old for a in arguments])
            external = np.where(external == NONE, old, external)
        return external

    def _grids(self, arguments: list[Arguments]) -> np.ndarray | int:
        grids = [a.grid for a in arguments]
        if all(grid is None for grid in grids):
            return NONE
        return np.array([num_blocks(grid) for grid in grids], np.int64)

    def _shape_column(self, arguments: list[Arguments]) -> np.ndarray:
        shape_of, numbered = self._shape_of, []
        for a in arguments:
            key = bytes(a.dims), bytes(a.types)
            number = shape_of.get(key)
            if number is None:
                text = shape_text(*key)
                number = shape_of[key] = NONE if text is None else self.strings[text]
            numbered.append(number)
        return np.array(numbered, np.int32)

    def _note_collectives(self, arguments: list[Arguments]) -> None:
        for place, a in enumerate(arguments, self._count):
            if a.collective is not None:
                self.collectives.rows.append(place)
                self.collectives.arguments.append(a)


def to_ns(values: Sequence[Any]) -> tuple[np.ndarray, int]:
    """int64 ns of microseconds as a JSON file spells them, and how many of them a float rounded.

    Integers and Decimals are exact. Floats are exact to the ns below EXACT_US: the whole part is
    split off first, because multiplying by 1000 would round once more. MISSING where a value is
    no time.
    """
    try:
        column = np.array(values) if len(values) else np.empty(0, np.int64)
    except ValueError:
        column = np.empty(0, object)
    if column.ndim == 1 and column.dtype.kind == "i":
        sound = np.abs(column) < LATEST_NS // 1000
        return np.where(sound, column, 0) * 1000 + np.where(sound, 0, MISSING), 0
    if column.ndim == 1 and column.dtype.kind == "f":
        sound = np.abs(column) < LATEST_NS // 1000  # false for nan
        column = np.where(sound, column, 0.0)
        whole = np.floor(column)
        part = np.rint((column - whole) * 1000).astype(np.int64)
        rounded = int((np.abs(column) >= EXACT_US).sum())
        return np.where(sound, whole.astype(np.int64) * 1000 + part, MISSING), rounded
    return np.array([_one_to_ns(value) for value in values], np.int64), 0


def _one_to_ns(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        return int(MISSING)
    try:
        microseconds = Decimal(value)
        if not abs(microseconds) < LATEST_NS // 1000:
            return int(MISSING)
        return int((microseconds * 1000).to_integral_value())
    except (ArithmeticError, ValueError):
        return int(MISSING)


def numbers(values: list[Any]) -> np.ndarray:
    """int64 of what should be integers; NONE for what is none."""
    try:
        return np.array(values, np.int64)
    except (TypeError, ValueError, OverflowError):
        return np.array([as_number(value) for value in values], np.int64)


def as_number(value: Any) -> int:
    """An integer of 64 bits; of a text the digits at its end, or a number that stands for it."""
    if isinstance(value, str):
        digits = _DIGITS.search(value)
        return int(digits[1]) if digits else zlib.crc32(value.encode())
    if isinstance(value, Decimal | float):
        value = int(value) if value == value and abs(value) < 2**63 else NONE
    if not isinstance(value, int):
        return NONE
    # Ids are unsigned in some recorders: keep them apart, whatever their sign.
    return (value + 2**63) % 2**64 - 2**63


def graph_nodes(values: list[Any]) -> np.ndarray:
    """int64 graph node ids; 0 is what recorders write outside of graphs."""
    nodes = numbers(values)
    return np.where(nodes == 0, NONE, nodes)


def num_blocks(grid: Any) -> int:
    """Blocks of a grid [x, y, z]; NONE for anything else."""
    try:
        x, y, z = grid
        blocks = x * y * z
    except (TypeError, ValueError):
        return NONE
    return blocks if isinstance(blocks, int) and 0 < blocks < 2**63 else NONE


def shape_text(dims: bytes, types: bytes) -> str | None:
    """`[[[dims], ...], ["dtype", ...]]` as compact JSON; None without dims or where damaged."""
    if not dims:
        return None
    try:
        pair = [msgspec.json.decode(dims), msgspec.json.decode(types) if types else []]
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    return msgspec.json.encode(pair).decode()
