"""A device for scheduler tests that keeps, per KV slot, *what* it holds: the token and everything
before it. It does what a plan says, as a rank would, and checks that every key a query attends to
is the right one. Beside it a sequence run alone, and a loop that drives both."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tpinfer.costs.ops import StepAggregates
from tpinfer.scheduling.draft import Scheduled
from tpinfer.scheduling.limits import SchedulerLimits
from tpinfer.scheduling.request import NO_TOKEN, Sequence
from tpinfer.scheduling.scheduler import Scheduler
from tpinfer.steps.plan import decode, encode

VOCABULARY = 40
STOP_TOKEN = 7
NEVER_STOPS = frozenset[int]()
LAST_STEP = 100_000


def limits(**changes: object) -> SchedulerLimits:
    """Small ones."""
    values: dict[str, object] = {
        "block_size": 4,
        "num_blocks": 16,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 8,
        "max_model_len": 64,
    }
    return SchedulerLimits(**(values | changes))  # pyright: ignore[reportArgumentType]


def sequence(
    prompt: int | tuple[int, ...], max_tokens: int = 4, accepted_ns: int = 0, **changes: object
) -> Sequence:
    """A request; a number stands for a prompt of so many tokens 100, 101 ..."""
    tokens = tuple(range(100, 100 + prompt)) if isinstance(prompt, int) else prompt
    stops = frozenset({STOP_TOKEN})
    return Sequence(0, tokens, max_tokens, stops, accepted_ns, **changes)  # pyright: ignore


def root(one: Sequence) -> int:
    """What stands before a sequence's first token."""
    return hash((one.cache_salt, one.adapter))


def draw(content: int, index: int) -> int:
    """The token drawn behind `content` by continuation `index`."""
    return hash((content, index)) % VOCABULARY


def alone(one: Sequence) -> list[int]:
    """The tokens a sequence generates when it has the machine to itself."""
    content, found = root(one), list[int]()
    for token in one.prompt_token_ids:
        content = hash((content, token))
    while len(found) < one.max_tokens:
        found.append(draw(content, one.sampling.index))
        content = hash((content, found[-1]))
        if found[-1] in one.stop_token_ids:
            break
    return found


@dataclass
class FakeCosts:
    """Prices that a test chooses."""

    token_ns: int = 1
    block_ns: int = 1
    window: int | None = None

    def step_ns(self, sums: StepAggregates) -> int:
        """By tokens alone."""
        return self.token_ns * sums.tokens

    def recompute_ns(self, num_tokens: int) -> int:
        """The same."""
        return self.token_ns * num_tokens

    def swap_ns(self, num_blocks: int) -> int:
        """By blocks alone."""
        return self.block_ns * num_blocks


@dataclass
class _Row:
    tokens: list[int]
    num_computed: int
    contents: list[int]
    index: int
    is_broken: bool
    table: list[int] = field(default_factory=list)
    num_dropped: int = 0


class ModelDevice:
    """All ranks of a group as one."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self._limits = limits
        self.rows: dict[int, _Row] = {}
        self.blocks: list[dict[int, int]] = [{} for _ in range(limits.num_blocks)]
        self.host: list[dict[int, int]] = [{} for _ in range(limits.num_host_blocks)]
        self.num_query_tokens = 0
        self.last_step = -1

    def run(self, scheduled: Scheduled, is_broken: Callable[[Sequence], bool]) -> list[int]:
        """Do one step; returns the tokens drawn, NO_TOKEN for a sequence that `is_broken`."""
        plan = decode(encode(scheduled.plan))
        assert plan == scheduled.plan
        assert scheduled.plan.step_id > self.last_step
        self.last_step = scheduled.plan.step_id
        for record, one in zip(scheduled.records, scheduled.admitted, strict=True):
            assert len(record.token_ids) == one.num_tokens
            self.rows[record.row] = _Row(
                list(record.token_ids),
                record.num_computed,
                _contents(root(one), record.token_ids),
                record.sampling.index,
                is_broken(one),
            )
        self._move(scheduled)
        return self._compute(scheduled)

    def _move(self, scheduled: Scheduled) -> None:
        plan, groups = scheduled.plan, self._limits.num_groups
        came = {record.row for record in scheduled.records}
        for row in plan.released_rows:
            assert row not in came, "a row that has a new sequence is released"
            del self.rows[row]
        touched = [host for _, host in plan.to_host] + [host for host, _ in plan.from_host]
        assert len(set(touched)) == len(touched), "a host block is named twice"
        assert all(a % groups == b % groups for a, b in [*plan.to_host, *plan.from_host])
        for block, host in plan.to_host:
            self.host[host] = dict(self.blocks[block])
        written = [block for _, block in plan.from_host] + [block for _, block in plan.copies]
        assert len(set(written)) == len(written)
        for host, block in plan.from_host:
            self.blocks[block] = dict(self.host[host])
        sources = [dict(self.blocks[source]) for source, _ in plan.copies]
        for (_, target), content in zip(plan.copies, sources, strict=True):
            self.blocks[target] = content
        for number, count in plan.dropped_blocks:
            row = self.rows[number]
            assert count > 0 and (count <= len(row.table) or not row.num_dropped)
            del row.table[:count]
            row.num_dropped += count
        for number, *blocks in plan.new_blocks:
            self.rows[number].table += blocks

    def _compute(self, scheduled: Scheduled) -> list[int]:
        plan, size = scheduled.plan, self._limits.block_size
        assert len(set(plan.rows)) == len(plan.rows)
        assert sum(plan.num_tokens) <= self._limits.max_num_batched_tokens
        writer: dict[int, int] = {}
        for number, count, _ in plan.parts():
            row = self.rows[number]
            start = row.num_computed
            assert 0 < count <= len(row.tokens) - start
            for position in range(start, start + count):
                block = row.table[position // size - row.num_dropped]
                assert writer.setdefault(block, number) == number, "two rows write one block"
                self.blocks[block][position % size] = row.contents[position]
            row.num_computed += count
            self.num_query_tokens += count
        drawn = []
        for number, count, samples in plan.parts():
            row = self.rows[number]
            self._check_keys(row, count)
            if samples:
                assert row.num_computed == len(row.tokens)
                token = NO_TOKEN if row.is_broken else draw(row.contents[-1], row.index)
                drawn.append(token)
                row.tokens.append(token)
                row.contents.append(hash((row.contents[-1], token)))
        return drawn

    def _check_keys(self, row: _Row, count: int) -> None:
        size, groups = self._limits.block_size, self._limits.num_groups
        first = row.num_computed - count
        first = 0 if self._limits.window is None else max(0, first - self._limits.window + 1)
        for position in range(first, row.num_computed):
            place = position // size
            assert place >= row.num_dropped, "a block that a query needs was dropped"
            block = row.table[place - row.num_dropped]
            assert block % groups == place % groups, "a block of the wrong class"
            found = self.blocks[block].get(position % size)
            assert found == row.contents[position], f"wrong keys at {position} in block {block}"


def _contents(before: int, tokens: tuple[int, ...]) -> list[int]:
    found = []
    for token in tokens:
        before = hash((before, token))
        found.append(before)
    return found


class Loop:
    """A scheduler, a device, and up to `depth` steps between them."""

    def __init__(self, limits: SchedulerLimits, costs: FakeCosts | None = None) -> None:
        self.scheduler = Scheduler(limits, costs)
        self.device = ModelDevice(limits)
        self.in_flight: deque[tuple[Scheduled, list[int]]] = deque()
        self.ended: dict[int, str] = {}
        self.broken: set[int] = set()
        self.now_ns = 1

    def add(self, first: Sequence, *siblings: Sequence) -> None:
        """Queue a request."""
        self.scheduler.add(first, *siblings)

    def plan(self) -> Scheduled | None:
        """Plan a step and let the device do it."""
        self.now_ns += 1
        scheduled = self.scheduler.schedule(self.now_ns)
        if scheduled is None:
            assert self.in_flight or not self.scheduler.has_work, "work is left and nothing runs"
        else:
            tokens = self.device.run(scheduled, lambda one: one.id in self.broken)
            self.in_flight.append((scheduled, tokens))
        return scheduled

    def commit(self) -> list[tuple[Sequence, int]]:
        """Commit the oldest step in flight."""
        scheduled, tokens = self.in_flight.popleft()
        news = self.scheduler.commit(scheduled, tokens, self.now_ns)
        for one, _ in news:
            if one.finish_reason is not None:
                self.saw_end(one)
        return news

    def saw_end(self, one: Sequence) -> None:
        """A sequence was reported to have ended."""
        assert one.id not in self.ended, "a second terminal event"
        assert one.finish_reason is not None
        self.ended[one.id] = one.finish_reason
        expected = alone(one)
        assert one.token_ids == expected[: len(one.token_ids)]
        assert len(one.token_times_ns) == len(one.token_ids)
        if one.finish_reason in ("stop", "length"):
            assert one.token_ids == expected

    def step(self) -> None:
        """Plan and commit one step."""
        self.plan()
        if self.in_flight:
            self.commit()
        self.scheduler.check()

    def drain(self, depth: int = 1) -> int:
        """Run until no work is left; returns the rounds it took."""
        rounds = 0
        while self.scheduler.has_work or self.in_flight:
            planned = self.plan() if len(self.in_flight) < depth else None
            if self.in_flight and (planned is None or len(self.in_flight) >= depth):
                self.commit()
            self.scheduler.check()
            rounds += 1
            assert rounds < LAST_STEP, "it never comes to rest"
        self.scheduler.check_idle()
        return rounds
