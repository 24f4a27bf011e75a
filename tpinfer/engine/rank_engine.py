"""One rank's engine: requests in, tokens out as they come, and where the time went.

`open_engine` runs on every rank. Rank 0 takes requests; the others `serve` until rank 0 closes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from time import perf_counter_ns
from typing import TYPE_CHECKING

from tpinfer.config.engine import EngineConfig, RecordingRequest
from tpinfer.config.errors import ConfigError, RankError
from tpinfer.engine.executor import (
    Device,
    Executor,
    InlineDevice,
    StreamDevice,
    ThreadDevice,
    follow,
)
from tpinfer.engine.live import LiveOutput, LiveRequest
from tpinfer.engine.metrics import Metrics
from tpinfer.engine.rebuilds import Rebuilds, call_off, silent_ranks
from tpinfer.engine.recording import Recording, RunFacts, answer
from tpinfer.engine.requests import (
    GenerationRequest,
    GenerationResult,
    TokenEvent,
    which_prompt,
)
from tpinfer.engine.run_report import RunReport
from tpinfer.engine.step_loop import StepLoop, StepOutcome
from tpinfer.engine.step_watch import StepWatch
from tpinfer.launching.seat import Seat
from tpinfer.scheduling.request import Sequence as Running
from tpinfer.scheduling.scheduler import Scheduler
from tpinfer.steps.interface import PlanReader, PlanWriter
from tpinfer.steps.logprobs import TokenLogprobs
from tpinfer.steps.plan import Command
from tpinfer.steps.sampling_record import sampling_record
from tpinfer.steps.wire import open_plan_reader, open_plan_writer
from tpinfer.text.stop_strings import StopStrings
from tpinfer.worker.assemble import Assembly, assemble
from tpinfer.worker.capture import Capture
from tpinfer.worker.worker import Worker

if TYPE_CHECKING:
    from tpinfer.text.tokenizer import Tokenizer

Progress = Callable[[str], None]
NOT_NUMBERS = (
    "the model's logits are not numbers (NaN): its weights hold NaN or infinite values, or they "
    "overflow the compute dtype; check the checkpoint, or try --dtype float32"
)


def _device(worker: Worker, depth: int) -> Device:
    """What runs rank 0's part with `depth` steps on their way."""
    if worker.issues_ahead:
        return StreamDevice(worker)
    return InlineDevice(worker) if depth == 1 else ThreadDevice(worker)


class Engine:
    """One rank's engine. Made by `open_engine`."""

    def __init__(
        self,
        assembly: Assembly,
        wire: PlanWriter | PlanReader | None,
        tokenizer: "Tokenizer | None",
    ) -> None:
        self._assembly = assembly
        self._worker = assembly.worker
        self._wire = wire
        self._tokenizer = tokenizer
        self._recording: Recording | None = None
        self._live: dict[int, LiveOutput] = {}  # by sequence id
        self._finished: list[LiveRequest] = []
        self._metrics = Metrics(assembly)
        self.rebuilds: Rebuilds | None = None
        """Where this process started the other ranks and may start them anew."""
        self._executor = self._make_executor()
        costs = self._metrics.step_costs(self._executor) if assembly.seat.rank == 0 else None
        self._scheduler = Scheduler(assembly.limits, costs)
        self._begin()

    def _make_executor(self) -> Executor:
        writer = self._wire if isinstance(self._wire, PlanWriter) else None
        return Executor(self._worker, _device(self._worker, self._depth), writer)

    @property
    def _depth(self) -> int:
        return self._assembly.config.steps_in_flight or 1

    def _begin(self) -> None:
        """What each generation has anew."""
        config, worker = self._assembly.config, self._worker
        self._loop = StepLoop(self._scheduler, self._executor, worker.spans, self._depth)
        has_thread = self._depth > 1 and not worker.issues_ahead
        self._capture = Capture(worker, all_threads=has_thread)
        self._watch: StepWatch | None = None
        self._late_words = ""  # what was said of a step that was not done in time
        if isinstance(self._wire, PlanWriter):
            first_s = max(config.step_timeout_s, config.wait_timeout_s)
            self._watch = StepWatch(config.step_timeout_s, first_s, self._late)

    @property
    def kv_bytes(self) -> int:
        """Largest KV cache of a rank."""
        return max(memory.kv_bytes for memory in self._assembly.memory_by_rank)

    @property
    def scheduler(self) -> Scheduler:
        """Rank 0's scheduler, to look at."""
        return self._scheduler

    def serve(self) -> bool:
        """Follow rank 0 until it closes, or for now needs nobody (then True). For ranks other than
        0."""
        assert isinstance(self._wire, PlanReader), "only ranks other than 0 follow"
        generation = self._assembly.seat.generation
        return follow(self._worker, self._wire, self._answer, generation)

    def release_followers(self) -> None:
        """Let the other ranks' `serve` return for now. On rank 0, with no work left."""
        self._executor.command(Command("return"))

    def add(self, request: GenerationRequest, index: int) -> LiveRequest:
        """Accept a request under the number `index`. Raises ConfigError for one that can never
        run."""
        live = LiveRequest(index, request, [])
        if request.params.prompt_logprobs is not None:
            live.prompt_logprobs += [None] * len(request.prompt_token_ids)
        params, accepted_ns = request.params, perf_counter_ns()
        params.check_vocab(self._assembly.spec.vocab_size)
        if params.stop and self._tokenizer is None:
            raise ConfigError(
                f"stop={list(params.stop)} needs text, and there is no tokenizer here; use "
                "stop_token_ids"
            )
        family = [_sequence(index, request, sample, accepted_ns) for sample in range(params.n)]
        self._scheduler.add(*family)
        stops = StopStrings(params.stop) if params.stop else None
        live.outputs += [LiveOutput(live, one, self._tokenizer, stops) for one in family]
        self._live |= {output.sequence.id: output for output in live.outputs}
        self._worker.spans.mark(f"tpinfer.accept request={index}")
        return live

    def abort(self, live: LiveRequest) -> list[TokenEvent]:
        """End what is unfinished of a request; its blocks are free for the next plan."""
        events = []
        for output in live.outputs:
            if output.sequence.finish_reason is None:
                self._scheduler.abort(output.sequence)
                events.append(self._ended(output))
        return events

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self._loop.has_work

    def step(self) -> list[TokenEvent]:
        """Run one step and say what it brought."""
        may_plan = self._recording.may_plan if self._recording is not None else None
        try:
            with self._watched():
                outcome = self._loop.step(may_plan)
        except RankError as error:
            self.rebuild(error)
            return []
        events = [] if outcome is None else self._events(outcome)
        if self.rebuilds is not None and any(event.finish_reason for event in events):
            self.rebuilds.progressed()
        return events

    def rebuild(self, error: RankError) -> None:
        """Ranks are dead or hang: start them anew and let what ran begin again, from its tokens so
        far. Raises RankError where that cannot be; a recording goes with its ranks."""
        if self.rebuilds is None or self._recording is not None:
            if self._late_words:  # what this rank met is only what follows from it
                raise RankError(self._late_words) from error
            raise error
        self._let_go()
        self._assembly, self._wire = self.rebuilds.next_generation(error)
        self._worker = self._assembly.worker
        self._metrics.move(self._assembly)
        self._executor = self._make_executor()
        self._scheduler.rebuild()
        self._begin()

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        is_over: Callable[[], bool] = lambda: False,
    ) -> Iterator[TokenEvent]:
        """Run `requests` together and yield each token as it reaches the host.

        Requests are checked before the first one runs. Raises ConfigError for one that can never
        run, naming it. Closing the generator ends what is unfinished with the reason `abort`; so
        does `is_over`, asked before each step.
        """
        self._metrics.forget()
        if self._recording is not None:
            self._recording.before_run(self._loop.num_sent)
        lives: list[LiveRequest] = []
        self._finished = lives
        try:
            for index, request in enumerate(requests):
                with which_prompt(index, len(requests)):
                    lives.append(self.add(request, index))
            while self.has_work and not is_over():
                for event in self.step():
                    asked_ns = perf_counter_ns()
                    with self._worker.spans.named("detokenize"):
                        yield event
                    self._worker.spans.add("detokenize", asked_ns, perf_counter_ns())
        except (KeyboardInterrupt, SystemExit):
            self._loop.forget()  # torn apart somewhere: nothing more can be told from the steps
            raise
        finally:
            for live in lives:
                self.abort(live)
            self._drain()
            if self._recording is not None:
                self._recording.stop(self._loop.num_sent)

    def results(self) -> list[GenerationResult]:
        """What the last `generate` produced, in request order. A collective call: measures are
        gathered."""
        return self._metrics.results(self._finished, self._executor)

    def report(self) -> RunReport:
        """Where the last `generate`'s time went, over all its requests. A collective call like
        `results`."""
        return self._metrics.report(self._finished, self._executor)

    def use_nvtx(self) -> None:
        """Put NVTX ranges around steps, ops and host parts. Every rank calls it. Raises ConfigError
        without the nvtx package."""
        self._capture.use_nvtx()

    def record(self, request: RecordingRequest) -> None:
        """Have the next `generate` record some of its steps. On rank 0, before it."""
        self._recording = Recording(request, self._capture, self._executor)

    def write_recording(self, command: Sequence[str]) -> list[str]:
        """Write what `record` asked for; returns warnings. `command` goes into run.json. A
        collective call like `results`."""
        assert self._recording is not None, "record() comes before write_recording()"
        records, ceilings = self._metrics.records_and_ceilings(self._executor)
        return self._recording.write(self._assembly, ceilings, RunFacts(records, command))

    def close(self) -> None:
        """Let go of ranks, shared memory and connections. Can be called twice."""
        if self._watch is not None:
            self._watch.close()
        if self._wire is not None:
            self._executor.close()
            self._wire = None
        self._assembly.close()

    def _let_go(self) -> None:
        """Close a generation that may be dead already."""
        self._assembly.abort()
        with suppress(RankError):
            self.close()
        self._wire = None
        self._assembly.close()

    def _drain(self) -> None:
        """Take what is on its way for requests that have ended."""
        try:
            with self._watched():
                for outcome in self._loop.drain():
                    self._events(outcome)
        except RankError as error:
            self.rebuild(error)

    def _watched(self) -> AbstractContextManager[None]:
        return nullcontext() if self._watch is None else self._watch.waiting()

    def _late(self, allowed_s: float) -> None:
        """On the watching thread: a step is not done in time."""
        step_id, wire, watch = self._scheduler.oldest_step, self._wire, self._watch
        if not isinstance(wire, PlanWriter) or watch is None:
            return
        ranks = silent_ranks(wire, self._assembly.seat.generation, step_id)
        named = ", ".join(map(str, ranks)) or "0"
        self._late_words = (
            f"step {step_id} is not done after {allowed_s:g} s; not reported by rank {named} "
            "(--step-timeout sets the time)"
        )
        words = f"{self._late_words}: the ranks are ended, stacks follow"
        if self.rebuilds is not None:
            call_off(self._assembly, watch, self.rebuilds.end_ranks, words)
            return
        seat = self._assembly.seat
        # Our own launcher ends ranks within 2 s and names the first that failed, not one we killed.
        ends_others = seat.ends_process and seat.launcher != "tpinfer"
        call_off(self._assembly, watch, None, words, wire.local_pids(ranks) if ends_others else ())

    def _events(self, outcome: StepOutcome) -> list[TokenEvent]:
        began_ns = perf_counter_ns()
        spans = self._worker.spans
        events = []
        with spans.named("detokenize"):
            if outcome.failure is not None:
                for sequence in outcome.failed:
                    self._live[sequence.id].error = outcome.failure
                    events.append(self._ended(self._live[sequence.id]))
            for sequence, first, found in outcome.prompt_logprobs:
                if sequence.id in self._live:
                    self._live[sequence.id].live.prompt_logprobs[first : first + len(found)] = found
            for sequence, token in outcome.drawn:
                events.append(self._drawn(sequence, token, outcome.logprobs.get(sequence.id)))
                spans.mark(
                    f"tpinfer.token request={sequence.index} index={len(sequence.token_ids) - 1}"
                )
        spans.add("detokenize", began_ns, perf_counter_ns())
        return events

    def _drawn(self, sequence: Running, token: int, logprobs: TokenLogprobs | None) -> TokenEvent:
        output = self._live[sequence.id]
        if sequence.finish_reason == "error":
            output.error = NOT_NUMBERS
            return self._ended(output)
        event = output.take(token, logprobs)
        if event.finish_reason is not None:
            if sequence.finish_reason is None:
                self._scheduler.finish(sequence, event.finish_reason)
            del self._live[sequence.id]
        return event

    def _ended(self, output: LiveOutput) -> TokenEvent:
        """The last event of a sequence that drew nothing more."""
        del self._live[output.sequence.id]
        return output.end()

    def _answer(self, command: Command) -> None:
        """This rank's part of a command from rank 0."""
        if not answer(self._capture, command):
            self._metrics.answer(command)


def open_engine(
    config: EngineConfig,
    seat: Seat,
    progress: Progress | None = None,
    tokenizer: "Tokenizer | None" = None,
) -> Engine:
    """Load this rank's share and connect the ranks. `progress` is told in words what goes on;
    rank 0 makes text with `tokenizer`.

    Raises ConfigError, CheckpointError or RankError; the message says what to change.
    """
    assembly, wire = open_parts(config, seat, progress)
    try:
        return Engine(assembly, wire, tokenizer)
    except BaseException:
        assembly.abort()
        assembly.close()
        raise


def open_parts(
    config: EngineConfig, seat: Seat, progress: Progress | None = None
) -> tuple[Assembly, PlanWriter | PlanReader | None]:
    """This rank's share and its end of the wire. Raises like `open_engine`."""
    assembly = assemble(config, seat, progress or (lambda text: None))
    try:
        return assembly, open_plan_reader(seat) if seat.rank else open_plan_writer(seat)
    except BaseException:
        assembly.abort()
        assembly.close()
        raise


def _sequence(index: int, request: GenerationRequest, sample: int, accepted_ns: int) -> Running:
    params = request.params
    seed = params.seed if params.seed is not None else index
    return Running(
        index=index,
        prompt_token_ids=tuple(request.prompt_token_ids),
        sampling=sampling_record(params, sample, seed),
        max_tokens=params.max_tokens,
        stop_token_ids=frozenset(() if params.ignore_eos else params.stop_token_ids),
        priority=request.priority,
        cache_salt=request.cache_salt,
        needs_whole_prompt=params.prompt_logprobs is not None,
        accepted_ns=accepted_ns,
    )
