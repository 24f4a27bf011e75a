"""What a step and the cache may hold, and what the scheduler counts."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What a step and the cache may hold."""

    block_size: int
    num_blocks: int
    max_num_seqs: int
    """Sequences in one step."""
    max_num_batched_tokens: int
    """Query tokens in one step."""
    max_model_len: int
    """Tokens of one sequence, prompt and output."""
    window: int | None = None
    """Sliding window when *every* layer slides: blocks behind it are given back; else None."""
    num_groups: int = 1
    """Ranks among which the blocks of a KV head are dealt out: block i is of class i modulo this,
    and so is the place in its sequence."""
    num_host_blocks: int = 0
    """Blocks in host memory for evicted prefixes and preempted sequences; 0 for none."""
    prefix_caching: bool = True
    """Whether a prefix that was computed before is taken over."""
    step_budget_ns: int | None = None
    """Predicted time that prompts may fill a step up to; None leaves it to the tokens."""
    ageing_ns: int = 10_000_000_000
    """Waiting that makes up for one step of priority: a sequence of priority p is served as if it
    had arrived p * ageing_ns later."""


@dataclass(slots=True)
class SchedulerStats:
    """What has happened since the scheduler was made."""

    num_steps: int = 0
    num_recomputed: int = 0
    """Preemptions after which the tokens are computed again."""
    num_moved_out: int = 0
    """Preemptions by moving blocks to host memory."""
    num_stalls: int = 0
    """Times a running sequence was left out of a step for want of a block."""
    num_queried_tokens: int = 0
    """Tokens looked up in the prefix cache."""
    num_hit_tokens: int = 0
    """Of those, tokens taken over."""
    num_forked: int = 0
    """Continuations that took over the prompt of another one of their request."""
    num_evictions: int = 0
    """Cached blocks given up for others."""
    num_blocks_saved: int = 0
    """Blocks copied to host memory."""
    num_blocks_fetched: int = 0
    """Blocks brought back."""
