"""What the runtime's own ops take, one between the others as in a run: part of `topo probe`.

A few layers of a well-known shape get random weights and run steps of few and many rows, long and
short prompts, through the worker that serves requests. An op alone in a loop is quicker than in a
step: there its weights and its code come from memory again, its threads have gone to sleep and the
other ranks come when they come.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from tpinfer.config.engine import EngineConfig
from tpinfer.config.errors import RankError
from tpinfer.config.measured import HostTime, OpTime
from tpinfer.config.model_name import model_directory
from tpinfer.costs.ledger import CostLedger
from tpinfer.costs.step_record import StepRecord
from tpinfer.engine.host_probe import around_ops_s, fit_host_time, planning_s
from tpinfer.launching.seat import Seat
from tpinfer.machine.op_fit import OpPoint, fit_op_times
from tpinfer.steps.plan import SamplingRecord, SequenceRecord, StepPlan
from tpinfer.worker.assemble import Assembly, assemble

_SHAPE, _NUM_LAYERS, _BLOCK = "shape:qwen3-1.7b", 2, 16
_MOST_ROUNDS = 3
"""Rounds over all loads, since what disturbs a machine lasts for seconds; fewer if they take too
long."""
_MOST_ROWS, _MOST_TOKENS, _LONGEST = 64, 512, 640
_LEAST_STEPS, _SKIPPED = 4, 2
_LONG_STEP_S = 0.25  # one that takes so long is run once: what the first of its kind adds is little
_GREEDY = SamplingRecord(temperature=0.0)


@dataclass(frozen=True, slots=True)
class _Load:
    """A kind of step: sequences alike, each feeding its last `num_new` of `context` tokens."""

    num_sequences: int
    num_new: int
    context: int


_LOADS = (
    *(_Load(rows, 1, context) for context in (64, 512) for rows in (1, 4, 16)),
    *(_Load(rows, 1, 96) for rows in (2, 8, 32, 64)),
    *(_Load(1, tokens, tokens) for tokens in (16, 64, 128, 256, 512)),
    *(_Load(count, 512 // count, 512 // count) for count in (4, 16)),
)


def measure_ops(
    seat: Seat, budget_s: float, say: Callable[[str], None]
) -> tuple[tuple[OpTime, ...], HostTime]:
    """Run the loads and fit every kind of op, and what the host does around them; the same on every
    rank. A collective call of all ranks of `seat`; `budget_s` is for the steps, beside making
    weights.

    What a collective waits for late ranks is left out."""
    config = EngineConfig(
        model_dir=model_directory(_SHAPE),
        tp=seat.world,
        load_format="random",
        num_layers_override=_NUM_LAYERS,
        max_num_seqs=_MOST_ROWS,
        max_num_batched_tokens=_MOST_TOKENS,
        max_model_len=_LONGEST,
        device="cpu" if seat.device == "cpu" else "cuda",
        block_size=_BLOCK,
    )
    assembly = assemble(config, seat, lambda text: say(f"layers of a model: {text}"))
    try:
        say("running layers of a model")
        steps = _Steps(assembly)
        found = steps.run_all(budget_s)
        return _figures(assembly, found), _host_time(assembly, found)
    finally:
        assembly.close()


class _Steps:
    """Runs steps of made-up sequences, whose keys are there already."""

    def __init__(self, assembly: Assembly) -> None:
        self._assembly = assembly
        self._worker = assembly.worker
        self._step_id = 0
        for tensor in assembly.cache.kv.tensors():  # or reads would find one page of zeros
            tensor.fill_(1)

    def run_all(self, budget_s: float) -> list[list[StepRecord]]:
        """Records of each load, in rounds as far as the budget goes, and one at least."""
        found: list[list[StepRecord]] = [[] for _ in _LOADS]
        # What first steps prepare counts for nothing. On a GPU each load may compile kernels, for
        # longer than a step that is run once.
        for load in _LOADS if self._assembly.device.type == "cuda" else _LOADS[:1]:
            self._run(load, 0.0)
        began = perf_counter()
        for done in range(1, _MOST_ROUNDS + 1):
            for load, records in zip(_LOADS, found, strict=True):
                records += self._run(load, budget_s / _MOST_ROUNDS / len(_LOADS))
            of_one_s = (perf_counter() - began) / done
            if self._agreed((done + 1) * of_one_s <= budget_s) < 1:
                break
        return found

    def _run(self, load: _Load, budget_s: float) -> list[StepRecord]:
        """Records of the steps that count. Every rank runs as many: the first ones say how long
        they took it."""
        worker, records = self._worker, []
        self._admit(load)
        count, skipped, began = _SKIPPED + _LEAST_STEPS, _SKIPPED, perf_counter()
        while len(records) < count:
            records += self._step(load)
            if len(records) == 1 and self._agreed(perf_counter() - began < _LONG_STEP_S) < 1:
                count = skipped = 0
            elif len(records) == _SKIPPED + 1:
                spent_s = max(perf_counter() - began, 1e-6)
                count = int(self._agreed(self._steps_within(load, budget_s / spent_s)))
        worker.rows.release(tuple(range(load.num_sequences)))
        return records[skipped:]

    def _steps_within(self, load: _Load, factor: float) -> int:
        """Steps that fit the budget, `factor` times those done so far."""
        most = _LONGEST - load.context - 1 if load.num_new == 1 else 1000
        return min(most, max(_SKIPPED + _LEAST_STEPS, int((_SKIPPED + 1) * factor)))

    def _agreed(self, value: float) -> float:
        """The least of any rank's."""
        return float(min(_everyone(self._assembly, [float(value)])[:, 0]))

    def _admit(self, load: _Load) -> None:
        self._fresh = True
        start = load.context - load.num_new
        for row in range(load.num_sequences):
            tokens = tuple((7 * row + place) % 1000 for place in range(load.context))
            self._worker.admit(SequenceRecord(row, tokens, load.context, start, _GREEDY))

    def _step(self, load: _Load) -> list[StepRecord]:
        """One step more: the next token of each sequence, or the same prompts once again."""
        rows = tuple(range(load.num_sequences))
        if load.num_new > 1 and not self._fresh:
            self._worker.rows.release(rows)
            self._admit(load)
        blocks = -(-_LONGEST // _BLOCK) if load.num_new == 1 else -(-load.context // _BLOCK)
        step = _blocks_of(rows, blocks, self._assembly.limits.num_groups) if self._fresh else ()
        plan = StepPlan(
            self._step_id, rows, (load.num_new,) * len(rows), (1,) * len(rows), new_blocks=step
        )
        self._fresh = False
        self._step_id += 1
        result = self._worker.execute(plan)
        if result.failure is not None:
            raise RankError(f"layers of a model could not run: {result.failure}")
        return self._worker.take_measurements().records


def _blocks_of(
    rows: Sequence[int], num_blocks: int, num_groups: int
) -> tuple[tuple[int, ...], ...]:
    """Blocks of each row; logical block j is of class j mod `num_groups`, since rows begin at
    multiples of it."""
    each = -(-num_blocks // num_groups) * num_groups
    return tuple((row, *range(row * each, row * each + num_blocks)) for row in rows)


def _everyone(assembly: Assembly, values: Sequence[float]) -> torch.Tensor:
    """float64 [ranks, values] on the host."""
    mine = torch.tensor(values, dtype=torch.float64, device=assembly.device)
    found = mine.new_empty(assembly.group.size, len(values))
    if assembly.group.size == 1:
        found[0] = mine
    else:
        assembly.group.all_gather(found, mine)
    return found.cpu()


def _figures(assembly: Assembly, found: Sequence[Sequence[StepRecord]]) -> tuple[OpTime, ...]:
    ledger = assembly.ledger(assembly.seat.rank)
    points: list[OpPoint] = []
    for records in found:
        aggregates = records[0].aggregates
        typical = _typical_seconds(ledger, records)
        by_rank = _everyone(assembly, list(typical.values()))
        for op, times in zip(typical, by_rank.T, strict=True):
            kind, cost = ledger.kind(op), ledger.cost(op, aggregates)
            if kind.is_collective:  # without waiting it takes all about the same
                num_bytes, seconds = cost.bytes_sent, float(times.mean())
            else:
                num_bytes, seconds = cost.bytes_moved, float(times.max())
            rows = aggregates.rows
            tokens = rows if op == "head" else aggregates.tokens
            points.append(OpPoint(kind.value, tokens, rows, num_bytes, cost.flops, seconds))
    return fit_op_times(points, ledger.compute_dtype)


def _host_time(assembly: Assembly, found: Sequence[Sequence[StepRecord]]) -> HostTime:
    """From the decodes; the slowest rank's part, with the scheduler's of rank 0."""
    decodes = [
        (load.num_sequences, around_ops_s(records))
        for load, records in zip(_LOADS, found, strict=True)
        if load.num_new == 1
    ]
    plans = {rows: planning_s(assembly.limits, rows) for rows in dict(decodes)}
    mine = [seconds + plans[rows] for rows, seconds in decodes]
    slowest = _everyone(assembly, mine).max(0).values.tolist()
    return fit_host_time([(rows, s) for (rows, _), s in zip(decodes, slowest, strict=True)])


def _typical_seconds(ledger: CostLedger, records: Sequence[StepRecord]) -> dict[str, float]:
    """An op of each kind and place in a layer -> median time over layers and steps, without what a
    collective waited for others."""
    times: dict[str, list[int]] = {}
    alike: dict[str, str] = {}
    for record in records:
        waits = record.waits_ns or {}
        start = record.ops_start_ns
        starts = record.op_starts_ns or [start, *record.op_ends_ns[:-1]]
        for place, (op, begin, end) in enumerate(
            zip(ledger.op_ids(), starts, record.op_ends_ns, strict=True)
        ):
            first = alike.setdefault(_ending(op), op)
            times.setdefault(first, []).append(end - begin - waits.get(place, 0))
    return {op: statistics.median(found) * 1e-9 for op, found in times.items()}


def _ending(op: str) -> str:
    """`attn.qkv` of `layers.3.attn.qkv`; others as they are."""
    return op.split(".", 2)[2] if op.startswith("layers.") else op
