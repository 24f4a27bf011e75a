"""What the host of one rank does, as a list of actions: the program that the simulator executes."""

from dataclasses import dataclass, field, replace

from tests.traces.kernels import (
    COMM_STREAM,
    COMPUTE_STREAM,
    HIDDEN,
    VOCABULARY,
    DeviceWork,
    WorkFactory,
)
from tests.traces.scenario import Scenario


@dataclass(frozen=True, slots=True)
class Busy:
    """The host computes."""

    ns: int


@dataclass(frozen=True, slots=True)
class Push:
    """A range begins. `kind`: `step`, `host`, `op`, `layer`, `operator`."""

    kind: str
    label: str
    work: DeviceWork | None = None
    """What an `operator` or `op` is for."""


@dataclass(frozen=True, slots=True)
class Pop:
    """The innermost range ends."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment: `accept`, `admit`, `token`."""

    kind: str
    index: int = 0


@dataclass(frozen=True, slots=True)
class Launch:
    """One call that puts rows on streams: more than one row for a replayed graph."""

    work: tuple[DeviceWork, ...]
    call_ns: int
    ready_ns: int
    """From the start of the call until the device could start the first row."""
    is_graph: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """An event is put on a stream."""

    stream: int
    event: str


@dataclass(frozen=True, slots=True)
class Await:
    """A stream waits for an event of another."""

    stream: int
    event: str


@dataclass(frozen=True, slots=True)
class Synchronize:
    """The host waits for a stream."""

    stream: int


@dataclass(frozen=True, slots=True)
class SynchronizeEvent:
    """The host waits for an event."""

    event: str


@dataclass(frozen=True, slots=True)
class Publish:
    """Rank 0 tells the others what the step is."""

    step: int


@dataclass(frozen=True, slots=True)
class Receive:
    """The others wait for it."""

    step: int


Action = (
    Busy
    | Push
    | Pop
    | Mark
    | Launch
    | Record
    | Await
    | Synchronize
    | SynchronizeEvent
    | Publish
    | Receive
)


@dataclass
class ProgramBuilder:
    """Builds one rank's program."""

    scenario: Scenario
    rank: int
    actions: list[Action] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.make = WorkFactory(self.scenario, self.rank)

    def build(self) -> list[Action]:
        """All steps, and the life of one request around them."""
        self._busy(2000, 9000)
        if self.rank == 0:
            self.actions.append(Mark("accept"))
            self._busy(40_000, 60_000)
        for step in range(self.scenario.num_steps):
            self._step(step)
        if self.scenario.is_async:
            self._read_tokens(self.scenario.num_steps - 1)
        self._busy(5000, 9000)
        return self.actions

    def _step(self, step: int) -> None:
        prefill = step == 0
        tokens = self.scenario.prompt_tokens if prefill else self.scenario.batch
        self._agree(step)
        self.actions.append(Push("step", f"{step} {'prefill' if prefill else 'decode'} {tokens}"))
        self._host_part("prepare", 20_000, 40_000)
        self._launch(self.make.copy("h2d", 4 * tokens))
        if self.scenario.has_broadcast and not prefill:
            self._operator(self.make.collective("broadcast", "broadcast", 4096))
        body = [self._layer(step, tokens, layer) for layer in range(self.scenario.num_layers)]
        body.append(self._head(tokens))
        if self.scenario.is_graph and not prefill:
            self._replay(step, [work for part in body for work in part])
        else:
            self._eager(step, body)
        self._launch(self.make.plain("sample", self.scenario.batch))
        self._launch(self.make.copy("d2h", 8 * self.scenario.batch))
        if self.scenario.is_async:
            self.actions += [Record(COMPUTE_STREAM, f"tokens {step}"), Pop()]
            if step:
                self._read_tokens(step - 1)
            return
        self.actions.append(Synchronize(COMPUTE_STREAM))
        self._host_part("sample", 4000, 9000)
        if self.rank == 0:
            self.actions.append(Mark("token", step))
        self._busy(1000, 2000)
        self.actions.append(Pop())
        if self.rank == 0:
            self._host_part("detokenize", 10_000, 20_000)

    def _read_tokens(self, step: int) -> None:
        """What follows the launches of the next step where steps overlap."""
        self.actions.append(SynchronizeEvent(f"tokens {step}"))
        self._busy(1000, 2000)
        if self.rank == 0:
            self.actions.append(Mark("token", step))
            self._host_part("detokenize", 10_000, 20_000)

    def _agree(self, step: int) -> None:
        if self.rank:
            self.actions += [Push("host", "plan_wait"), Receive(step), Pop()]
            return
        self._host_part("schedule", 15_000, 30_000)
        if step == 0:
            self.actions.append(Mark("admit"))
        self.actions.append(Publish(step))

    def _layer(self, step: int, tokens: int, layer: int) -> list[DeviceWork]:
        """Rows of one layer in order of launch."""
        make, scenario = self.make, self.scenario
        message = tokens * HIDDEN * 2
        late = sum(
            delay.ns
            for delay in scenario.delays
            if delay.where == "kernel" and delay.strikes(self.rank, step, layer)
        )
        role = {"nccl": "all_reduce", "custom": "custom_all_reduce"}.get(scenario.collective)
        rows = [
            replace(make.plain("norm", tokens, layer), late_ns=scenario.late_start_ns),
            make.product("qkv", tokens, layer),
            make.plain("attention", tokens, layer),
            make.product("out", tokens, layer, late),
        ]
        if scenario.tp > 1:
            reduce = make.collective("allreduce", role or "fused_all_reduce", message, layer)
            rows.append(replace(reduce, stream=COMM_STREAM) if scenario.is_hidden else reduce)
        rows += [
            make.product("shared", tokens, layer),
            make.product("router", min(tokens, 64), layer),
            make.product("thin", min(tokens, 64), layer),
            make.product("gate_up", tokens, layer),
            make.plain("act", tokens, layer),
            make.product("down", tokens, layer),
        ]
        if scenario.tp > 1:
            rows.append(make.collective("allreduce", role or "all_reduce", message, layer))
        return rows

    def _head(self, tokens: int) -> list[DeviceWork]:
        rows = [
            self.make.plain("norm", tokens),
            self.make.product("head", self.scenario.batch, -1),
        ]
        if self.scenario.tp > 1:
            logits = self.scenario.batch * VOCABULARY * 2
            rows.append(self.make.collective("allgather", "all_gather", logits))
        return rows

    def _eager(self, step: int, body: list[list[DeviceWork]]) -> None:
        """One launch a row, inside the operator that asks for it."""
        hidden = False
        for index, part in enumerate(body):
            self.actions.append(Push("layer", str(index)))
            for work in part:
                if hidden and work.role == "gate_up":
                    self.actions.append(Await(COMPUTE_STREAM, "comm"))
                    hidden = False
                if work.collective:
                    self._delay_host(step, work.layer)
                if work.stream == COMM_STREAM:
                    self.actions += [Record(COMPUTE_STREAM, "ready"), Await(COMM_STREAM, "ready")]
                self._operator(work)
                if work.stream == COMM_STREAM:
                    self.actions.append(Record(COMM_STREAM, "comm"))
                    hidden = True
            self.actions.append(Pop())

    def _operator(self, work: DeviceWork) -> None:
        label = f"layers.{work.layer}.{work.role}" if work.layer >= 0 else work.role
        self.actions.append(Push("op", label, work))
        self._busy(200, 600)
        self.actions.append(Push("operator", work.role, work))
        typical = self.scenario.operator_ns
        self._busy(typical // 2, typical * 3 // 2)
        self._launch(work)
        self._busy(150, 300)
        self.actions.append(Pop())
        self._busy(100, 300)
        self.actions.append(Pop())

    def _replay(self, step: int, rows: list[DeviceWork]) -> None:
        self._delay_host(step, 0)
        nodes = tuple(
            replace(work, gap_ns=self.make.between(300, 900) if index else 0, product=None)
            for index, work in enumerate(rows)
        )
        nodes = tuple(
            replace(work, leaf="unmodelled")
            if work.leaf in ("compute", "memory", "latency")
            else work
            for work in nodes
        )
        call = self.make.between(9000, 14_000)
        self.actions.append(Launch(nodes, call, call + self.make.between(-600, 700), True))

    def _launch(self, work: DeviceWork) -> None:
        typical = self.scenario.launch_ns
        call = self.make.between(typical * 4 // 5, typical * 6 // 5)
        self.actions.append(Launch((work,), call, call + self.make.between(-600, 700)))

    def _delay_host(self, step: int, layer: int) -> None:
        for delay in self.scenario.delays:
            if delay.where == "host" and delay.strikes(self.rank, step, layer):
                self.actions.append(Busy(delay.ns))

    def _host_part(self, part: str, least: int, most: int) -> None:
        self.actions.append(Push("host", part))
        self._busy(least, most)
        self.actions.append(Pop())

    def _busy(self, least: int, most: int) -> None:
        self.actions.append(Busy(self.make.between(least, most)))
