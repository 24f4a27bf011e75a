"""How many KV blocks fit beside weights and activations. The runtime sizes by it and the planner
predicts by it."""

from dataclasses import dataclass, replace

from tpinfer.config.errors import ConfigError
from tpinfer.costs.ledger import CostLedger


@dataclass(frozen=True, slots=True)
class MemoryRequest:
    """What a run asks for."""

    available_bytes: int
    """Bytes this rank may use for everything but its weights, which are loaded already."""
    kv_bytes: int | None
    """KV bytes asked for; None takes what is useful and fits."""
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where one rank's memory goes."""

    weight_bytes: int
    activation_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    replicated_kv_bytes_per_token: int
    """Of those, bytes that another rank stores too."""
    num_blocks: int
    block_size: int

    @property
    def capacity_tokens(self) -> int:
        """Tokens the cache holds."""
        return self.num_blocks * self.block_size

    def with_blocks(self, num_blocks: int) -> "MemoryPlan":
        """The same with another number of blocks: ranks of a group agree on the smallest."""
        kv_bytes = num_blocks * self.block_size * self.kv_bytes_per_token
        return replace(self, num_blocks=num_blocks, kv_bytes=kv_bytes)


def plan_memory(ledger: CostLedger, request: MemoryRequest) -> MemoryPlan:
    """Size the cache of one rank.

    Without `kv_bytes` it takes what `max_num_seqs` sequences of `max_model_len` tokens can use,
    as far as that fits. Raises ConfigError with both numbers when not even one block fits.
    """
    activations = ledger.activation_bytes(request.max_num_batched_tokens, request.max_num_seqs)
    block_bytes = ledger.kv_bytes_per_token * request.block_size
    room = request.available_bytes - activations
    if request.kv_bytes is not None and request.kv_bytes > room:
        raise ConfigError(
            f"--kv-bytes {request.kv_bytes} exceeds the {max(room, 0)} bytes free beside weights "
            "and activations; "
            "lower it or raise --memory-utilization"
        )
    budget = request.kv_bytes if request.kv_bytes is not None else room
    num_blocks = budget // block_bytes
    if num_blocks < 1:
        remedy = (
            f"raise --kv-bytes to at least {block_bytes}"
            if request.kv_bytes is not None
            else "use more ranks, fewer --max-num-batched-tokens or --max-num-seqs, or a larger "
            "--memory-utilization"
        )
        raise ConfigError(
            f"one KV block of {request.block_size} tokens takes {block_bytes} bytes, but "
            f"{max(budget, 0)} are there for the cache; {remedy}"
        )
    if request.kv_bytes is None:
        useful = request.max_num_seqs * -(-request.max_model_len // request.block_size)
        num_blocks = min(num_blocks, useful)
    return MemoryPlan(
        weight_bytes=ledger.weight_bytes,
        activation_bytes=activations,
        kv_bytes=num_blocks * block_bytes,
        kv_bytes_per_token=ledger.kv_bytes_per_token,
        replicated_kv_bytes_per_token=_replicated_bytes_per_token(ledger),
        num_blocks=num_blocks,
        block_size=request.block_size,
    )


def _replicated_bytes_per_token(ledger: CostLedger) -> int:
    ranges = ledger.partition.kv_heads
    start, stop = ranges[ledger.rank]
    elsewhere = {
        head for rank, (a, b) in enumerate(ranges) if rank != ledger.rank for head in range(a, b)
    }
    shared = sum(head in elsewhere for head in range(start, stop))
    return ledger.kv_bytes_per_token * shared // (stop - start)
