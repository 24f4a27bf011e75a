"""Tables of an Nsight Systems export as numpy columns.

Tables and columns appear only where a recording needed them, and differ by version; one that is
missing reads as empty, or as its default. The file is opened read-only and never written beside.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from urllib.parse import quote

import numpy as np

from ..errors import TraceError
from ..events import NONE

MAGIC = b"SQLite format 3\x00"
_REMEDY = "export it again: nsys export --type sqlite --force-overwrite true FILE.nsys-rep"


class Tables:
    """The tables of one file. Raises TraceError for a file that is not whole."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._columns: dict[str, set[str]] = {}

    def has(self, table: str) -> bool:
        """Whether the table exists."""
        return bool(self.columns(table))

    def columns(self, table: str) -> set[str]:
        """Names of its columns; none where there is no such table."""
        if table not in self._columns:
            rows = self.rows(f'PRAGMA table_info("{table}")')
            self._columns[table] = {str(row[1]) for row in rows}
        return self._columns[table]

    def rows(self, query: str, values: Sequence[object] = ()) -> Iterator[tuple]:
        """Rows of a query, fetched as they are asked for."""
        with self._told():
            yield from self._connection.execute(query, values)

    def integers(
        self, table: str, wanted: Sequence[str], where: str = "", default: int = NONE
    ) -> dict[str, np.ndarray]:
        """int64 columns of one length, in the order of the table; `default` for NULL and for
        columns that this version does not have.
        """
        there = self.columns(table)
        if not there:
            return {name: np.empty(0, np.int64) for name in wanted}
        if not {"start", "end"} <= there:
            raise TraceError(f"{self.path}: table {table} has no times; {_REMEDY}")
        listed = ", ".join(
            f'COALESCE("{name}", {default})' if name in there else str(default) for name in wanted
        )
        query = f'SELECT {listed} FROM "{table}"{where and f" WHERE {where}"}'
        with self._told():
            flat = np.fromiter(chain.from_iterable(self._connection.execute(query)), np.int64)
        block = flat.reshape(-1, len(wanted))
        return {name: np.ascontiguousarray(block[:, i]) for i, name in enumerate(wanted)}

    def names(self, wanted: np.ndarray) -> dict[int, str]:
        """Texts of StringIds by id, of these ids alone: that table also holds whole log files."""
        ids = {one for one in distinct_values(wanted)[0].tolist() if one >= 0}
        if not ids or not {"id", "value"} <= self.columns("StringIds"):
            return {}
        found = self.rows("SELECT id, value FROM StringIds")
        return {key: str(value) for key, value in found if key in ids}

    def settings(self, table: str) -> dict[str, str]:
        """Name -> value of a META_DATA table."""
        if not {"name", "value"} <= self.columns(table):
            return {}
        return {
            str(key): str(value) for key, value in self.rows(f"SELECT name, value FROM {table}")
        }

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise TraceError(f"{self.path} is damaged ({error}); {_REMEDY}") from None
        except (ValueError, TypeError, OverflowError):
            # Its message may quote what stood there.
            raise TraceError(f"{self.path} has text where numbers belong; {_REMEDY}") from None


@contextmanager
def open_tables(path: Path) -> Iterator[Tables]:
    """The tables of an export. Raises TraceError where it is none, or is cut short."""
    _check_length(path)
    # immutable: no lock and no journal beside a file that may lie on a read-only disk.
    address = f"file:{quote(str(path.resolve()))}?mode=ro&immutable=1"
    try:
        connection = sqlite3.connect(address, uri=True)
    except sqlite3.Error as error:
        raise TraceError(f"{path} cannot be opened: {error}; {_REMEDY}") from None
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    try:
        yield Tables(path, connection)
    finally:
        connection.close()


def _check_length(path: Path) -> None:
    """A copy that broke off often reads as one with fewer rows: compare with what it announces."""
    try:
        with path.open("rb") as file:
            head = file.read(100)
            size = file.seek(0, 2)
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}; give a readable file") from None
    if head[:16] != MAGIC or len(head) < 100:
        raise TraceError(f"{path} is no SQLite file: byte 0 begins none; {_REMEDY}")
    page = int.from_bytes(head[16:18], "big")
    page = 65536 if page == 1 else page
    announced = page * int.from_bytes(head[28:32], "big")
    if size < announced:
        raise TraceError(f"{path} ends at byte {size} of {announced}; copy it again, or {_REMEDY}")


def distinct_values(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values ascending, each once, and for every value its place among them."""
    if not len(values):
        return values, np.empty(0, np.int64)
    low, high = int(values.min()), int(values.max())
    if high - low >= 1 << 22:
        distinct, back = np.unique(values, return_inverse=True)
        return distinct, back
    # Close numbers need no sorting.
    offset = values - low
    there = np.zeros(high - low + 1, bool)
    there[offset] = True
    return np.flatnonzero(there) + low, (np.cumsum(there) - 1)[offset]


def distinct_rows(*columns: np.ndarray) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """The combinations of several columns, each once, and for every row its place among them."""
    key = np.zeros(len(columns[0]), np.int64)
    values = []
    for column in columns:
        distinct, back = distinct_values(column)
        key = key * max(len(distinct), 1) + back
        values.append(distinct)
    keys, back = distinct_values(key)
    rows = []
    for one in keys.tolist():
        row = []
        for distinct in reversed(values):
            one, place = divmod(one, len(distinct))
            row.append(int(distinct[place]))
        rows.append(tuple(reversed(row)))
    return rows, back
