"""Decode steps recorded once and replayed: one launch instead of one for every op.

A recording is made for a number of rows, each of which feeds one token. It has two parts: the
model, from the tokens' gathering to the logits; and the draw of the likeliest tokens, down to where
the next step finds them. A step of fewer rows replays the next larger recording with padded rows.
Where rows draw otherwise the model is replayed, and the ops behind it run one by one, on the step's
rows alone. Steps with prompts run op by op.

Nothing inside a recording may ask the device and wait: recordings are made in a mode in which that
fails at once, and a step that cannot be recorded says so in the run's choices.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from tpinfer.costs.graph_nodes import GraphNodes, OpKernels, graph_nodes
from tpinfer.layers.step_inputs import Activations, Op, StepInputs
from tpinfer.steps.plan import StepPlan
from tpinfer.worker.graph_nodes import NodeWatch, load_driver
from tpinfer.worker.rows import RowStore

Replay = Callable[[], None]
Mark = Callable[[], None]

_WARM_UPS = 2
_TIMED = 3
_FINE, _COARSE_FROM = (1, 2, 4), 8


@dataclass(frozen=True, slots=True)
class Recorded:
    """What was recorded of one call."""

    replay: Replay
    kernels: Sequence[Sequence[str]] | None = None
    """Name patterns (`costs.graph_nodes`) of the kernels in front of each of the call's marks, and
    of those behind the last; None where nobody told."""


class Recorder(Protocol):
    """What records and replays; on a GPU `CudaRecorder`."""

    def record(self, call: Callable[[Mark], None]) -> Recorded:
        """Record what `call` launches, without running it."""
        ...

    def op_shares(self, call: Callable[[Mark], None], num_ops: int) -> list[float]:
        """Share of a replay's time that is over when `call` marks for the first, second, ... time;
        it marks once at its start and `num_ops` times behind. The last one is 1."""
        ...


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """One recording."""

    num_rows: int
    model: Replay
    greedy: Replay
    logits: torch.Tensor
    """float32 [num_rows, local columns] on the device, behind `model`."""
    tokens: torch.Tensor
    """int64 [num_rows] on the device, behind `greedy`: -1 where logits were not numbers."""
    model_shares: tuple[float, ...]
    """Share of the model's time that is over at the end of each op, measured when it was recorded:
    a replay is launched whole, and only its two ends are timed each time."""
    greedy_shares: tuple[float, ...]
    """The same of the ops behind."""
    model_kernels: tuple[OpKernels, ...]
    """Kernels that were recorded for each op, in order; empty where the recorder does not tell."""
    greedy_kernels: tuple[OpKernels, ...]
    """The same of the ops behind."""

    @property
    def num_model_ops(self) -> int:
        """Ops of the program up to the logits."""
        return len(self.model_shares)


def row_counts(max_num_rows: int) -> tuple[int, ...]:
    """Rows that steps are recorded for: 1, 2, 4, then every 8th up to 64, every 16th to 256, every
    64th beyond, and the most rows of a step. Padding then costs little beside what it saves."""
    counts = [*_FINE]
    count = _COARSE_FROM
    while count < max_num_rows:
        counts.append(count)
        count += 8 if count < 64 else 16 if count < 256 else 64
    return tuple(sorted({*(c for c in counts if c < max_num_rows), max_num_rows}))


class RecordedSteps:
    """The recordings of one rank."""

    def __init__(self, program: Sequence[Op], rows: RowStore, recorder: Recorder) -> None:
        self._program = program
        self._rows = rows
        self._recorder = recorder
        self._steps: list[RecordedStep] = []
        self._counts: list[int] = []

    def record(self, counts: Sequence[int]) -> None:
        """Record for each number of rows, the largest first, so that the others fit into its
        memory. Every rank records the same ones at the same time: collectives run before they are
        recorded. Raises what the device raises where a step cannot be recorded."""
        for count in sorted(counts, reverse=True):
            self._steps.append(self._one(count))
        self._steps.reverse()
        self._counts = [step.num_rows for step in self._steps]

    def find(self, plan: StepPlan) -> RecordedStep | None:
        """The recording that can run a plan, or None."""
        place = bisect_left(self._counts, len(plan.rows))
        if not plan.rows or place == len(self._counts) or not self._rows.can_record(plan):
            return None
        return self._steps[place]

    def nodes(self, rank: int) -> GraphNodes | None:
        """Which op each recorded kernel was made for; None where the recorder does not tell."""
        told = [step for step in self._steps if step.model_kernels]
        parts = [(step.num_rows, "model", step.model_kernels) for step in told]
        parts += [(step.num_rows, "draw", step.greedy_kernels) for step in told]
        return graph_nodes(rank, parts) if parts else None

    def __len__(self) -> int:
        return len(self._steps)

    def _one(self, num_rows: int) -> RecordedStep:
        rows, program = self._rows, self._program
        tokens = torch.zeros(num_rows, dtype=torch.int64, device=rows.device)
        split = 1 + next(i for i, op in enumerate(program) if op.id == "head")
        acts = Activations()
        inputs: list[StepInputs] = []

        def model(mark: Mark) -> None:
            inputs[:] = [rows.recorded_inputs(num_rows)]
            mark()
            for op in program[:split]:
                op.call(acts, inputs[0])
                mark()

        def greedy(mark: Mark) -> None:
            for op in program[split:]:
                op.call(acts, inputs[0])
                mark()
            rows.keep_tokens(inputs[0], acts.tokens)
            tokens.copy_(acts.tokens)

        def both(mark: Mark) -> None:
            model(mark)
            greedy(mark)

        rows.stage(None, num_rows)
        for _ in range(_WARM_UPS):  # what is compiled, tuned or connected at a first call
            both(_nothing)
        ends = self._recorder.op_shares(both, len(program))
        recorded, drawn = self._recorder.record(model), self._recorder.record(greedy)
        ids = [op.id for op in program]
        return RecordedStep(
            num_rows,
            recorded.replay,
            drawn.replay,
            acts.logits,
            tokens,
            tuple(shares_of(ends[:split])),
            tuple(shares_of([end - ends[split - 1] for end in ends[split:]])),
            _kernels(["", *ids[:split], ""], recorded.kernels),
            _kernels([*ids[split:], ""], drawn.kernels),
        )


class CudaRecorder:
    """CUDA graphs that share one pool of memory: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._driver = load_driver()
        # A pool whose last graph has died takes no other: this one stays.
        self._keeper = self._captured(lambda: torch.zeros(1, device=device))

    def record(self, call: Callable[[Mark], None]) -> Recorded:
        """As `Recorder.record`. Other threads may use the device meanwhile: NCCL's watchdog asks it
        for its events."""
        if self._driver is None:
            return Recorded(self._captured(partial(call, _nothing)).replay)
        watch = NodeWatch(self._driver, self._stream.cuda_stream)

        def watched() -> None:
            call(watch.mark)
            watch.mark()

        return Recorded(self._captured(watched).replay, watch.parts())

    def _captured(self, call: Callable[[], object]) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            call()
        torch.cuda.synchronize(self._device)
        return graph

    def op_shares(self, call: Callable[[Mark], None], num_ops: int) -> list[float]:
        """As `Recorder.op_shares`, from a recording of its own with an event behind every op."""
        events = [torch.cuda.Event(enable_timing=True, external=True) for _ in range(num_ops + 1)]
        places = iter(events)
        graph = self._captured(lambda: call(lambda: next(places).record()))
        best: list[float] | None = None
        for _ in range(_TIMED):
            graph.replay()
            torch.cuda.synchronize(self._device)
            times = [events[0].elapsed_time(event) for event in events[1:]]
            if best is None or times[-1] < best[-1]:
                best = times
        assert best is not None, "at least one replay was timed"
        return shares_of(best)


def shares_of(ends: Sequence[float]) -> list[float]:
    """Rising end times as shares of the last."""
    whole = ends[-1]
    if whole <= 0:
        return [(i + 1) / len(ends) for i in range(len(ends))]
    found, last = [], 0.0
    for end in ends:
        last = max(last, end / whole)
        found.append(min(last, 1.0))
    return found


def _kernels(
    op_ids: Sequence[str], patterns: Sequence[Sequence[str]] | None
) -> tuple[OpKernels, ...]:
    """Of each op; empty where nothing was told."""
    if patterns is None:
        return ()
    return tuple(OpKernels(*one) for one in zip(op_ids, patterns, strict=True))


def _nothing() -> None:
    """Nobody times this run."""
