"""From a configuration and a seat to a worker: the only place where backends, dtypes and models
are chosen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from tpinfer.attention.prompt_attention import AttentionShape
from tpinfer.checkpoint.loader import load_parameters, random_parameters
from tpinfer.checkpoint.reader import CheckpointReader
from tpinfer.collectives.group import Group
from tpinfer.collectives.opening import open_group, open_part
from tpinfer.config.engine import EngineConfig
from tpinfer.config.environment import export_defaults
from tpinfer.config.errors import ConfigError
from tpinfer.config.huggingface import read_model_spec
from tpinfer.config.model import ModelSpec
from tpinfer.config.topology import Topology
from tpinfer.config.topology_reader import load_topology
from tpinfer.costs.choices import (
    Choice,
    ExecutionChoices,
    kv_layout_choice,
    recorded_choice,
    shared_device_choice,
)
from tpinfer.costs.collective_sizes import collective_curves
from tpinfer.costs.decoder_ops import SHARED_KV_OPS
from tpinfer.costs.kv_capacity import MemoryPlan
from tpinfer.costs.ledger import CostLedger
from tpinfer.decoding.sampler import bind_sampler
from tpinfer.launching.binding import bind_thread
from tpinfer.launching.seat import Seat
from tpinfer.launching.shared_device import SharedDevice, share_device
from tpinfer.layers.rotary import rotary_table
from tpinfer.machine.discover import Machine, discover_machine
from tpinfer.models.decoder import DecoderParts, SharedKV, build_decoder, head_layout
from tpinfer.numerics.torch_dtypes import to_torch
from tpinfer.scheduling.limits import SchedulerLimits
from tpinfer.sharding.kv_layout import KVLayout
from tpinfer.sharding.parameters import ParameterSpec, decoder_parameters
from tpinfer.sharding.partition import Partition, partition_model
from tpinfer.worker.decisions import decide, make_ledger
from tpinfer.worker.graphs import CudaRecorder
from tpinfer.worker.kernels import Kernels, choose_kernels
from tpinfer.worker.kv_cache import RankCache, capacity_choice, open_cache, size_cache
from tpinfer.worker.record import record_steps
from tpinfer.worker.rows import RotaryTable, RowLimits, RowStore
from tpinfer.worker.warm_up import warm_up
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
    groups: tuple[Group, ...]
    """All ranks; and those that share this rank's KV head without copies, where some do."""
    device: torch.device
    memory_by_rank: tuple[MemoryPlan, ...]
    limits: SchedulerLimits
    worker: Worker
    cache: RankCache
    emulation: str = ""
    """Said beside every figure of this run, where its figures claim nothing."""
    unbind: Callable[[], None] = lambda: None
    """Takes the binding to cores back."""

    @property
    def group(self) -> Group:
        """All ranks."""
        return self.groups[0]

    def abort(self) -> None:
        """Make the other ranks' collectives fail as soon as they can."""
        for group in self.groups:
            group.abort()

    def close(self) -> None:
        """Let go of the groups, and first of recordings that use them. Can be called twice."""
        self.worker.forget_recorded()
        for group in self.groups:
            group.close()
        self.unbind()

    def ledger(self, rank: int) -> CostLedger:
        """What a step costs on `rank`."""
        return make_ledger(self.spec, self.partition, rank, self.choices)


def assemble(config: EngineConfig, seat: Seat, progress: Progress) -> Assembly:
    """Choose, connect, load and size one rank. A collective call.

    Raises ConfigError, CheckpointError or RankError.
    """
    spec = _model_spec(config)
    topology = None
    if config.topology:
        topology = load_topology(config.topology, config.topology_settings)
    partition = partition_model(
        spec,
        _checked_tp(config, seat),
        topology.shares if topology else None,
        config.kv_layout,
    )
    machine = discover_machine()
    config, choices, cores = decide(config, seat, spec, partition, topology, machine)
    unbind = bind_thread(cores)
    try:
        made = _connect(config, seat, spec, topology, partition, choices, machine, progress)
    except BaseException:
        unbind()
        raise
    return replace(made, unbind=unbind)


def _connect(
    config: EngineConfig,
    seat: Seat,
    spec: ModelSpec,
    topology: Topology | None,
    partition: Partition,
    choices: ExecutionChoices,
    machine: Machine,
    progress: Progress,
) -> Assembly:
    device = torch.device(seat.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(choices.num_threads)
    progress("connecting the ranks")
    facts = machine.cpu_flags, machine.num_cores, machine.shared_memory_free_bytes
    row_bytes = spec.hidden_size * choices.compute_dtype.num_bytes
    curves = None
    if topology is not None:
        curves = collective_curves(
            topology, seat.world, row_bytes, config.batched_tokens * row_bytes
        )
    sharing = _sharing(config, seat)
    if sharing is not None:
        choices = choices.with_choice(shared_device_choice(sharing.words))
    group, collective = open_group(
        config.collective, seat, device, config.wait_timeout_s, facts, progress, curves,
        None if sharing is None else sharing.by_nccl,
    )  # fmt: skip
    choices = choices.with_choice(Choice("collective", collective.words, collective.reason))
    choices = choices.with_choice(kv_layout_choice(config, spec, partition))
    groups = [group]
    try:
        if partition.kv_group_size > 1:
            ranks = partition.kv_ranks(seat.rank)
            timeout_s = config.wait_timeout_s
            groups.append(
                open_part(group, collective, seat, ranks, device, timeout_s, machine.num_cores)
            )
        made = _load_and_size(config, seat, spec, topology, partition, choices, groups, progress)
        return made if sharing is None else replace(made, emulation=sharing.words)
    except BaseException:
        for one in groups:
            one.abort()
            one.close()
        raise


def _sharing(config: EngineConfig, seat: Seat) -> SharedDevice | None:
    """How ranks share a GPU, where they may and do; their libraries are told."""
    if not config.share_device or not seat.device.startswith("cuda"):
        return None
    place = seat.local_world, torch.cuda.device_count()
    found = share_device(seat.rank, place, config.collective, config.nccl_library)
    if found is not None:
        export_defaults(found.variables)
    return found


def _load_and_size(
    config: EngineConfig,
    seat: Seat,
    spec: ModelSpec,
    topology: Topology | None,
    partition: Partition,
    choices: ExecutionChoices,
    groups: Sequence[Group],
    progress: Progress,
) -> Assembly:
    group, kv_group = groups[0], groups[-1]
    device = torch.device(seat.device)
    ledger = make_ledger(spec, partition, seat.rank, choices)
    parameters = _parameters(config, seat, spec, partition, choices, progress)
    shared = KVLayout(config.block_size, 0, partition.kv_group_size, partition.kv_place(seat.rank))
    kernels, choices = choose_kernels(
        parameters, choices, shared, device, batch_invariant=config.batch_invariant,
        is_alone=seat.world == 1,
        shape=AttentionShape(head_layout(partition, seat.rank), spec.head_dim, spec.window(0)),
    )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what choosing kernels needed is room for keys and values
    progress("sizing the KV cache")
    memory_by_rank = size_cache(config, seat, ledger, group, device)
    memory = memory_by_rank[seat.rank]
    limits = _limits(config, spec, memory)
    choices = choices.with_choice(capacity_choice(memory, limits.max_model_len))
    progress(f"{memory.room(limits.max_model_len)}.")
    cache = open_cache(spec, partition, seat.rank, memory, choices.kv_dtype, device)
    largest = config.batched_tokens * spec.hidden_size * choices.compute_dtype.num_bytes
    program = build_decoder(
        DecoderParts(
            spec=spec,
            partition=partition,
            rank=seat.rank,
            parameters=parameters,
            layer_ops=kernels.layer_ops,
            kv=cache.kv,
            bind_attention=kernels.attention.bind_attention,
            bind_reduce=lambda site: group.bind_all_reduce(largest, choices.compute_dtype),
            bind_sampling=lambda any_logits: bind_sampler(
                group.all_gather, partition.vocab, seat.rank, any_logits, kernels.passes
            ),
            shared_kv=_shared_kv(partition, kernels, kv_group),
            bind_normed_reduce=group.bind_normed_reduce,
        )
    )
    rows = _row_store(spec, config, choices, limits, cache.kv.layout, device, kernels)
    sites = _collective_sites(ledger, group, kv_group)
    depth = config.steps_in_flight or 1
    worker = Worker(
        WorkerParts(
            program, rows, cache.kv, cache.host, group, device, sites, limits.max_num_seqs, depth
        )
    )
    if device.type == "cuda":
        choices = choices.with_choice(_record(config, worker, groups, kernels, limits, progress))
        progress("running first steps")
        warm_up(worker, limits)
    return Assembly(
        config,
        seat,
        spec,
        partition,
        choices,
        topology,
        tuple(groups),
        device,
        memory_by_rank,
        limits,
        worker,
        cache,
    )


def _record(
    config: EngineConfig,
    worker: Worker,
    groups: Sequence[Group],
    kernels: Kernels,
    limits: SchedulerLimits,
    progress: Progress,
) -> Choice:
    """Decode steps are recorded where a GPU can, and asked to."""
    if not config.cuda_graphs:
        return recorded_choice((), "asked for")
    if not kernels.attention.reads_paged:
        return recorded_choice((), "attention in plain torch walks sequences on the host")
    recorder = CudaRecorder(worker.device)
    return record_steps(worker, groups, limits.max_num_seqs, recorder, progress)


def _row_store(
    spec: ModelSpec,
    config: EngineConfig,
    choices: ExecutionChoices,
    limits: SchedulerLimits,
    layout: KVLayout,
    device: torch.device,
    kernels: Kernels,
) -> RowStore:
    num_positions = limits.max_model_len
    if limits.window is None:  # no sequence outgrows the cache but by its last token
        num_positions = min(num_positions, limits.num_blocks * limits.block_size + 1)
    rotary = RotaryTable(
        *rotary_table(spec, num_positions, to_torch(choices.compute_dtype), device)
    )
    held = RowLimits(
        max_num_rows=limits.max_num_seqs,
        max_num_tokens=limits.max_num_batched_tokens,
        max_len=num_positions,
        layout=layout,
        window=spec.sliding_window,
        all_layers_slide=limits.window is not None,
        is_paged=kernels.attention.reads_paged,
        steps_in_flight=config.steps_in_flight or 1,
    )
    return RowStore(held, rotary, device)


def _shared_kv(partition: Partition, kernels: Kernels, kv_group: Group) -> SharedKV | None:
    """What ranks that share a KV head do, where some do."""
    if partition.kv_group_size == 1:
        return None
    attend = kernels.attention.bind_partial_attention
    return SharedKV(attend, kv_group.all_gather, kv_group.all_to_all)


def _collective_sites(ledger: CostLedger, group: Group, kv_group: Group) -> dict[str, Group]:
    sites = [op for op in ledger.op_ids() if ledger.kind(op).is_collective]
    return {op: kv_group if op.endswith(SHARED_KV_OPS) else group for op in sites}


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


def _limits(config: EngineConfig, spec: ModelSpec, memory: MemoryPlan) -> SchedulerLimits:
    slides = bool(spec.sliding_layers) and all(spec.sliding_layers)
    return SchedulerLimits(
        block_size=config.block_size,
        num_blocks=memory.num_blocks,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.batched_tokens,
        max_model_len=config.max_model_len or spec.max_position,
        window=spec.sliding_window if slides else None,
        num_groups=memory.kv_group_size,
        num_host_blocks=memory.num_host_blocks,
        prefix_caching=config.prefix_caching,
        step_budget_ns=(
            None if config.step_budget_s is None else round(config.step_budget_s * 1e9)
        ),
    )
