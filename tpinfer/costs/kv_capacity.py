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
    host_bytes: int = 0
    """Bytes of host memory for blocks that leave the cache."""


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
    """Blocks of the whole cache. Each lies on one of `kv_group_size` ranks: a rank's `kv_bytes`
    hold its part of them."""
    block_size: int
    kv_group_size: int = 1
    """Ranks that share a KV head without copies."""
    num_host_blocks: int = 0
    """Blocks that fit in host memory, counted like `num_blocks`."""

    @property
    def capacity_tokens(self) -> int:
        """Tokens the cache holds."""
        return self.num_blocks * self.block_size

    def with_blocks(self, num_blocks: int, num_host_blocks: int | None = None) -> "MemoryPlan":
        """The same with other numbers of blocks: ranks of a group agree on the smallest."""
        local_blocks = -(-num_blocks // self.kv_group_size)
        kv_bytes = local_blocks * self.block_size * self.kv_bytes_per_token
        host = self.num_host_blocks if num_host_blocks is None else num_host_blocks
        return replace(self, num_blocks=num_blocks, kv_bytes=kv_bytes, num_host_blocks=host)

    def num_requests(self, num_tokens: int) -> int:
        """Requests of so many tokens, prompt and output, that fit at once."""
        return self.num_blocks // -(-num_tokens // self.block_size)

    def room(self, num_tokens: int) -> str:
        """The capacity in words, for requests of `num_tokens`."""
        count = self.num_requests(num_tokens)
        text = (
            f"{self.capacity_tokens} tokens of KV cache: room for {count} "
            f"request{'' if count == 1 else 's'} of {num_tokens} tokens"
        )
        if self.num_host_blocks:
            text += f"; {self.num_host_blocks * self.block_size} more in host memory"
        return text


def plan_memory(ledger: CostLedger, request: MemoryRequest) -> MemoryPlan:
    """Size the cache of one rank.

    Without `kv_bytes` it takes what `max_num_seqs` sequences of `max_model_len` tokens can use,
    as far as that fits. Raises ConfigError with both numbers when not even one block fits.
    """
    activations = ledger.activation_bytes(request.max_num_batched_tokens, request.max_num_seqs)
    block_bytes = ledger.kv_bytes_per_token * request.block_size
    ranks = ledger.partition.kv_group_size
    room = request.available_bytes - activations
    if request.kv_bytes is not None and request.kv_bytes > room:
        raise ConfigError(
            f"--kv-bytes {request.kv_bytes} exceeds the {max(room, 0)} bytes free beside weights "
            "and activations; "
            "lower it or raise --memory-utilization"
        )
    budget = request.kv_bytes if request.kv_bytes is not None else room
    num_blocks = budget // block_bytes * ranks
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
        num_blocks = min(num_blocks, -(-useful // ranks) * ranks)
    return MemoryPlan(
        weight_bytes=ledger.weight_bytes,
        activation_bytes=activations,
        kv_bytes=num_blocks // ranks * block_bytes,
        kv_bytes_per_token=ledger.kv_bytes_per_token,
        replicated_kv_bytes_per_token=_replicated_bytes_per_token(ledger),
        num_blocks=num_blocks,
        block_size=request.block_size,
        kv_group_size=ranks,
        num_host_blocks=request.host_bytes // block_bytes * ranks,
    )


def _replicated_bytes_per_token(ledger: CostLedger) -> int:
    if ledger.partition.kv_group_size > 1:
        return 0
    ranges = ledger.partition.kv_heads
    start, stop = ranges[ledger.rank]
    elsewhere = {
        head for rank, (a, b) in enumerate(ranges) if rank != ledger.rank for head in range(a, b)
    }
    shared = sum(head in elsewhere for head in range(start, stop))
    return ledger.kv_bytes_per_token * shared // (stop - start)
