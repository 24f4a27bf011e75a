"""One rank's KV cache, from what a run asks for to storage: sized alike on all ranks, opened, and
told in words."""

from dataclasses import dataclass

import msgspec
import torch

from tpinfer.attention.host_tier import HostTier
from tpinfer.attention.paged_kv import PagedKV
from tpinfer.collectives.group import Group
from tpinfer.config.dtypes import DType
from tpinfer.config.engine import EngineConfig
from tpinfer.config.errors import ConfigError
from tpinfer.config.kv_cache import has_scales
from tpinfer.config.model import ModelSpec
from tpinfer.config.units import format_size
from tpinfer.costs.choices import Choice
from tpinfer.costs.kv_capacity import MemoryPlan, MemoryRequest, plan_memory
from tpinfer.costs.ledger import CostLedger
from tpinfer.launching.seat import Seat
from tpinfer.machine.discover import available_memory_bytes
from tpinfer.numerics.row_quantize import dequantize_rows, quantize_rows
from tpinfer.numerics.torch_dtypes import to_torch
from tpinfer.sharding.kv_layout import KVLayout
from tpinfer.sharding.partition import Partition
from tpinfer.worker.measurements import gather_bytes


@dataclass(frozen=True, slots=True)
class RankCache:
    """What a rank stores keys and values in."""

    kv: PagedKV
    host: HostTier | None
    """None where no host memory was asked for."""


def size_cache(
    config: EngineConfig, seat: Seat, ledger: CostLedger, group: Group, device: torch.device
) -> tuple[MemoryPlan, ...]:
    """Every rank's plan, all with the number of blocks that the tightest rank has room for. A
    collective call. Raises ConfigError."""
    group.barrier()  # ranks that share a memory have all taken theirs for weights
    mine = plan_memory(ledger, _memory_request(config, seat, ledger.spec))
    if config.kv_host_bytes and not mine.num_host_blocks:
        block_bytes = mine.kv_bytes_per_token * mine.block_size
        raise ConfigError(
            f"--kv-host-bytes {config.kv_host_bytes} holds no KV block of {block_bytes} bytes; "
            "give it more, or 0 for none"
        )
    if group.size == 1:
        return (mine,)
    payloads = gather_bytes(group, msgspec.msgpack.encode(mine), device)
    plans = [msgspec.msgpack.decode(payload, type=MemoryPlan) for payload in payloads]
    num_blocks = min(plan.num_blocks for plan in plans)
    num_host_blocks = min(plan.num_host_blocks for plan in plans)
    return tuple(plan.with_blocks(num_blocks, num_host_blocks) for plan in plans)


def open_cache(
    spec: ModelSpec, partition: Partition, rank: int, memory: MemoryPlan, dtype: DType,
    device: torch.device,
) -> RankCache:  # fmt: skip
    """Take the memory that `memory` says. Raises ConfigError for a dtype the device lacks."""
    if has_scales(dtype):
        _require(dtype, device)
    layout = KVLayout(
        memory.block_size,
        memory.num_blocks,
        partition.kv_group_size,
        partition.kv_place(rank),
        has_spare=device.type == "cuda",
    )
    heads = partition.num_kv_heads(rank)
    kv = PagedKV(spec.num_layers, heads, spec.head_dim, layout, dtype, device)
    return RankCache(kv, HostTier(kv, memory.num_host_blocks) if memory.num_host_blocks else None)


def capacity_choice(memory: MemoryPlan, max_model_len: int) -> Choice:
    """The cache's size among what was decided."""
    room = memory.room(max_model_len).partition(": ")[2]
    each = f"{format_size(memory.kv_bytes_per_token)} a token on a rank that holds it"
    return Choice("KV cache", f"{memory.capacity_tokens} tokens", f"{room}; {each}")


def _memory_request(config: EngineConfig, seat: Seat, spec: ModelSpec) -> MemoryRequest:
    """What this rank may still take; its weights are in memory already."""
    if seat.device == "cpu":
        available = (available_memory_bytes() - _host_bytes(config, seat)) // seat.local_world
    else:
        num_sharing = -(-seat.local_world // max(1, torch.cuda.device_count()))
        available = torch.cuda.mem_get_info(torch.device(seat.device))[0] // num_sharing
    return MemoryRequest(
        available_bytes=int(available * config.memory_utilization),
        kv_bytes=config.kv_bytes,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.batched_tokens,
        max_model_len=config.max_model_len or spec.max_position,
        host_bytes=config.kv_host_bytes,
    )


def _host_bytes(config: EngineConfig, seat: Seat) -> int:
    """Of all ranks here: a CPU rank's cache and its host blocks share one memory. Raises
    ConfigError where it has not so much."""
    wanted, free = config.kv_host_bytes * seat.local_world, available_memory_bytes()
    if wanted > free:
        raise ConfigError(
            f"--kv-host-bytes {config.kv_host_bytes} for {seat.local_world} ranks exceeds the "
            f"{free} bytes free on this host; lower it"
        )
    return wanted


def _require(dtype: DType, device: torch.device) -> None:
    """Try the conversions on the device, before anything depends on them."""
    try:
        values, scales = quantize_rows(torch.ones(1, 8, device=device), to_torch(dtype))
        dequantize_rows(values, scales, torch.float32).sum().item()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise ConfigError(
            f"a KV cache of {dtype} cannot be used on {device}: {str(error)[:200]}; "
            "use --kv-cache-dtype auto"
        ) from error
