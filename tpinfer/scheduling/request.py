"""A request while it waits and runs, as rank 0 keeps it."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Sequence:
    """One request's life on rank 0. Times are on the monotonic clock, in ns."""

    index: int
    """Place in the caller's list."""
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    stop_token_ids: frozenset[int]
    """Tokens that end it; empty when it ignores them."""
    accepted_ns: int
    row: int = -1
    """Row it runs in; -1 while it waits."""
    admitted_ns: int = 0
    num_computed: int = 0
    """Tokens whose keys and values are cached."""
    token_ids: list[int] = field(default_factory=list)
    """Generated tokens."""
    token_times_ns: list[int] = field(default_factory=list)
    """When each generated token was on the host."""
    blocks: list[int] = field(default_factory=list)
    """KV blocks held, in token order."""
    num_dropped_blocks: int = 0
    """Leading blocks given back because every layer's window has passed them."""
    finish_reason: str | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.prompt_token_ids) + len(self.token_ids)

    @property
    def max_context(self) -> int:
        """Most tokens whose keys it can ever cache: the last token is never fed back."""
        return len(self.prompt_token_ids) + self.max_tokens - 1

    def take_token(self, token_id: int, now_ns: int) -> None:
        """Add a generated token and decide whether it was the last."""
        self.token_ids.append(token_id)
        self.token_times_ns.append(now_ns)
        if token_id in self.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.max_tokens:
            self.finish_reason = "length"
