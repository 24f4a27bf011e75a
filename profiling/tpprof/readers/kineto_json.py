"""Kineto's JSON, plain or gzip, as lists of events, a block of the file at a time.

The file is cut where one event ends and the next begins, and every piece is decoded by itself, so
that no more than a few blocks are in memory. A cut is a guess that the decoder proves: a piece that
begins where an event begins decodes as `[piece]` only if it also ends where one ends. What does not
decode is read slowly, object by object, and what is broken is left out, counted and told.

Only the fields named here are ever kept. A recorder may write its process environment into the
file; it is passed over in the bytes and never becomes a Python object.
"""

import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec

from ..errors import TraceError

BLOCK_BYTES = 4 << 20
EXACT_US = 2**43
"""From here on a float of microseconds no longer tells two neighbouring ns apart."""
MOST_EVENT_BYTES = 8 << 20
"""An event larger than this is taken for damage."""
MOST_HEADER_BYTES = 64 << 20
MOST_RESYNCS = 1000
"""Broken places of one file that are stepped over before the rest is given up."""

_GZIP = b"\x1f\x8b"
_START = re.compile(rb'"traceEvents"\s*:\s*\[')
_BOUNDARY = re.compile(
    rb'\}(\s*,\s*)\{\s*"(?:ph|cat|name|pid|tid|ts|dur|id|args|s|bp)"\s*:', re.DOTALL
)
_TOKEN = re.compile(rb'"(?>[^"\\]+|\\.)*+"|[{}\[\]"]', re.DOTALL)
_NON_FINITE = [
    re.compile(word + rb"(?:inity)?(?=\s*[,}\]])") for word in (b"nan", b"NaN", b"inf", b"Inf")
]
_KEY_BEFORE = re.compile(
    # A quote after a word, a bracket or a percent sign ends a key: strings begin after : , [ { .
    rb'(?<=[^\s{,\[:\\])"\s*:\s*([-+]?)\Z'
)
_NON_FINITE_ANYWHERE = re.compile(
    rb'"(?>[^"\\]+|\\.)*+"|[-+]?\b(?:nan|inf(?:inity)?)\b', re.IGNORECASE | re.DOTALL
)
_EVENT_START = re.compile(rb'\{\s*"(?:ph|cat)"\s*:')
_BROKEN_ESCAPE = re.compile(rb'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})|\\')
_CONTROL = bytes(range(32))
_BLANKED = bytes.maketrans(_CONTROL, b" " * 32)


class Arguments(msgspec.Struct, gc=False):
    """The fields of an event's `args` that are read; NONE (-1) where a number is missing."""

    external: Any = msgspec.field(name="External id", default=-1)
    external_old: Any = msgspec.field(name="external id", default=-1)
    correlation: Any = -1
    device: Any = None
    stream: Any = None
    num_bytes: Any = msgspec.field(name="bytes", default=-1)
    grid: Any = None
    node: Any = msgspec.field(name="graph node id", default=-1)
    dims: msgspec.Raw = msgspec.field(name="Input Dims", default=msgspec.Raw(b""))
    types: msgspec.Raw = msgspec.field(name="Input type", default=msgspec.Raw(b""))
    collective: str | None = msgspec.field(name="Collective name", default=None)
    dtype: str | None = None
    in_elements: Any = msgspec.field(name="In msg nelems", default=-1)
    out_elements: Any = msgspec.field(name="Out msg nelems", default=-1)
    group_size: Any = msgspec.field(name="Group size", default=-1)
    group_name: Any = msgspec.field(name="Process Group Name", default=None)
    group_ranks: Any = msgspec.field(name="Process Group Ranks", default=None)
    sequence: Any = msgspec.field(name="Seq", default=-1)
    python_id: Any = msgspec.field(name="Python id", default=-1)


class Event(msgspec.Struct, gc=False):
    """One entry of `traceEvents`. `ts` and `dur` are microseconds as the file spells them."""

    ph: str | None = None
    cat: str | None = None
    name: str | int | float | None = None
    pid: str | int | float | None = None
    tid: str | int | float | None = None
    ts: Any = None
    dur: Any = None
    args: Arguments | None = None


class Header(msgspec.Struct):
    """What stands beside the events; nothing else there is kept."""

    devices: Any = msgspec.field(name="deviceProperties", default=None)
    distributed: Any = msgspec.field(name="distributedInfo", default=None)
    offset_ns: Any = msgspec.field(name="baseTimeNanoseconds", default=None)
    log: Any = msgspec.field(name="INFO", default=None)
    merged: Any = msgspec.field(name="mergedRanks", default=None)
    """What `tpprof merge` writes into its own files."""

    def take(self, other: "Header") -> None:
        """Fill what is missing here from `other`."""
        for name in self.__struct_fields__:
            if getattr(self, name) is None:
                setattr(self, name, getattr(other, name))


class _Ending(Header):
    """The last piece of a file: events, and what follows them."""

    events: list[Event] = msgspec.field(name="traceEvents", default_factory=list)


_FAILURES = (msgspec.MsgspecError, UnicodeError, RecursionError, ValueError)


class EventStream:
    """Iterate it for lists of events in file order; `header`, `damage` and `num_broken` are whole
    afterwards.

    Args:
        path: a file as Kineto writes it, or a bare array of events; gzip is told by its content.
        block_bytes: how much is read at a time.
    Raises TraceError where no array of events begins.
    """

    def __init__(self, path: Path, block_bytes: int = BLOCK_BYTES) -> None:
        self.path = path
        self.header = Header()
        self.damage: list[str] = []
        self.num_broken = 0
        """Events that could not be decoded."""
        self.is_bare = False
        """Whether the file is an array and nothing else."""
        self._block_bytes = block_bytes
        self._position = 0
        """Of the next byte to be decoded, in the decompressed file."""
        self._num_resyncs = 0
        self._float_hook: Callable[[str], Any] | None = None
        self._decoder = msgspec.json.Decoder(list[Event])
        self._blocks = self._read_blocks()

    def read_header(self) -> bytes:
        """Read up to the first event, into `header`; return the bytes read beyond it."""
        held = b""
        for block in self._blocks:
            held += block
            start = self._find_start(held)
            if start >= 0:
                break
            if len(held) > MOST_HEADER_BYTES:
                break
        else:
            start = self._find_start(held)
        if start < 0:
            start = self._first_guess(held)
        self._position = start
        return held[start:]

    def __iter__(self) -> Iterator[list[Event]]:
        held = self.read_header()
        ended = False
        for block in self._blocks:
            held += block
            events, used, ended = self._take(held)
            self._position += used
            held = held[used:]
            if events:
                yield events
            if ended:
                break
        if ended:
            self._read_tail(held)
            return
        yield from self._finish(held)

    def decode(self, piece: bytes, thorough: bool = False) -> list[Event] | None:
        """Events of a piece that begins and ends at event boundaries; None where it does not."""
        for text in attempts(piece, thorough):
            try:
                events = self._decoder.decode(b"[%b]" % text)
                if self._float_hook is None and _has_long_floats(events):
                    self._be_exact()
                    events = self._decoder.decode(b"[%b]" % text)
                return events
            except _FAILURES:
                continue
        return None

    def _be_exact(self) -> None:
        """From now on numbers with decimals come as Decimal."""
        self._float_hook = Decimal
        self._decoder = msgspec.json.Decoder(list[Event], float_hook=Decimal)

    def _read_blocks(self) -> Iterator[bytes]:
        try:
            with self.path.open("rb") as file:
                unpacker = zlib.decompressobj(31) if file.read(2) == _GZIP else None
                file.seek(0)
                at_once = min(self._block_bytes, 1 << 20) if unpacker else self._block_bytes
                while block := file.read(at_once):
                    if unpacker is None:
                        yield block
                        continue
                    unpacker = yield from self._unpack(unpacker, block)
                if unpacker is not None:
                    yield unpacker.flush()
                    if not unpacker.eof:
                        self.damage.append("the gzip stream ends early")
        except OSError as error:
            raise TraceError(
                f"{self.path} cannot be read: {error.strerror or error}; give a readable file"
            ) from None
        except zlib.error:
            self.damage.append("the gzip stream is damaged from there on")

    def _unpack(self, unpacker: Any, block: bytes) -> Iterator[bytes]:
        """Yield what `block` unpacks to in blocks; the unpacker of the next block is returned."""
        while block:
            if unpacker.eof:
                if not block.startswith(_GZIP):
                    return unpacker  # padding after the last member
                unpacker = zlib.decompressobj(31)
            before = unpacker.copy()
            try:
                piece = unpacker.decompress(block, self._block_bytes)
            except zlib.error:
                yield from _sound_part(before, block)
                raise
            block = unpacker.unconsumed_tail or unpacker.unused_data
            if piece:
                yield piece
            elif not unpacker.eof and not block:
                break
        return unpacker

    def _find_start(self, held: bytes) -> int:
        """Where the first event may begin, proven by decoding what stands before it; or -1."""
        text = held.lstrip(b"\xef\xbb\xbf \t\r\n")
        if text.startswith(b"["):
            self.is_bare = True
            return len(held) - len(text) + 1
        for match in _START.finditer(held):
            head = held[len(held) - len(text) : match.end()] + b"]}"
            header = _decode(head, Header)
            if header is not None:
                self.header.take(header)
                return match.end()
        return -1

    def _first_guess(self, held: bytes) -> int:
        match = _START.search(held)
        if match:
            self.damage.append("what stands before the events is damaged, and was left out")
            return match.end()
        where = f"{self.path} holds no trace"
        if not held.strip():
            cause = f" ({self.damage[0]})" if self.damage else ""
            raise TraceError(f"{where}: it is empty{cause}; record it again")
        if held.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{":
            raise TraceError(
                f"{where}: byte 0 does not begin JSON; give Kineto's *.json or *.json.gz, or an "
                "Nsight Systems export *.sqlite"
            )
        raise TraceError(
            f"{where}: no array 'traceEvents' begins in its {len(held)} bytes; give the file that "
            "torch.profiler's export_chrome_trace wrote, or record it again"
        )

    def _take(self, held: bytes) -> tuple[list[Event], int, bool]:
        """Events of `held`, how many bytes they used, and whether the array ended there."""
        cut = _last_boundary(held)
        if cut is not None:
            events = self.decode(held[: cut[0]])
            if events is not None:
                return events, cut[1], False
        elif len(held) <= MOST_EVENT_BYTES:
            return [], 0, False
        return self._salvage(held, is_last=False)

    def _finish(self, held: bytes) -> Iterator[list[Event]]:
        """The last piece: whole events, the end of the array, and what follows it."""
        ending = self._decode_ending(held)
        if ending is not None and self._float_hook is None and _has_long_floats(ending.events):
            self._be_exact()
            ending = self._decode_ending(held)
        if ending is not None:
            self.header.take(ending)
            yield ending.events
            return
        events, used, ended = self._salvage(held, is_last=True)
        self._position += used
        yield events
        if ended:
            self._read_tail(held[used:])
        else:
            self.damage.append(f"the events break off at byte {self._position}")

    def _decode_ending(self, held: bytes) -> _Ending | None:
        tail = b"}" if self.is_bare else b""
        decoder = msgspec.json.Decoder(_Ending, float_hook=self._float_hook)
        for text in attempts(held):
            try:
                return decoder.decode(b'{"traceEvents":[%b%b' % (text, tail))
            except _FAILURES:
                continue
        return None

    def _salvage(self, held: bytes, is_last: bool) -> tuple[list[Event], int, bool]:
        """Object by object, stepping over what is broken."""
        events: list[Event] = []
        used = 0
        while True:
            spans, used, ended = scan(held, used)
            events += self._decode_spans(held, spans)
            # A stray bracket between events is not the end of them.
            if ended and not _EVENT_START.search(held, used):
                return events, used, True
            rest = len(held) - used
            if not rest or not (is_last or rest > MOST_EVENT_BYTES):
                return events, used, False
            boundary = _BOUNDARY.search(held, used)
            if boundary is None or self._num_resyncs >= MOST_RESYNCS:
                if self._num_resyncs >= MOST_RESYNCS or not is_last:
                    self.num_broken += 1
                    used = len(held)
                return events, used, False
            self._num_resyncs += 1
            self.num_broken += 1
            used = boundary.end(1)

    def _decode_spans(self, held: bytes, spans: list[tuple[int, int]]) -> list[Event]:
        pieces = [held[begin:end] for begin, end in spans]
        events = self.decode(b",".join(pieces))
        if events is not None:
            return events
        kept: list[Event] = []
        for piece in pieces:
            one = self.decode(piece, thorough=True)
            if one is None:
                self.num_broken += 1
            else:
                kept += one
        return kept

    def _read_tail(self, held: bytes) -> None:
        """What follows the array of events."""
        for block in self._blocks:
            if len(held) <= MOST_HEADER_BYTES:
                held += block
        if self.is_bare:
            return
        header = _decode(b'{"traceEvents":[]' + held, Header)
        if header is None:
            self.damage.append("what stands behind the events is damaged, and was left out")
        else:
            self.header.take(header)


def scan(held: bytes, start: int = 0) -> tuple[list[tuple[int, int]], int, bool]:
    """Spans of the whole objects from `start`, which lies between two events.

    Returns: spans, where the last of them (or the array) ended, and whether the array ended.
    """
    spans: list[tuple[int, int]] = []
    depth, begin, stop = 0, start, start
    for match in _TOKEN.finditer(held, start):
        token = held[match.start()]
        if token in b"{[":
            if depth == 0:
                begin = match.start()
            depth += 1
        elif token in b"}]":
            if depth == 0:
                return spans, match.end() if token == ord("]") else stop, token == ord("]")
            depth -= 1
            if depth == 0:
                stop = match.end()
                if token == ord("}") and held[begin] == ord("{"):
                    spans.append((begin, stop))
        elif match.end() - match.start() == 1:
            break  # a string that does not end
    return spans, stop, False


def attempts(piece: bytes, thorough: bool = False) -> Iterator[bytes]:
    """The piece, then the piece without what JSON forbids and recorders write: bare nan and inf,
    bytes that are not UTF-8, raw control characters, broken escapes. `thorough` finds nan and inf
    outside of objects too, at a tenth of the speed.
    """
    yield piece
    mended = piece
    for pattern in _NON_FINITE:
        mended = _drop_non_finite(mended, pattern)
    mended = mended.translate(_BLANKED)
    mended = mended.decode("utf-8", "replace").encode()
    mended = _BROKEN_ESCAPE.sub(lambda match: match[0] if len(match[0]) > 1 else b"\\\\", mended)
    if mended != piece:
        yield mended
    if thorough:
        yield _NON_FINITE_ANYWHERE.sub(
            lambda match: match[0] if match[0].startswith(b'"') else b"null", mended
        )


def _sound_part(unpacker: Any, block: bytes) -> Iterator[bytes]:
    """What a damaged block unpacks to before the damage, which would be thrown away with it."""
    with suppress(zlib.error):
        for begin in range(0, len(block), 64):
            yield unpacker.decompress(block[begin : begin + 64])


def _has_long_floats(events: list[Event]) -> bool:
    """Whether times are floats so large that ns are lost: absolute ones, of old recorders."""
    return any(isinstance(event.ts, float) and event.ts >= EXACT_US for event in events[:100])


def _drop_non_finite(piece: bytes, pattern: re.Pattern[bytes]) -> bytes:
    """null for each value of an object that the pattern spells."""
    kept, done = [], 0
    for match in pattern.finditer(piece):
        before = _KEY_BEFORE.search(piece, max(match.start() - 32, 0), match.start())
        if before is not None:
            kept += [piece[done : before.start(1)], b"null"]
            done = match.end()
    return b"".join([*kept, piece[done:]]) if kept else piece


def _decode(text: bytes, kind: type[Header]) -> Header | None:
    for attempt in attempts(text, thorough=True):
        try:
            return msgspec.json.decode(attempt, type=kind)
        except _FAILURES:
            continue
    return None


def _last_boundary(held: bytes) -> tuple[int, int] | None:
    """(end of an event, begin of the next) of the last place that looks like a boundary."""
    window = 1 << 16
    while True:
        found = deque(_BOUNDARY.finditer(held, max(len(held) - window, 0)), maxlen=1)
        if found:
            return found[0].start() + 1, found[0].end(1)
        if window >= len(held):
            return None
        window *= 16
