"""Ranks on CPUs as this runtime records them: an op's range is the kernel, the main thread the
stream, and a cost manifest lies beside each trace.

Truth by the same rules: an op goes whole to its nearest ceiling, a collective waits for the last
rank and then transfers, and whatever lies between ops is the host's.
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import msgspec

from tests.traces.kineto import EPOCH_NS, RELATIVE_NS, SECRET, microseconds
from tests.traces.scenario import Scenario
from tests.traces.truth import CollectiveTruth, SplitTruth
from tpinfer.config.ceilings import Ceilings, MemoryLevel
from tpinfer.config.dtypes import DType
from tpinfer.config.model import ModelSpec
from tpinfer.costs.ledger import CostLedger
from tpinfer.costs.manifest import cost_manifest
from tpinfer.costs.ops import OpCost, StepAggregates, aggregate
from tpinfer.sharding.partition import partition_model

CPU_CEILINGS = Ceilings(
    memory=(MemoryLevel("DRAM", 1 << 40, 2e10),),
    flops_per_s={DType.FLOAT32: 2e11},
    kernel_floor_s=2e-6,
    collective_latency_s=5e-6,
    collective_bytes_per_s=5e9,
    origin="made up for generated CPU ranks",
)
MODEL = ModelSpec(
    architecture="LlamaForCausalLM",
    num_layers=3,
    hidden_size=512,
    intermediate_size=1408,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    vocab_size=4000,
    max_position=1024,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    dtype=DType.FLOAT32,
)
PROMPT_TOKENS = 160


def nearest(cost: OpCost) -> tuple[str, float]:
    """(leaf, least ns) of an op that is no collective."""
    by_arithmetic = cost.flops / CPU_CEILINGS.flops_per_s[DType.FLOAT32]
    by_memory = cost.bytes_moved / CPU_CEILINGS.memory[-1].bytes_per_s
    roof = max(by_arithmetic, by_memory)
    if roof < CPU_CEILINGS.kernel_floor_s:
        return "latency", CPU_CEILINGS.kernel_floor_s * 1e9
    return ("compute" if by_arithmetic >= by_memory else "memory"), roof * 1e9


@dataclass(frozen=True, slots=True)
class OpRun:
    """One op of one step on one rank, in true time."""

    op: str
    step: int
    leaf: str
    start_ns: int
    arrival_ns: int
    """Of the last rank; the start where the op is no collective."""
    end_ns: int


@dataclass
class CpuRank:
    """What one rank did."""

    rank: int
    ledger: CostLedger
    now_ns: int = 5_000_000
    ops: list[OpRun] = field(default_factory=list)
    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    """(name, start, end) of annotations other than ops."""
    steps: list[tuple[int, int]] = field(default_factory=list)


class CpuRun:
    """A run of all ranks; delays and clocks are those of the scenario. Ranks that outnumber the KV
    heads share their blocks out, and meet among themselves too."""

    def __init__(self, scenario: Scenario, num_kv_heads: int = 4) -> None:
        self.scenario = scenario
        model = replace(MODEL, num_kv_heads=num_kv_heads)
        partition = partition_model(model, scenario.num_ranks, None, "auto")
        self.ranks = [
            CpuRank(r, CostLedger(model, partition, r, DType.FLOAT32, DType.FLOAT32))
            for r in range(scenario.num_ranks)
        ]
        self._random = Random(scenario.seed)
        self.collectives: list[CollectiveTruth] = []
        self._range(self.ranks[0], "tpinfer.accept request=0", 0, 0)
        self.ranks[0].now_ns += 70_000
        for step in range(scenario.num_steps):
            self._step(step)

    def aggregates(self, step: int) -> StepAggregates:
        """One sequence: a prefill, then one token a step."""
        if step == 0:
            return aggregate([PROMPT_TOKENS], [PROMPT_TOKENS], num_logit_rows=1)
        return aggregate([1], [PROMPT_TOKENS + step], num_logit_rows=1)

    def step_name(self, step: int) -> str:
        """The annotation, as the runtime writes it."""
        sums = " ".join(f"{k}={v}" for k, v in self.aggregates(step).named().items())
        phase = "decode" if step else "prefill"
        return f"tpinfer.step id={step} phase={phase} {sums}"

    def _range(self, rank: CpuRank, name: str, least: int, most: int) -> None:
        start = rank.now_ns
        rank.now_ns += self._random.randint(least, most)
        rank.ranges.append((name, start, rank.now_ns))

    def _step(self, step: int) -> None:
        first = self.ranks[0]
        self._range(first, "tpinfer.host schedule", 20_000, 40_000)
        if step == 0:
            self._range(first, "tpinfer.admit request=0", 0, 0)
        published = first.now_ns
        starts = []
        for rank in self.ranks:
            if rank.rank:
                waited = max(rank.now_ns, published) + 4000 - rank.now_ns
                self._range(rank, "tpinfer.host plan_wait", waited, waited)
            starts.append(rank.now_ns)
            self._range(rank, "tpinfer.host prepare", 10_000, 20_000)
        for op_id in first.ledger.op_ids():
            self._op(step, op_id)
        for rank, start in zip(self.ranks, starts, strict=True):
            rank.now_ns += 500
            self._range(rank, "tpinfer.host sample", 20_000, 30_000)
            if rank.rank == 0:
                self._range(rank, f"tpinfer.token request=0 index={step}", 0, 0)
            rank.now_ns += 700
            rank.steps.append((start, rank.now_ns))
        self._range(first, "tpinfer.host detokenize", 10_000, 20_000)

    def _op(self, step: int, op_id: str) -> None:
        is_collective = self.ranks[0].ledger.kind(op_id).is_collective
        layer = int(op_id.split(".")[1]) if op_id.startswith("layers.") else -1
        began = []
        for rank in self.ranks:
            rank.now_ns += self._random.randint(200, 900)
            if is_collective:
                rank.now_ns += sum(
                    d.ns
                    for d in self.scenario.delays
                    if d.where == "host" and d.strikes(rank.rank, step, layer)
                )
            began.append(rank.now_ns)
        for rank, start in zip(self.ranks, began, strict=True):
            met = rank.ledger.ranks_met(op_id)
            arrival = max(began[met.start : met.stop], default=start)
            cost = rank.ledger.cost(op_id, self.aggregates(step))
            if is_collective:
                least = CPU_CEILINGS.collective_latency_s * 1e9
                least += cost.bytes_sent / CPU_CEILINGS.collective_bytes_per_s * 1e9
                leaf, end = "comm_transfer", arrival + round(1.4 * least)
            else:
                leaf, least = nearest(cost)
                end = start + round(least * self._random.uniform(1.2, 1.5))
            came = arrival if is_collective else start
            rank.ops.append(OpRun(op_id, step, leaf, start, came, end))
            rank.now_ns = end
        groups = {rank.ledger.ranks_met(op_id) for rank in self.ranks}
        for met in groups if is_collective else ():
            self._met(step, op_id, met, began[met.start : met.stop])

    def _met(self, step: int, op_id: str, met: range, began: list[int]) -> None:
        last = [self.ranks[rank].ops[-1] for rank in met]
        ordered = sorted(began)
        self.collectives.append(
            CollectiveTruth(
                len(self.collectives),
                list(met),
                op_id,
                -1,
                step,
                [op.arrival_ns - op.start_ns for op in last],
                [op.end_ns - op.arrival_ns for op in last],
                met[began.index(ordered[-1])],
                ordered[-1] - ordered[-2],
            )
        )

    def split(self, rank: int, start: int, end: int, queued_until: int | None = None) -> SplitTruth:
        """The window [start, end) of one rank; all ranks share one clock."""
        begun = start if queued_until is None else max(start, queued_until)
        leaves: dict[str, int] = {"queue": begun - start}
        pieces = [(op.leaf, op.arrival_ns, op.end_ns) for op in self.ranks[rank].ops]
        pieces += [("comm_wait", op.start_ns, op.arrival_ns) for op in self.ranks[rank].ops]
        for leaf, first, last in pieces:
            inside = max(0, min(last, end) - max(first, begun))
            leaves[leaf] = leaves.get(leaf, 0) + inside
        host = end - start - sum(leaves.values())
        parts: dict[str, int] = {}
        for name, first, last in self.ranks[rank].ranges:
            if name.startswith("tpinfer.host "):
                part = name.split()[1]
                inside = max(0, min(last, end) - max(first, begun))
                parts[part] = parts.get(part, 0) + inside
        parts["python"] = host - sum(parts.values())
        found = {leaf: ns for leaf, ns in {**leaves, "host": host}.items() if ns}
        return SplitTruth(end - start, found, 0, parts)

    def whole(self, rank: int) -> tuple[int, int]:
        """First step's start to last step's end."""
        steps = self.ranks[rank].steps
        return steps[0][0], steps[-1][1]

    def moment(self, name: str) -> int:
        """When a mark of rank 0 was set."""
        return next(start for text, start, _ in self.ranks[0].ranges if text == name)


def _events(run: CpuRun, rank: CpuRank) -> Iterator[tuple[str, str, int, int, dict[str, object]]]:
    """(category, name, start, end, arguments). Torch's own operators lie inside the ops."""
    for step, (start, end) in enumerate(rank.steps):
        yield "user_annotation", run.step_name(step), start, end, {}
    for name, start, end in rank.ranges:
        yield "user_annotation", name, start, end, {}
    for op in rank.ops:
        yield "user_annotation", f"tpinfer.op {op.op}", op.start_ns, op.end_ns, {}
        inner = (op.start_ns + 100, op.end_ns - 100)
        shapes: dict[str, object] = {"Input Dims": [[1, 512], [512, 512]]}
        shapes["Input type"] = ["float", "float"]
        yield "cpu_op", "aten::linear", *inner, shapes
        yield "cpu_op", "aten::mm", inner[0] + 100, inner[1] - 100, shapes


def write_capture(run: CpuRun, directory: Path) -> Path:
    """The directory that `--profile` leaves."""
    directory.mkdir(parents=True, exist_ok=True)
    num_ranks = run.scenario.num_ranks
    base = EPOCH_NS - RELATIVE_NS
    for rank in run.ranks:
        pid = 900 + rank.rank
        lines = []
        for category, name, start, end, args in _events(run, rank):
            at, ns = microseconds(EPOCH_NS + start - base), microseconds(end - start)
            lines.append(
                f'{{"ph": "X", "cat": "{category}", "name": {json.dumps(name)}, "pid": {pid}, '
                f'"tid": {pid}, "ts": {at}, "dur": {ns}, "args": {json.dumps(args)}}}'
            )
        place = {"backend": "gloo", "rank": rank.rank, "world_size": num_ranks}
        head = json.dumps({"schemaVersion": 1, "distributedInfo": place, "env": {"KEY": SECRET}})
        text = f'{head[:-1]}, "baseTimeNanoseconds": {base}, "traceEvents": [{",".join(lines)}]}}'
        path = directory / f"rank{rank.rank}.trace.json.gz"
        path.write_bytes(gzip.compress(text.encode(), compresslevel=1))
        manifest = {
            "manifest": cost_manifest(rank.ledger),
            "ceilings": msgspec.to_builtins(CPU_CEILINGS, str_keys=True),
        }
        (directory / f"rank{rank.rank}.manifest.json").write_text(json.dumps(manifest))
    facts = {"format_version": 1, "tp": num_ranks, "model": "made-up", "dilation": 1.02}
    facts |= {"profiled_step_ns": [102], "unprofiled_step_ns": [100], "command": ["tpinfer"]}
    (directory / "run.json").write_text(json.dumps({**facts, "versions": {"python": "3.11"}}))
    clock = {"host": "here", "monotonic_ns": 1, "realtime_ns": 2, "ranks": list(range(num_ranks))}
    (directory / "clock-here.json").write_text(json.dumps(clock))
    return directory
