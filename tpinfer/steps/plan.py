"""The three records that cross from rank 0 to every rank, in one ordered stream. Plain ints and
floats; no tensor.

A `StepPlan` carries deltas only: the blocks that are *new* to a row, never its whole table.
Ranks keep the rows.
"""

import msgspec


class SequenceRecord(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """One sequence, sent once when it is admitted to a row."""

    row: int
    """Permanent row of the sequence while it lives."""
    prompt_token_ids: tuple[int, ...]
    temperature: float
    """0 picks the likeliest token."""
    top_k: int
    """0 keeps all."""
    top_p: float
    min_p: float
    seed: int
    """Key of the sequence's random numbers."""
    index: int = 0
    """Which of a request's n continuations this is."""


class RowPlan(msgspec.Struct, frozen=True, array_like=True):
    """What one row may do in a step."""

    row: int
    num_tokens: int
    """Query tokens, at most."""
    new_blocks: tuple[int, ...] = ()
    """KV blocks appended to the row's table before the step."""
    num_dropped_blocks: int = 0
    """Leading blocks that slid out of every window and are gone before the step."""
    samples: bool = True
    """Whether the last query token yields a new token (false for all but a prompt's last chunk)."""


class StepPlan(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """What one step runs, the same on every rank."""

    step_id: int
    rows: tuple[RowPlan, ...]
    released_rows: tuple[int, ...] = ()
    """Rows whose sequence has ended; their state is dropped before the step."""


class Command(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Anything else rank 0 asks of the ranks: `collect`, `probe`, `close`, `profile_start`,
    `profile_stop`, `profile_write`."""

    name: str
    text: str = ""
    """A directory, for `profile_write`."""


Message = SequenceRecord | StepPlan | Command

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """One message as MessagePack."""
    return _encoder.encode(message)


def decode(payload: bytes) -> Message:
    """The message in `payload`. Raises msgspec.ValidationError for anything else."""
    return _decoder.decode(payload)
