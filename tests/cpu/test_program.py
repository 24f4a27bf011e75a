"""The program that a rank runs is the one its ledger prices: ids, FLOPs and bytes, for every family
on 1 to 4 ranks."""

from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.cpu.thread_ranks import CPU, ThreadExchange, build_rank
from tests.cpu.tiny_models import SHAPES, write_checkpoint
from tpinfer.checkpoint.loader import load_parameters
from tpinfer.checkpoint.reader import CheckpointReader
from tpinfer.config.dtypes import DType
from tpinfer.config.huggingface import read_model_spec
from tpinfer.config.kv_cache import KVLayoutName
from tpinfer.costs.ledger import CostLedger
from tpinfer.costs.ops import OpKind, StepAggregates
from tpinfer.layers.step_inputs import Activations, Op
from tpinfer.numerics.torch_dtypes import to_torch
from tpinfer.sharding.parameters import ParameterSpec, decoder_parameters
from tpinfer.sharding.partition import partition_model
from tpinfer.steps.plan import SamplingRecord, SequenceRecord, StepPlan
from tpinfer.worker.rows import RowStore

TPS = (1, 2, 3, 4)
PREFILL = StepPlan(0, (0, 1), (30, 5), (1, 1), ((0, 0, 1, 2), (1, 3)))
DECODE = StepPlan(1, (0, 1), (1, 1), (1, 1))
PROMPTS = (tuple(range(3, 33)), tuple(range(40, 45)))


class LoneExchange(ThreadExchange):
    """The other ranks' parts are taken to be like one's own: only shapes and counts matter here."""

    def __init__(self, size: int) -> None:
        super().__init__(1)
        self._size = size
        self.num_bytes = 0

    def swap(self, rank: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        """`tensor` from everybody; its bytes are kept."""
        self.num_bytes = tensor.nbytes
        return [tensor.clone()] * self._size


@dataclass(frozen=True)
class Rank:
    """One rank of a model: what it runs, and what that should cost."""

    program: list[Op]
    rows: RowStore
    ledger: CostLedger
    exchange: LoneExchange


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """Directory of a family's checkpoint, written when first asked for."""
    root = tmp_path_factory.mktemp("program")
    return cache(lambda name: write_checkpoint(name, root / name))


def ranks_of(directory: Path, tp: int, kv_layout: KVLayoutName = "replicated") -> list[Rank]:
    spec = read_model_spec(directory)
    partition = partition_model(spec, tp, None, kv_layout)
    built = []
    for rank in range(tp):
        exchange = LoneExchange(tp)
        program, rows = build_rank(directory, partition, rank, DType.FLOAT32, exchange)
        ledger = CostLedger(spec, partition, rank, DType.FLOAT32, DType.FLOAT32)
        built.append(Rank(program, rows, ledger, exchange))
    return built


@pytest.mark.parametrize("name", SHAPES)
def test_the_program_is_what_the_ledger_prices(name: str, checkpoint) -> None:
    for tp in TPS:
        for rank in ranks_of(checkpoint(name), tp):
            assert tuple(op.id for op in rank.program) == rank.ledger.op_ids(), f"tp={tp}"


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_take_the_bytes_the_ledger_says(name: str, checkpoint) -> None:
    directory = checkpoint(name)
    spec = read_model_spec(directory)

    for tp in TPS:
        partition = partition_model(spec, tp)
        wanted = decoder_parameters(spec, partition, DType.BFLOAT16)
        for rank in range(tp):

            def allocate(parameter: ParameterSpec, rank: int = rank) -> torch.Tensor:
                shape = parameter.shard.local_shape(rank)
                return torch.empty(shape, dtype=to_torch(parameter.dtype), device=CPU)

            with CheckpointReader(directory) as reader:
                loaded = load_parameters(reader, wanted, rank, allocate)
            ledger = CostLedger(spec, partition, rank, DType.BFLOAT16, DType.FLOAT32)
            assert sum(tensor.nbytes for tensor in loaded.values()) == ledger.weight_bytes
            assert sum(one.local_bytes(rank) for one in wanted) == ledger.weight_bytes


def counted(rank: Rank, plan: StepPlan) -> tuple[dict[str, int], StepAggregates]:
    """FLOPs that torch's counter sees in each op of a step, and the step's aggregates."""
    flops, so_far = {}, 0
    sums = rank.rows.aggregates(plan)
    inputs, acts = rank.rows.build(plan), Activations()
    counter = FlopCounterMode(display=False)
    # The plain implementation of attention is made of matmuls, which the counter knows.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), counter:
        for op in rank.program:
            op.call(acts, inputs)
            flops[op.id] = counter.get_total_flops() - so_far
            so_far += flops[op.id]
    rank.rows.keep_tokens(inputs, acts.tokens)
    return flops, sums


def admit(rank: Rank) -> None:
    for row, prompt in enumerate(PROMPTS):
        rank.rows.admit(SequenceRecord(row, prompt, len(prompt), 0, SamplingRecord(0.0)))


def bias_adds(rank: Rank, op_id: str, num_tokens: int) -> int:
    """Additions of a linear's bias: the ledger counts them, the counter does not."""
    ledger = rank.ledger
    wanted = decoder_parameters(ledger.spec, ledger.partition, DType.FLOAT32)
    shapes = [p.shard.local_shape(ledger.rank) for p in wanted if p.name == f"{op_id}.bias"]
    return num_tokens * sum(prod(shape) for shape in shapes)


@pytest.mark.parametrize(
    ("name", "tp"), [("mistral-window", 1), ("qwen3-norms", 1), *((name, 3) for name in SHAPES)]
)
def test_flops_agree_with_torchs_counter(name: str, tp: int, checkpoint) -> None:
    """Linears exactly. Attention exactly in a decode step, where nothing is masked: times the heads
    that the packed matmuls are padded to. In a prefill torch multiplies the masked half too."""
    for rank in ranks_of(checkpoint(name), tp):
        ledger, number = rank.ledger, rank.ledger.rank
        heads = ledger.partition.num_heads(number)
        padded = ledger.partition.num_kv_heads(number) * ledger.partition.group_size
        admit(rank)
        for plan in (PREFILL, DECODE):
            flops, sums = counted(rank, plan)
            for op, found in flops.items():
                priced, kind = ledger.cost(op, sums).flops, ledger.kind(op)
                if kind is OpKind.LINEAR:
                    assert found == priced - bias_adds(rank, op, sums.tokens), op
                elif kind is not OpKind.ATTENTION:
                    assert found == 0, f"{op} has matmuls that nobody prices"
                elif plan is DECODE:
                    assert found * heads == priced * padded, op
                else:
                    assert found * heads > priced * padded, op
            linears = [op for op in flops if ledger.kind(op) is OpKind.LINEAR]
            adds = sum(bias_adds(rank, op, sums.tokens) for op in linears)
            whole = ledger.step_cost(sums)[OpKind.LINEAR].flops
            assert sum(flops[op] for op in linears) == whole - adds


@pytest.mark.parametrize("name", ["llama-tied-gqa", "qwen3-norms"])
def test_prefill_attention_is_the_rectangle_less_its_masked_half(name: str, checkpoint) -> None:
    (rank,) = ranks_of(checkpoint(name), 1)
    admit(rank)
    flops, sums = counted(rank, PREFILL)
    width = rank.ledger.spec.num_heads * rank.ledger.spec.head_dim
    masked = sums.sqsk - sums.tokens  # each sequence is its own context: sq * (sq - 1)
    for op in (op for op in flops if rank.ledger.kind(op) is OpKind.ATTENTION):
        assert flops[op] == 4 * width * sums.sqsk
        assert rank.ledger.cost(op, sums).flops == flops[op] - 4 * width * masked // 2


SHARED = [("llama-mqa-bias", 4), ("llama-tied-gqa", 4), ("llama-tied-gqa", 8), ("qwen2-bias", 4)]


@pytest.mark.parametrize(("name", "tp"), SHARED)
def test_ranks_that_share_a_kv_head_send_what_the_ledger_says(
    name: str, tp: int, checkpoint
) -> None:
    for rank in ranks_of(checkpoint(name), tp, "auto"):
        ledger = rank.ledger
        assert tuple(op.id for op in rank.program) == ledger.op_ids()
        peers = ledger.partition.kv_group_size - 1
        assert peers > 0
        rank.rows.admit(SequenceRecord(0, PROMPTS[0], 30, 0, SamplingRecord(0.0)))
        rank.rows.admit(SequenceRecord(1, PROMPTS[1], 5, 0, SamplingRecord(0.0)))
        plan = StepPlan(0, (0, 1), (30, 5), (1, 1), ((0, 0, 1), (1, 4)))
        sums, inputs, acts = rank.rows.aggregates(plan), rank.rows.build(plan), Activations()
        with torch.inference_mode():
            for op in rank.program:
                op.call(acts, inputs)
                if op.id.endswith("attn.gather_q"):  # to each of the others
                    assert ledger.cost(op.id, sums).bytes_sent == peers * rank.exchange.num_bytes
                if op.id.endswith("attn.merge"):  # all but the own part
                    part = rank.exchange.num_bytes // (peers + 1)
                    assert ledger.cost(op.id, sums).bytes_sent == peers * part


MANY = [(name, tp) for name, shape in SHAPES.items()
        for tp in range(5, min(8, shape["num_attention_heads"]) + 1)]  # fmt: skip


@pytest.mark.parametrize(("name", "tp"), MANY)
def test_many_ranks_run_the_ledgers_program_and_meet_whom_it_says(
    name: str, tp: int, checkpoint
) -> None:
    """Where ranks are a multiple g of the KV heads they share a head's blocks out by g; else some
    store heads twice. An op is a collective for the ledger if and only if it sends something."""
    ranks = ranks_of(checkpoint(name), tp, "auto")
    num_kv_heads = ranks[0].ledger.spec.num_kv_heads
    group = 1 if tp % num_kv_heads else tp // num_kv_heads
    assert ranks[0].ledger.partition.kv_group_size == group
    sampling = SamplingRecord(1.0, num_logprobs=2)
    for rank in ranks:
        ledger = rank.ledger
        assert tuple(op.id for op in rank.program) == ledger.op_ids() == ranks[0].ledger.op_ids()
        for row, prompt in enumerate(PROMPTS):
            rank.rows.admit(SequenceRecord(row, prompt, len(prompt), 0, sampling))
        plan = StepPlan(0, (0, 1), (30, 5), (1, 1), ((0, 0, 1), (1, 3 * group)))
        inputs, acts = rank.rows.build(plan), Activations()
        sizes = set()
        with torch.inference_mode():
            for op in rank.program:
                rank.exchange.num_bytes = 0
                op.call(acts, inputs)
                met = ledger.ranks_met(op.id)
                sizes.add(len(met))
                if op.id != "sample.search":  # sends where candidates do not suffice
                    assert bool(met) == bool(rank.exchange.num_bytes), op.id
                assert not met or ledger.rank in met
                assert all(ranks[other].ledger.ranks_met(op.id) == met for other in met), op.id
        assert sizes == ({0, tp} if group in (1, tp) else {0, group, tp})
