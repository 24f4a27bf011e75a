"""A request while it waits and runs, as rank 0 keeps it."""

from dataclasses import dataclass, field

from tpinfer.steps.plan import SamplingRecord, SequenceRecord

NEVER = 1 << 62
"""A position, or a step, that is not reached."""
NO_TOKEN = -1
"""What a rank says it drew where the logits were not numbers."""


@dataclass(slots=True, eq=False)
class Family:
    """The n continuations of one request: the prompt is computed once, by `source`."""

    members: tuple["Sequence", ...]
    source: "Sequence"
    is_ready: bool = False
    """Whether the prompt has been computed once; until then all but `source` wait aside."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One request's life on rank 0. Times are on the monotonic clock, in ns."""

    index: int
    """Place of the request in the caller's list."""
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    stop_token_ids: frozenset[int]
    """Tokens that end it; empty when it ignores them."""
    accepted_ns: int
    sampling: SamplingRecord = field(default_factory=SamplingRecord)
    priority: int = 0
    """Lower runs first; see `SchedulerLimits.ageing_ns`."""
    cache_salt: str = ""
    """Prefixes are shared only among requests with the same salt."""
    adapter: str = ""
    """Digest of the adapter; the same holds for it."""
    needs_whole_prompt: bool = False
    """Every prompt token must be computed (its logprobs are wanted): no prefix is taken over."""

    id: int = -1
    """Given by the scheduler, growing."""
    row: int = -1
    """Row it runs in; -1 while it waits."""
    admitted_ns: int = 0
    """When it first got a row; 0 before."""
    num_computed: int = 0
    """Tokens whose keys and values are known to be in its blocks."""
    num_planned: int = 0
    """The same once the steps in flight are done."""
    num_left: int = 0
    """Tokens behind those, counting the ones that the steps in flight draw. 1 in a decode."""
    token_ids: list[int] = field(default_factory=list)
    """Generated tokens."""
    token_times_ns: list[int] = field(default_factory=list)
    """When each generated token was on the host."""
    blocks: list[int] = field(default_factory=list)
    """KV blocks held, in token order, behind the dropped ones."""
    num_dropped_blocks: int = 0
    """Leading blocks not held because every layer's window has passed them."""
    num_cached_tokens: int = 0
    """Prompt tokens taken over from the prefix cache at the first admission."""
    num_preemptions: int = 0
    next_eligible_step: int = 0
    """It has no part in steps before this one while others are in flight."""
    finish_reason: str | None = None
    """`stop`, `length`, `abort` or `error`; None while it is unfinished."""

    order: tuple[int, int] = (0, 0)
    """What decides who goes first: (arrival moved by priority in ns, id)."""
    max_context: int = 0
    """Most tokens whose keys it can ever cache: the last token is never fed back."""
    family: Family | None = None
    """The request's other continuations, if there are any."""
    ends: frozenset[int] = frozenset()
    """Tokens that end it, the one that stands for an error included."""
    free_until: int = 0
    """At a `num_planned` below this it decodes, needs no block and drops none."""
    border: int = 0
    """`num_computed` from which there is more to do than to note a token."""
    full_at: int = NEVER
    """`num_computed` at which the next block can be put into the prefix cache."""
    num_registered: int = 0
    """Leading blocks that were put there, or were found there."""
    keys: list[bytes] = field(default_factory=list)
    """Chain keys of the full blocks of known tokens, as far as they were needed."""
    host_blocks: list[int] = field(default_factory=list)
    """Where its blocks are while it is moved out."""

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.prompt_token_ids) + len(self.token_ids)

    @property
    def num_known(self) -> int:
        """Prompt and generated tokens, with those that the steps in flight draw."""
        return self.num_planned + self.num_left

    @property
    def num_drawing(self) -> int:
        """Tokens that steps in flight draw for it."""
        return self.num_known - self.num_tokens

    @property
    def wants_whole_prompt(self) -> bool:
        """Whether it must still compute every prompt token itself."""
        return self.needs_whole_prompt and not self.token_ids

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """Tokens [start, stop) of prompt and output; their values must be on the host."""
        length = len(self.prompt_token_ids)
        return self.prompt_token_ids[start:stop] + tuple(
            self.token_ids[max(0, start - length) : max(0, stop - length)]
        )

    def record(self) -> SequenceRecord:
        """What ranks must know to run it in its row."""
        return SequenceRecord(
            row=self.row,
            token_ids=self.tokens(0, self.num_tokens),
            num_prompt_tokens=len(self.prompt_token_ids),
            num_computed=self.num_computed,
            sampling=self.sampling,
        )
