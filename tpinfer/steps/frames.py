"""Frames on a TCP connection: one byte of kind, four of length (little-endian), then the payload.

Does not know where the bytes come from; a stream may be cut anywhere.
"""

import struct
from collections.abc import Mapping

from tpinfer.config.errors import RankError

PLAN, CLOSE = 1, 2
"""From rank 0: a payload of the wire; nothing follows."""
REPORT, STEP_FAILED, FAILED, LEFT = 3, 4, 5, 6
"""To rank 0: see `PlanReader.report`, `fail_step`, `fail` and `close`."""
LARGEST_PLAN_BYTES = 64 << 20
"""Of one payload; the tokens of a prompt take at most 5 bytes each."""

_HEADER = struct.Struct("<BI")
HEADER_BYTES = _HEADER.size
REPORT_FIELDS = struct.Struct("<QQ")
"""Generation, step."""
STEP_FAILED_FIELDS = struct.Struct("<QI")
"""Step, code; the message follows."""
FAILED_FIELDS = struct.Struct("<I")
"""Code; the message follows."""


def frame(kind: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return _HEADER.pack(kind, len(payload)) + payload


class FrameStream:
    """Takes bytes as they come and gives whole frames."""

    def __init__(self, limits: Mapping[int, int], who: str) -> None:
        """`limits` are the kinds that may come and the largest payload of each in bytes; `who`
        sends them, for messages."""
        self._limits = limits
        self._who = who
        self._received = bytearray()

    def feed(self, received: bytes) -> None:
        """Append what a socket gave."""
        self._received += received

    def take(self) -> tuple[int, bytes] | None:
        """The next frame as (kind, payload), or None until more is fed.

        Raises RankError for a kind or a length that cannot be; the stream is of no use then.
        """
        if len(self._received) < HEADER_BYTES:
            return None
        kind, size = _HEADER.unpack_from(self._received)
        largest = self._limits.get(kind)
        if largest is None or size > largest:
            raise RankError(
                f"{self._who} sent a frame of kind {kind} and {size} bytes, which is none of this "
                "wire's; look for a proxy or another program between the hosts"
            )
        end = HEADER_BYTES + size
        if len(self._received) < end:
            return None
        payload = bytes(memoryview(self._received)[HEADER_BYTES:end])
        del self._received[:end]
        return kind, payload
