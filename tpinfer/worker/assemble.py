"""From a configuration and a seat to a worker: the only place where backends, dtypes and models
are chosen."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec
import torch

from tpinfer.attention.paged_kv import PagedKV
from tpinfer.attention.reference import bind_attention
from tpinfer.checkpoint.loader import load_parameters, random_parameters
from tpinfer.checkpoint.reader import CheckpointReader
from tpinfer.collectives.group import Group
from tpinfer.collectives.opening import open_group
from tpinfer.config.engine import EngineConfig
from tpinfer.config.errors import ConfigError
from tpinfer.config.huggingface import read_model_spec
from tpinfer.config.model import ModelSpec
from tpinfer.config.topology import Topology
from tpinfer.config.topology_reader import load_topology
from tpinfer.costs.choices import Choice, ExecutionChoices, choose_execution
from tpinfer.costs.kv_capacity import MemoryPlan, MemoryRequest, plan_memory
from tpinfer.costs.ledger import CostLedger
from tpinfer.decoding.sampler import bind_sample
from tpinfer.launching.seat import Seat
from tpinfer.layers.rotary import rotary_table
from tpinfer.machine.discover import available_memory_bytes, discover_machine
from tpinfer.models.decoder import DecoderParts, build_decoder
from tpinfer.numerics.torch_dtypes import to_torch
from tpinfer.scheduling.limits import SchedulerLimits
from tpinfer.sharding.parameters import ParameterSpec, decoder_parameters
from tpinfer.sharding.partition import Partition, partition_model
from tpinfer.worker.measurements import gather_bytes
from tpinfer.worker.rows import RotaryTable, RowStore
from tpinfer.worker.worker import Worker, WorkerParts

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Assembly:
    """A rank ready to work, and what was decided on the way."""

    config: EngineConfig
    seat: Seat
    spec: ModelSpec
    partition: Partition
    choices: ExecutionChoices
    topology: Topology | None
    group: Group
    device: torch.device
    memory_by_rank: tuple[MemoryPlan, ...]
    limits: SchedulerLimits
    worker: Worker

    def ledger(self, rank: int) -> CostLedger:
        """What a step costs on `rank`."""
        return make_ledger(self.spec, self.partition, rank, self.choices)


def assemble(config: EngineConfig, seat: Seat, progress: Progress) -> Assembly:
    """Choose, connect, load and size one rank. A collective call.

    Raises ConfigError, CheckpointError or RankError.
    """
    spec = _model_spec(config)
    topology = load_topology(config.topology) if config.topology else None
    partition = partition_model(
        spec, _checked_tp(config, seat), topology.shares if topology else None
    )
    machine = discover_machine()
    choices = choose_execution(
        config, spec, seat.device, seat.local_world, machine.num_cores, machine.cpu_flags
    )
    device = torch.device(seat.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(choices.num_threads)
    progress("connecting the ranks")
    facts = machine.cpu_flags, machine.num_cores, machine.shared_memory_free_bytes
    group, collective = open_group(config.collective, seat, device, config.wait_timeout_s, facts)
    named = f"{collective.name} {collective.variant}".strip()
    choices = choices.with_choice(Choice("collective", named, collective.reason))
    try:
        return _load_and_size(config, seat, spec, topology, partition, choices, group, progress)
    except BaseException:
        group.abort()
        group.close()
        raise


def _load_and_size(
    config: EngineConfig,
    seat: Seat,
    spec: ModelSpec,
    topology: Topology | None,
    partition: Partition,
    choices: ExecutionChoices,
    group: Group,
    progress: Progress,
) -> Assembly:
    device = torch.device(seat.device)
    ledger = make_ledger(spec, partition, seat.rank, choices)
    parameters = _parameters(config, seat, spec, partition, choices, progress)
    progress("sizing the KV cache")
    memory = plan_memory(ledger, _memory_request(config, seat, spec))
    memory_by_rank = _agree_on_memory(memory, group, device)
    limits = _limits(config, spec, memory_by_rank[0])
    kv = PagedKV(
        spec.num_layers,
        partition.num_kv_heads(seat.rank),
        spec.head_dim,
        limits.num_blocks,
        limits.block_size,
        to_torch(choices.kv_dtype),
        device,
    )
    largest_bytes = (
        config.max_num_batched_tokens * spec.hidden_size * choices.compute_dtype.num_bytes
    )
    program = build_decoder(
        DecoderParts(
            spec=spec,
            partition=partition,
            rank=seat.rank,
            parameters=parameters,
            kv=kv,
            bind_attention=bind_attention,
            bind_reduce=lambda site: group.bind_all_reduce(largest_bytes, choices.compute_dtype),
            all_gather=group.all_gather,
            sample=bind_sample(),
        )
    )
    rows = _row_store(spec, choices, limits, device)
    worker = Worker(WorkerParts(program, rows, group, device, _collective_sites(ledger)))
    return Assembly(
        config,
        seat,
        spec,
        partition,
        choices,
        topology,
        group,
        device,
        memory_by_rank,
        limits,
        worker,
    )


def _row_store(
    spec: ModelSpec, choices: ExecutionChoices, limits: SchedulerLimits, device: torch.device
) -> RowStore:
    num_positions = limits.max_model_len
    if limits.window is None:  # no sequence outgrows the cache
        num_positions = min(num_positions, limits.num_blocks * limits.block_size)
    rotary = RotaryTable(
        *rotary_table(spec, num_positions, to_torch(choices.compute_dtype), device)
    )
    return RowStore(
        limits.block_size, spec.sliding_window, limits.window is not None, rotary, device
    )


def _collective_sites(ledger: CostLedger) -> frozenset[str]:
    return frozenset(op for op in ledger.op_ids() if ledger.kind(op).is_collective)


def make_ledger(
    spec: ModelSpec, partition: Partition, rank: int, choices: ExecutionChoices
) -> CostLedger:
    """The ledger of one rank."""
    return CostLedger(spec, partition, rank, choices.compute_dtype, choices.kv_dtype)


def _model_spec(config: EngineConfig) -> ModelSpec:
    spec = read_model_spec(config.model_dir)
    config.check_model(spec)
    if config.num_layers_override is None:
        return spec
    count = config.num_layers_override
    return replace(spec, num_layers=count, sliding_layers=spec.sliding_layers[:count])


def _checked_tp(config: EngineConfig, seat: Seat) -> int:
    if config.tp != seat.world:
        raise ConfigError(
            f"--tp {config.tp}, but {seat.world} ranks were started; start {config.tp} ranks or "
            "pass "
            f"--tp {seat.world}"
        )
    return config.tp


def _parameters(
    config: EngineConfig,
    seat: Seat,
    spec: ModelSpec,
    partition: Partition,
    choices: ExecutionChoices,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    wanted = decoder_parameters(spec, partition, choices.compute_dtype)
    device = torch.device(seat.device)

    def allocate(parameter: ParameterSpec) -> torch.Tensor:
        shape = parameter.shard.local_shape(seat.rank)
        return torch.empty(shape, dtype=to_torch(parameter.dtype), device=device)

    if config.load_format == "random":
        progress("making random weights")
        return random_parameters(wanted, seat.rank, config.seed, allocate)

    def report(num_done_bytes: int, num_bytes: int) -> None:
        progress(f"loading weights {num_done_bytes / 1e6:.0f} of {num_bytes / 1e6:.0f} MB")

    with CheckpointReader(config.model_dir) as reader:
        return load_parameters(reader, wanted, seat.rank, allocate, report)


def _memory_request(config: EngineConfig, seat: Seat, spec: ModelSpec) -> MemoryRequest:
    """What this rank may still take; its weights are in memory already."""
    if seat.device == "cpu":
        available = available_memory_bytes() // seat.local_world
    else:
        available = torch.cuda.mem_get_info(torch.device(seat.device))[0]
    return MemoryRequest(
        available_bytes=int(available * config.memory_utilization),
        kv_bytes=config.kv_bytes,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len or spec.max_position,
    )


def _agree_on_memory(
    mine: MemoryPlan, group: Group, device: torch.device
) -> tuple[MemoryPlan, ...]:
    """Every rank's plan, all with the number of blocks that the tightest rank has room for."""
    if group.size == 1:
        return (mine,)
    payloads = gather_bytes(group, msgspec.msgpack.encode(mine), device)
    plans = [msgspec.msgpack.decode(payload, type=MemoryPlan) for payload in payloads]
    num_blocks = min(plan.num_blocks for plan in plans)
    return tuple(plan.with_blocks(num_blocks) for plan in plans)


def _limits(config: EngineConfig, spec: ModelSpec, memory: MemoryPlan) -> SchedulerLimits:
    slides = bool(spec.sliding_layers) and all(spec.sliding_layers)
    return SchedulerLimits(
        block_size=config.block_size,
        num_blocks=memory.num_blocks,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len or spec.max_position,
        window=spec.sliding_window if slides else None,
    )
