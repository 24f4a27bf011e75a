"""Ranks as threads of the test's own process: a group that exchanges through a barrier, and one
prefill with it."""

import threading
from pathlib import Path

import torch

from tpinfer.attention.paged_kv import PagedKV
from tpinfer.attention.reference import bind_attention
from tpinfer.checkpoint.loader import load_parameters
from tpinfer.checkpoint.reader import CheckpointReader
from tpinfer.config.dtypes import DType
from tpinfer.config.huggingface import read_model_spec
from tpinfer.decoding.sampler import bind_sampler
from tpinfer.layers.rotary import rotary_table
from tpinfer.layers.step_inputs import Activations, Op
from tpinfer.models.decoder import DecoderParts, build_decoder
from tpinfer.numerics.torch_dtypes import to_torch
from tpinfer.sharding.parameters import ParameterSpec, decoder_parameters
from tpinfer.sharding.partition import Partition, partition_model
from tpinfer.steps.plan import SamplingRecord, SequenceRecord, StepPlan
from tpinfer.worker.rows import RotaryTable, RowStore

CPU = torch.device("cpu")
BLOCK = 16


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
    directory: Path, partition: Partition, rank: int, dtype: DType, exchange: ThreadExchange
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

    with CheckpointReader(directory) as reader:
        parameters = load_parameters(
            reader, decoder_parameters(spec, partition, dtype), rank, allocate
        )
    compute = to_torch(dtype)
    kv = PagedKV(
        spec.num_layers, partition.num_kv_heads(rank), spec.head_dim, 16, BLOCK, compute, CPU
    )
    program = build_decoder(
        DecoderParts(
            spec=spec,
            partition=partition,
            rank=rank,
            parameters=parameters,
            kv=kv,
            bind_attention=bind_attention,
            bind_reduce=lambda site: all_reduce,
            bind_sampling=lambda any_logits: bind_sampler(
                all_gather, partition.vocab, rank, any_logits
            ),
        )
    )
    slides = bool(spec.sliding_layers) and all(spec.sliding_layers)
    rotary = RotaryTable(*rotary_table(spec, spec.max_position, compute, CPU))
    return program, RowStore(BLOCK, spec.sliding_window, slides, rotary, CPU)


def prefill_logits(directory: Path, tp: int, dtype: DType, prompt: list[int]) -> torch.Tensor:
    """float32 [len(prompt), V]: the ranks' logits side by side, one prompt token a step."""
    partition = partition_model(read_model_spec(directory), tp)
    exchange = ThreadExchange(tp)
    found: dict[int, torch.Tensor] = {}

    def work(rank: int) -> None:
        program, rows = build_rank(directory, partition, rank, dtype, exchange)
        rows.admit(SequenceRecord(0, tuple(prompt), len(prompt), 0, SamplingRecord()))
        logits = []
        with torch.inference_mode():
            for step in range(len(prompt)):
                blocks = ((0, *range(16)),) if step == 0 else ()
                plan = StepPlan(step, (0,), (1,), (1,), blocks)
                inputs = rows.build(plan)
                acts = Activations()
                for op in program:
                    op.call(acts, inputs)
                logits.append(acts.logits.clone())
                rows.rows[0].num_computed += 1
        found[rank] = torch.cat(logits)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(tp)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    return torch.cat([found[rank] for rank in range(tp)], -1)
