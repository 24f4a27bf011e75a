"""One rank at work: takes records and plans, runs the program, keeps what it measured.

It knows neither how it was started nor how plans reach it. Where this rank alone cannot do a step
(no memory left), it says so before the step's last collective and joins the collectives that are
left, so that nobody waits for it and rank 0 knows in time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter_ns

import torch

from tpinfer.attention.host_tier import HostTier
from tpinfer.attention.paged_kv import PagedKV
from tpinfer.collectives.group import Group
from tpinfer.costs.graph_nodes import GraphNodes
from tpinfer.costs.ops import StepAggregates
from tpinfer.costs.step_record import Measurements, StepRecord
from tpinfer.layers.step_inputs import Activations, Op, StepInputs
from tpinfer.steps.logprobs import TokenLogprobs
from tpinfer.steps.plan import SequenceRecord, StepPlan
from tpinfer.steps.sampling_record import is_plain_greedy
from tpinfer.worker.annotations import Annotate, annotated, step_name
from tpinfer.worker.device_run import DeviceClock, DeviceRun
from tpinfer.worker.graphs import RecordedStep, RecordedSteps
from tpinfer.worker.host_run import HostRun
from tpinfer.worker.host_spans import HostSpans
from tpinfer.worker.rows import RowStore
from tpinfer.worker.step_log import StepLog
from tpinfer.worker.timing import DeviceStamps, OpFailure, OpTimes, WaitStamps

Finish = Callable[[], "StepResult"]
"""Waits for a step that was issued."""
TellFailure = Callable[[int, str], None]
"""(step id, what happened): tells rank 0 that this rank could not do a step but lives on."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step came to on one rank."""

    tokens: list[int]
    """Sampled tokens in plan order; NO_TOKEN where the logits were not numbers. Empty if it
    failed."""
    logprobs: Sequence[TokenLogprobs | None] = ()
    """Parallel to `tokens`; empty where nobody asked."""
    prompt_logprobs: Sequence[tuple[int, int, Sequence[TokenLogprobs]]] = ()
    """(row, position of the first, those of its prompt tokens from there), where asked for."""
    failure: str | None = None
    """Why this rank could not do it."""


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """What `assemble` made for one rank."""

    program: Sequence[Op]
    rows: RowStore
    kv: PagedKV
    host_blocks: HostTier | None
    group: Group
    device: torch.device
    collective_sites: Mapping[str, Group] = field(default_factory=dict)
    """Ids of the ops in which ranks wait for each other, and the group of those ranks."""
    max_num_rows: int = 1
    steps_in_flight: int = 1
    """Steps that may be issued before the first of them has run."""


class Worker:
    """Runs steps and records when each op ran."""

    def __init__(self, parts: WorkerParts) -> None:
        self._stamps: WaitStamps | None = None
        self.program = parts.program
        if parts.group.size > 1 and parts.group.last_wait_ns is not None:
            self._stamps = WaitStamps(parts.program, parts.collective_sites)
            self.program = self._stamps.program
        self._device_stamps: DeviceStamps | None = None
        if parts.group.stamps is not None:
            self._device_stamps = DeviceStamps(parts.program, parts.collective_sites, parts.group)
            self.program = self._device_stamps.program
        self._sites = parts.collective_sites
        self._kv = parts.kv
        self._host_blocks = parts.host_blocks
        self.rows = parts.rows
        self.group = parts.group
        self.device = parts.device
        self._log = StepLog()
        self.spans = HostSpans()
        self.tell_failure: TellFailure = lambda step_id, text: None
        self._recorded_from_ns = 0
        self._annotate: Annotate | None = None
        self._annotated_program: Sequence[Op] = ()  # for devices, where ops are only issued
        self._recorded: RecordedSteps | None = None
        self._num_issued = self._ended_ns = 0
        num_runs = parts.steps_in_flight + 1
        self._runs: list[HostRun] | list[DeviceRun] = [HostRun() for _ in range(num_runs)]
        self.issues_ahead = parts.device.type == "cuda"
        """Whether `issue` returns before the step has run."""
        if self.issues_ahead:
            clock, count = DeviceClock(), len(parts.program)
            self._runs = [DeviceRun(count, parts.max_num_rows, clock) for _ in range(num_runs)]

    def admit(self, record: SequenceRecord) -> None:
        """Open a row for a sequence."""
        self.rows.admit(record)

    def annotate(self, annotate: Annotate | None) -> None:
        """Name steps, ops and host parts to a recorder from now on; None stops it."""
        self._annotate = self.spans.annotate = annotate
        self._annotated_program = annotated(self.program, annotate) if annotate else ()

    def use_recorded(self, steps: RecordedSteps) -> None:
        """Replay these where they can run a step."""
        self._recorded = steps

    def forget_recorded(self) -> None:
        """Let the recordings go. NCCL does not end a communicator that one of them uses."""
        self._recorded = None
        for run in self._runs:
            run.forget_recorded()

    def graph_nodes(self) -> GraphNodes | None:
        """Which op each kernel of the recordings was made for; None where nobody knows."""
        return None if self._recorded is None else self._recorded.nodes(self.group.rank)

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step."""
        return self.issue(plan)()

    @torch.inference_mode()
    def issue(self, plan: StepPlan) -> Finish:
        """Start one step; what is returned waits for its result. On a CPU the step has run by then,
        on a GPU later ones may be issued meanwhile, and are finished in order."""
        began = perf_counter_ns()
        self.rows.release(plan.released_rows)
        aggregates = self.rows.aggregates(plan)
        if self._annotate is None:
            return self._issue(plan, aggregates, began)
        with self._annotate(step_name(plan.step_id, _phase(plan), aggregates)):
            return self._issue(plan, aggregates, began)

    def _issue(self, plan: StepPlan, aggregates: StepAggregates, began: int) -> Finish:
        recorded = self._recorded.find(plan) if self._recorded is not None else None
        if recorded is not None:
            return self._replay(plan, aggregates, began, recorded)
        with self.spans.named("prepare"):
            self._move_blocks(plan)
            inputs = self.rows.build(plan)
        acts, run = Activations(), self._next_run()
        try:
            run.issue(self._named_program, acts, inputs, self._annotate)
        except OpFailure as failure:
            result = self._sit_out(plan, inputs, failure)
            return lambda: result
        self.rows.keep_tokens(inputs, acts.tokens)
        run.fetch(acts.tokens, self._waits)

        def finish() -> StepResult:
            tokens = run.tokens(acts.tokens.shape[0])
            self._keep_record(plan, aggregates, run, began)
            prompts = zip(inputs.prompt_rows, acts.prompt_logprobs, strict=True)
            told = [(row.row, row.position, logprobs) for row, logprobs in prompts]
            return StepResult(tokens, acts.logprobs, told)

        return finish

    def _replay(
        self, plan: StepPlan, aggregates: StepAggregates, began: int, recorded: RecordedStep
    ) -> Finish:
        with self.spans.named("prepare"):
            self._move_blocks(plan)
            sampling = self.rows.stage(plan, recorded.num_rows)
        count, acts, run = len(sampling), Activations(), self._next_run()
        acts.logprobs = []
        if all(is_plain_greedy(row.record) for row in sampling):
            run.replay(recorded)
            run.fetch(recorded.tokens, self._waits)
        else:
            inputs = self.rows.drawing_inputs(sampling)
            acts.logits = recorded.logits[:count]
            run.replay_model(recorded, self._named_program, acts, inputs)
            self.rows.keep_tokens(inputs, acts.tokens)
            run.fetch(acts.tokens, self._waits)

        def finish() -> StepResult:
            tokens = run.tokens(count)
            self._keep_record(plan, aggregates, run, began)
            return StepResult(tokens, acts.logprobs)

        return finish

    @property
    def _named_program(self) -> Sequence[Op]:
        """What a run goes through; on a device the ops' names are in it."""
        is_named = self.issues_ahead and self._annotate is not None
        return self._annotated_program if is_named else self.program

    @property
    def _waits(self) -> torch.Tensor | None:
        """What a step's collectives leave on the device."""
        return None if self._device_stamps is None else self._device_stamps.waits

    def _next_run(self) -> HostRun | DeviceRun:
        self._num_issued += 1
        return self._runs[self._num_issued % len(self._runs)]

    def _keep_record(
        self, plan: StepPlan, aggregates: StepAggregates, run: HostRun | DeviceRun, began: int
    ) -> None:
        times = run.resolve()
        # On a device a step may be prepared while the one before it runs: steps do not overlap.
        start_ns, self._ended_ns = max(began, self._ended_ns), run.end_ns
        self.spans.add("prepare", began, max(began, times.start_ns))
        record = _record(plan, aggregates, times, run.end_ns, start_ns)
        if self._stamps is not None:
            record = replace(record, waits_ns=self._stamps.take())
        if self._device_stamps is not None:
            record = replace(record, waits_ns=self._device_stamps.named(run.waits()))
        kept_from_ns = self._log.add(record)
        if kept_from_ns is not None:
            self._recorded_from_ns = kept_from_ns
            self.spans.forget_before(kept_from_ns)

    def _move_blocks(self, plan: StepPlan) -> None:
        """In the order that `StepPlan` promises."""
        if self._host_blocks is not None:
            if plan.to_host:
                self._host_blocks.save(plan.to_host)
            if plan.from_host:
                self._host_blocks.fetch(plan.from_host)
        if plan.copies:
            self._kv.copy_blocks(plan.copies)

    def _sit_out(self, plan: StepPlan, inputs: StepInputs, failure: OpFailure) -> StepResult:
        """This rank has no memory for the step: say so, then take part in what is left of it with
        empty hands. Raises the cause where that cannot be: another kind of error, or one inside a
        collective, behind the last, or between those of the sampler."""
        cause = failure.__cause__
        assert cause is not None, "a failed op has a cause"
        op, left = self.program[failure.place], self.program[failure.place + 1 :]
        is_joined = not self._sites or _can_join(left, self._sites)
        if not is_out_of_memory(cause) or op.id in self._sites or not is_joined:
            raise cause
        text = f"out of memory in {op.id} of a step of {inputs.token_ids.shape[0]} tokens"
        self.tell_failure(plan.step_id, f"{text}; lower --max-num-batched-tokens or --kv-bytes")
        acts, whole = Activations(), False
        for other in left if self._sites else ():
            if other.blank is not None:
                other.blank(acts, inputs)
                whole = whole or other.id not in self._sites
            if whole or other.id in self._sites:
                other.call(acts, inputs)
        if self._stamps is not None:
            self._stamps.forget()
        # The next step may be on its way and feed what this one should have drawn: any token will
        # do, but what lies there now may be none.
        self.rows.keep_tokens(inputs, torch.zeros_like(inputs.drawn))
        if self.issues_ahead:  # the next step fills the columns that this one reads
            torch.cuda.synchronize(self.device)
        return StepResult(
            [], failure=f"{text}: {str(cause).splitlines()[0] if str(cause) else 'no room'}"
        )

    def take_measurements(self) -> Measurements:
        """What was recorded since the last call; recording goes on."""
        taken = Measurements(
            self.group.rank, self._log.take(), self.spans.take(), self._recorded_from_ns
        )
        self._recorded_from_ns = 0
        return taken


def _can_join(left: Sequence[Op], sites: Mapping[str, Group]) -> bool:
    """Whether the ops left hold collectives, and each can be given empty input."""
    is_whole = found = False
    for op in left:
        if op.id in sites:
            if op.blank is None and not is_whole:
                return False
            found = True
        elif op.blank is not None:
            is_whole = True
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an op found no memory: Python's, a GPU allocator's or the CPU allocator's word."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _record(
    plan: StepPlan, aggregates: StepAggregates, times: OpTimes, end_ns: int, start_ns: int
) -> StepRecord:
    return StepRecord(
        step_id=plan.step_id,
        kind=_phase(plan),
        aggregates=aggregates,
        start_ns=start_ns,
        end_ns=end_ns,
        ops_start_ns=times.start_ns,
        op_ends_ns=times.ends_ns,
        op_starts_ns=times.starts_ns,
    )


def _phase(plan: StepPlan) -> str:
    """A row that feeds several tokens, or draws none, is still in its prompt."""
    prompts = sum(count > 1 or not samples for _, count, samples in plan.parts())
    if not prompts:
        return "decode"
    return "prefill" if prompts == len(plan.rows) else "mixed"
