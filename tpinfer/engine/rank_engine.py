"""The offline engine: requests in, tokens out as they come, and where the time went.

`open_engine` runs on every rank. Rank 0 generates; the others `serve` until rank 0 closes.
"""

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter_ns

from tpinfer.config.engine import EngineConfig, RecordingRequest
from tpinfer.config.errors import ConfigError
from tpinfer.engine.executor import Executor, follow
from tpinfer.engine.metrics import Metrics
from tpinfer.engine.recording import Recording, RunFacts, answer
from tpinfer.engine.requests import GenerationRequest, GenerationResult, TokenEvent
from tpinfer.engine.run_report import RunReport
from tpinfer.launching.seat import Seat
from tpinfer.scheduling.request import Sequence as Running
from tpinfer.scheduling.scheduler import Scheduler
from tpinfer.steps.plan import Command, SamplingRecord
from tpinfer.steps.wire import PlanReader, PlanWriter
from tpinfer.worker.assemble import Assembly, assemble
from tpinfer.worker.capture import Capture

Progress = Callable[[str], None]


class Engine:
    """One rank's engine. Made by `open_engine`."""

    def __init__(self, assembly: Assembly, wire: PlanWriter | PlanReader | None) -> None:
        self._assembly = assembly
        self._worker = assembly.worker
        self._wire = wire
        self._executor = Executor(self._worker, wire if isinstance(wire, PlanWriter) else None)
        self._scheduler = Scheduler(assembly.limits)
        self._metrics = Metrics(assembly)
        self._capture = Capture(assembly.worker)
        self._recording: Recording | None = None
        self._finished: list[Running] = []
        self._stopping = False

    def serve(self) -> None:
        """Follow rank 0 until it closes. For ranks other than 0."""
        assert isinstance(self._wire, PlanReader), "only ranks other than 0 follow"
        follow(self._worker, self._wire, self._answer)

    def generate(self, requests: Sequence[GenerationRequest]) -> Iterator[TokenEvent]:
        """Run `requests` together and yield each token as it reaches the host.

        Requests are checked before the first one runs. Raises ConfigError for one that can never
        run, naming it. Closing the generator, or `stop`, ends what is unfinished with the reason
        `abort`.
        """
        self._finished = []
        self._metrics.forget()
        if self._recording is not None:
            self._recording.before_run()
        accepted_ns = perf_counter_ns()
        sequences = [_sequence(i, r, accepted_ns) for i, r in enumerate(requests)]
        for sequence in sequences:
            self._scheduler.add(sequence)
            self._worker.spans.mark(f"tpinfer.accept request={sequence.index}")
        try:
            while self._scheduler.has_work and not self._stopping:
                for event in self._step():
                    asked_ns = perf_counter_ns()
                    with self._worker.spans.named("detokenize"):
                        yield event
                    self._worker.spans.add("detokenize", asked_ns, perf_counter_ns())
        finally:
            self._scheduler.abort_all()
            self._finished = sequences
            if self._recording is not None:
                self._recording.stop()

    def stop(self) -> None:
        """Make `generate` end after the step in progress. Safe to call from a signal handler."""
        self._stopping = True

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
        if self._wire is not None:
            self._executor.close()
            self._wire = None
        self._assembly.group.close()

    def _step(self) -> list[TokenEvent]:
        if self._recording is not None:
            self._recording.before_step()
        spans = self._worker.spans
        with spans.part("schedule"):
            scheduled = self._scheduler.schedule(perf_counter_ns())
            assert scheduled is not None, "with no step in flight, work always has a step to run"
            for sequence, record in zip(scheduled.admitted, scheduled.records, strict=True):
                spans.mark(f"tpinfer.admit request={sequence.index}")
                self._executor.admit(record)
        sampled = self._executor.execute(scheduled.plan)
        now_ns = perf_counter_ns()
        with spans.part("schedule"):
            news = self._scheduler.commit(scheduled, sampled, now_ns)
            if spans.annotate is not None:
                for sequence, _ in news:
                    place = len(sequence.token_ids) - 1
                    spans.mark(f"tpinfer.token request={sequence.index} index={place}")
        return [TokenEvent(s.index, token, s.finish_reason) for s, token in news]

    def _answer(self, command: Command) -> None:
        """This rank's part of a command from rank 0."""
        if not answer(self._capture, command):
            self._metrics.answer(command)


def open_engine(config: EngineConfig, seat: Seat, progress: Progress | None = None) -> Engine:
    """Load this rank's share and connect the ranks. `progress` is told in words what goes on.

    Raises ConfigError, CheckpointError or RankError; the message says what to change.
    """
    assembly = assemble(config, seat, progress or (lambda text: None))
    try:
        return Engine(assembly, _open_wire(seat))
    except BaseException:
        assembly.group.abort()
        assembly.group.close()
        raise


def _open_wire(seat: Seat) -> PlanWriter | PlanReader | None:
    if seat.world == 1:
        return None
    name = f"{seat.run_id}-g{seat.generation}-plans"
    if seat.rank:
        return PlanReader(name, seat.rank - 1)
    try:
        return PlanWriter(name, seat.world - 1)
    except OSError as error:
        raise ConfigError(
            f"the step plans need about 1 MB of /dev/shm ({error.strerror}); free some there or "
            "give the container more (--shm-size=64m)"
        ) from error


def _sequence(index: int, request: GenerationRequest, accepted_ns: int) -> Running:
    params = request.params
    return Running(
        index=index,
        prompt_token_ids=tuple(request.prompt_token_ids),
        max_tokens=params.max_tokens,
        stop_token_ids=frozenset(() if params.ignore_eos else params.stop_token_ids),
        accepted_ns=accepted_ns,
        sampling=SamplingRecord(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=params.seed if params.seed is not None else index,
        ),
    )
