"""The three records that cross from rank 0 to every rank, in one ordered stream. Plain ints and
floats; no tensor.

A `StepPlan` carries deltas only: the blocks that are *new* to a row, never its whole table. Ranks
keep the rows. Its per-row columns are flat tuples, because 256 small records would take longer to
decode than the step they describe takes to plan.
"""

from collections.abc import Iterator

import msgspec

FORMAT_VERSION = 2
"""Of the three records together. Any change to a field changes it, and the golden bytes with it;
both ends of a wire compare it before the first record."""


class SamplingRecord(msgspec.Struct, frozen=True, array_like=True):
    """How a sequence picks its tokens, as every rank needs it. Field for field what
    `config.sampling.SamplingParams` says, without what only rank 0 acts upon."""

    temperature: float = 1.0
    """0 picks the likeliest token."""
    top_k: int = 0
    """0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    """Key of the sequence's random numbers."""
    index: int = 0
    """Which of a request's n continuations this is."""
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit), a token at most once."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Only these may come; None allows all."""
    banned_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    """`stop_token_ids` may not come before so many tokens have been generated."""
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: int = -1
    """Likeliest tokens to report with each generated one; -1 reports nothing."""
    num_prompt_logprobs: int = -1
    """The same for each prompt token."""


class SequenceRecord(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """One sequence, sent when it is admitted to a row: once, and again after a preemption."""

    row: int
    """Row of the sequence while it runs."""
    token_ids: tuple[int, ...]
    """Prompt, and after a preemption what was generated until then."""
    num_prompt_tokens: int
    """How many of them are the prompt's."""
    num_computed: int
    """Leading tokens whose keys and values are in blocks already: the first step goes on behind
    them."""
    sampling: SamplingRecord


class StepPlan(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """What one step runs, the same on every rank.

    Before it computes, a rank does in this order: let go of `released_rows`, save `to_host`, fetch
    `from_host`, make `copies`, drop `dropped_blocks`, append `new_blocks`.
    """

    step_id: int
    rows: tuple[int, ...]
    """Rows that take part, in step order; a row at most once."""
    num_tokens: tuple[int, ...]
    """Query tokens of each, at most."""
    num_samples: tuple[int, ...]
    """Tokens each one draws: 1, or 0 for all but a prompt's last chunk."""
    new_blocks: tuple[tuple[int, ...], ...] = ()
    """(row, block, block ...): KV blocks appended to the row's table. Where g ranks share a KV
    head's blocks out, the row's logical block j is one of class j mod g (`sharding.kv_layout`)."""
    dropped_blocks: tuple[tuple[int, int], ...] = ()
    """(row, count): leading blocks that slid out of every window."""
    released_rows: tuple[int, ...] = ()
    """Rows whose sequence has ended or was preempted; their state is dropped. A record that came
    before the plan may have taken such a row already: then the row is not listed."""
    copies: tuple[tuple[int, int], ...] = ()
    """(from, to): blocks copied whole, because a continuation goes on in a block it shares. Both
    are of one class; all are read before any is written."""
    to_host: tuple[tuple[int, int], ...] = ()
    """(block, host block): blocks saved in host memory. Host blocks are numbered for all ranks and
    have classes like blocks do: a pair is of one class, and the rank that holds the block keeps it
    as its host block number // g."""
    from_host: tuple[tuple[int, int], ...] = ()
    """(host block, block): blocks brought back. No host block occurs in `to_host` too."""

    def parts(self) -> Iterator[tuple[int, int, int]]:
        """(row, query tokens, samples) of each row, in step order."""
        return zip(self.rows, self.num_tokens, self.num_samples, strict=True)


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
