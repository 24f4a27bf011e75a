"""Ranks as threads of the test's own process: a group that exchanges through a barrier, and one
prefill with it."""

import threading
from collections.abc import Callable
from pathlib import Path

import torch

from tpinfer.attention.paged_kv import PagedKV
from tpinfer.attention.reference import bind_attention, bind_partial_attention
from tpinfer.checkpoint.loader import load_parameters
from tpinfer.checkpoint.reader import CheckpointReader
from tpinfer.config.dtypes import DType
from tpinfer.config.huggingface import read_model_spec
from tpinfer.config.kv_cache import KVLayoutName
from tpinfer.decoding.sampler import bind_sampler
from tpinfer.decoding.vocab_passes import TorchPasses
from tpinfer.layers.layer_ops import TorchLayerOps
from tpinfer.layers.matmul import bind_matmuls, plain_matmul
from tpinfer.layers.rotary import rotary_table
from tpinfer.layers.step_inputs import Activations, Op
from tpinfer.models.decoder import DecoderParts, SharedKV, build_decoder
from tpinfer.numerics.torch_dtypes import to_torch
from tpinfer.sharding.kv_layout import KVLayout
from tpinfer.sharding.parameters import ParameterSpec, decoder_parameters
from tpinfer.sharding.partition import Partition, partition_model
from tpinfer.steps.plan import SamplingRecord, SequenceRecord, StepPlan
from tpinfer.worker.rows import RotaryTable, RowLimits, RowStore

CPU = torch.device("cpu")
BLOCK, NUM_BLOCKS = 16, 32


class ThreadExchange:
    """What the ranks of one test pass to each other."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._parts: list[torch.Tensor] = [torch.empty(0)] * size

    def abort(self) -> None:
        """Free ranks that wait for one that failed."""
        self._barrier.abort()

    def swap(self, rank: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor, in rank order."""
        self._parts[rank] = tensor.clone()
        self._barrier.wait(timeout=60)
        found = list(self._parts)
        self._barrier.wait(timeout=60)
        return found


def build_rank(
    directory: Path,
    partition: Partition,
    rank: int,
    dtype: DType,
    exchange: ThreadExchange,
    kv_dtype: DType | None = None,
) -> tuple[list[Op], RowStore]:
    """One rank's program and rows over a real checkpoint."""
    spec = read_model_spec(directory)

    def allocate(parameter: ParameterSpec) -> torch.Tensor:
        return torch.empty(parameter.shard.local_shape(rank), dtype=to_torch(parameter.dtype))

    def all_reduce(tensor: torch.Tensor) -> None:
        parts = exchange.swap(rank, tensor)
        tensor.copy_(torch.stack(parts).sum(0, dtype=torch.float32))

    def all_gather(out: torch.Tensor, tensor: torch.Tensor) -> None:
        out.copy_(torch.stack(exchange.swap(rank, tensor)))

    shared = None
    if partition.kv_group_size > 1:
        mine = partition.kv_ranks(rank)

        def gather_part(out: torch.Tensor, tensor: torch.Tensor) -> None:
            parts = exchange.swap(rank, tensor)
            out.copy_(torch.stack(parts[mine.start : mine.stop]))

        def all_to_all(out: torch.Tensor, tensor: torch.Tensor) -> None:
            parts = exchange.swap(rank, tensor)[mine.start : mine.stop]
            out.copy_(torch.stack([part[partition.kv_place(rank)] for part in parts]))

        shared = SharedKV(bind_partial_attention, gather_part, all_to_all)

    with CheckpointReader(directory) as reader:
        parameters = load_parameters(
            reader, decoder_parameters(spec, partition, dtype), rank, allocate
        )
    compute = to_torch(dtype)
    layout = KVLayout(BLOCK, NUM_BLOCKS, partition.kv_group_size, partition.kv_place(rank))
    kv = PagedKV(
        spec.num_layers, partition.num_kv_heads(rank), spec.head_dim, layout, kv_dtype or dtype, CPU
    )
    program = build_decoder(
        DecoderParts(
            spec=spec,
            partition=partition,
            rank=rank,
            parameters=parameters,
            layer_ops=TorchLayerOps(bind_matmuls(parameters, plain_matmul)),
            kv=kv,
            bind_attention=bind_attention,
            bind_reduce=lambda site: all_reduce,
            bind_sampling=lambda any_logits: bind_sampler(
                all_gather, partition.vocab, rank, any_logits, TorchPasses()
            ),
            shared_kv=shared,
        )
    )
    slides = bool(spec.sliding_layers) and all(spec.sliding_layers)
    rotary = RotaryTable(*rotary_table(spec, spec.max_position, compute, CPU))
    limits = RowLimits(8, 256, spec.max_position, layout, spec.sliding_window, slides)
    return program, RowStore(limits, rotary, CPU)


def run_ranks(tp: int, work: Callable[[int, ThreadExchange], torch.Tensor]) -> list[torch.Tensor]:
    """What `work(rank, exchange)` returns on each rank, one thread a rank."""
    exchange = ThreadExchange(tp)
    found: dict[int, torch.Tensor] = {}

    def run(rank: int) -> None:
        with torch.inference_mode():
            found[rank] = work(rank, exchange)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(tp)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    return [found[rank] for rank in range(tp)]


def prefill_logits(
    directory: Path,
    tp: int,
    dtype: DType,
    prompt: list[int],
    kv_layout: KVLayoutName = "replicated",
    kv_dtype: DType | None = None,
) -> torch.Tensor:
    """float32 [len(prompt), V]: the ranks' logits side by side, one prompt token a step."""
    partition = partition_model(read_model_spec(directory), tp, None, kv_layout)

    def work(rank: int, exchange: ThreadExchange) -> torch.Tensor:
        program, rows = build_rank(directory, partition, rank, dtype, exchange, kv_dtype)
        rows.admit(SequenceRecord(0, tuple(prompt), len(prompt), 0, SamplingRecord()))
        logits = []
        for step in range(len(prompt)):
            blocks = ((0, *range(NUM_BLOCKS)),) if step == 0 else ()
            plan = StepPlan(step, (0,), (1,), (1,), blocks)
            logits.append(run_step(program, rows, plan).logits.clone())
        return torch.cat(logits)

    return torch.cat(run_ranks(tp, work), -1)


def run_step(program: list[Op], rows: RowStore, plan: StepPlan) -> Activations:
    """What a step leaves behind."""
    inputs, acts = rows.build(plan), Activations()
    for op in program:
        op.call(acts, inputs)
    return acts
