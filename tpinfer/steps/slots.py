"""What the 64-bit words of a step-plan segment mean, and the status a reader keeps in its slot.

    header  0 magic, 1 ring bytes, 2 readers, 3 writer's pid, 4 its start, 5 closed,
            6 format version of the records, 16 head
    slot    0 pid, 1 start, 2 attached, 3 generation, 4 step, 5 error, 6 message bytes,
            7..30 message, 32 tail, 48 steps that failed so far, 64.. the last four of them
    failed  0 generation, 1 step, 2 code, 3 message bytes, 4..15 message

`head`, each `tail` and each count of failed steps have 128 bytes to themselves: two sides never
write the same cache line, and a count that nobody raises stays in rank 0's cache.
"""

from tpinfer.steps.interface import (
    LARGEST_MESSAGE_BYTES,
    LARGEST_STEP_MESSAGE_BYTES,
    ReaderFailure,
    StepFailure,
    check_code,
    cut,
)
from tpinfer.steps.segment import Segment

MAGIC = 0x7470_7769_7265_0002
RING_BYTES, NUM_READERS, WRITER_PID, WRITER_START, CLOSED, FORMAT, HEAD = 1, 2, 3, 4, 5, 6, 16
PID, START, ATTACHED, GENERATION, STEP, ERROR, MESSAGE = range(7)
TAIL, NUM_FAILED, FAILED = 32, 48, 64
HEADER_WORDS, SLOT_WORDS, FAILED_WORDS = 32, 128, 16
NUM_KEPT = (SLOT_WORDS - FAILED) // FAILED_WORDS
FRAME_HEADER_BYTES = 8
CONTINUES = 1 << 63
"""Bit of a frame's header, beside its size: the payload goes on in the next frame."""


def padded(size: int) -> int:
    """Bytes that a payload takes in the ring, where every frame starts at a word."""
    return (size + 7) & ~7


def slot_of(index: int) -> int:
    """First word of reader `index`'s slot."""
    return HEADER_WORDS + SLOT_WORDS * index


def publish_failure(segment: Segment, slot: int, code: int, message: str) -> None:
    """Say in `slot` that its reader cannot go on. Raises ValueError for a code below 1."""
    check_code(code)
    _write_text(segment, slot + MESSAGE, cut(message, LARGEST_MESSAGE_BYTES))
    segment.store(slot + ERROR, code)


def read_failure(segment: Segment, index: int) -> ReaderFailure | None:
    """What reader `index` said when it could not go on."""
    slot = slot_of(index)
    code = segment.load(slot + ERROR)
    if not code:
        return None
    message = _read_text(segment, slot + MESSAGE, LARGEST_MESSAGE_BYTES)
    return ReaderFailure(index, segment.words[slot + PID], code, message)


def publish_step_failure(
    segment: Segment, slot: int, step_id: int, code: int, message: str
) -> None:
    """Add a failed step to `slot`; of more than four that rank 0 has not read, the oldest go."""
    check_code(code)
    words = segment.words
    count = words[slot + NUM_FAILED]
    at = slot + FAILED + FAILED_WORDS * (count % NUM_KEPT)
    words[at] = words[slot + GENERATION]
    words[at + 1] = step_id
    words[at + 2] = code
    _write_text(segment, at + 3, cut(message, LARGEST_STEP_MESSAGE_BYTES))
    segment.store(slot + NUM_FAILED, count + 1)


def read_step_failures(segment: Segment, index: int, first: int, end: int) -> list[StepFailure]:
    """Failed steps of reader `index` with numbers from `first` to below `end`, as far as its slot
    still has them and they are of its present generation."""
    slot = slot_of(index)
    words = segment.words
    found: list[tuple[int, int, StepFailure]] = []
    for number in range(max(first, end - NUM_KEPT), end):
        at = slot + FAILED + FAILED_WORDS * (number % NUM_KEPT)
        message = _read_text(segment, at + 3, LARGEST_STEP_MESSAGE_BYTES)
        failure = StepFailure(index, words[at + 1], words[at + 2], message)
        found.append((number, words[at], failure))
    # The reader may have gone around meanwhile: what it has, or may be writing now, is not trusted.
    oldest = segment.load(slot + NUM_FAILED) - (NUM_KEPT - 1)
    generation = words[slot + GENERATION]
    return [one for number, told, one in found if number >= oldest and told >= generation]


def _write_text(segment: Segment, at: int, text: bytes) -> None:
    """The byte count in word `at`, the bytes behind it."""
    segment.words[at] = len(text)
    for offset in range(0, len(text), 8):
        word = int.from_bytes(text[offset : offset + 8], "little")
        segment.words[at + 1 + offset // 8] = word


def _read_text(segment: Segment, at: int, largest_bytes: int) -> str:
    size = min(segment.words[at], largest_bytes)
    text = segment.words[at + 1 : at + 1 + padded(size) // 8].tobytes()
    return text[:size].decode(errors="replace")
