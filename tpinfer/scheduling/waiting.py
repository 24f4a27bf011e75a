"""Sequences that have no row: who is next, and who waits aside for a prefix that is just being
computed.

Order is by arrival, moved back by `ageing_ns` for each step of priority. So a sequence of priority
p is overtaken only by those of a lower priority q that arrive less than (p - q) * ageing_ns after
it: nobody waits for ever. A preempted sequence keeps its place.
"""

from heapq import heapify, heappop, heappush

from tpinfer.scheduling.request import Family, Sequence


class WaitingQueue:
    """The queue, and the sequences beside it."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Sequence]] = []
        self._num_ended = 0  # sequences without a row that ended since the heap was cleared of such
        self._owner: dict[bytes, Sequence] = {}  # first key that somebody is computing -> who
        self._behind: dict[bytes, list[Sequence]] = {}  # key -> who waits for it

    def push(self, sequence: Sequence) -> None:
        """Let a sequence wait, at the place its order gives it."""
        heappush(self._heap, (sequence.order, sequence))

    def first(self) -> Sequence | None:
        """Who is next."""
        heap = self._heap
        while heap and heap[0][1].finish_reason is not None:
            heappop(heap)
        return heap[0][1] if heap else None

    def pop(self) -> None:
        """Take out the one that `first` has named."""
        heappop(self._heap)

    def ended(self) -> None:
        """A sequence without a row has ended; it is dropped now or when its turn comes."""
        self._num_ended += 1
        if self._num_ended > 16 and 2 * self._num_ended > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[1].finish_reason is None]
            heapify(self._heap)
            self._num_ended = 0

    def step_aside(self, sequence: Sequence, num_found: int, most: int) -> bool:
        """Whether the keys behind the `num_found` that a sequence found are just being computed by
        another one; then it waits for the last of them that both share."""
        keys, place = sequence.keys, num_found + 1
        owner = self._owner.get(keys[num_found]) if num_found < most else None
        if owner is None:
            return False
        most = min(most, len(owner.keys))
        while place < most and keys[place] == owner.keys[place]:
            place += 1
        self._behind.setdefault(keys[place - 1], []).append(sequence)
        return True

    def computing(self, sequence: Sequence) -> None:
        """A sequence that got a row computes the keys that nobody had. The first of them stands for
        all: whoever shares one more has found what lies before it."""
        if sequence.num_registered < len(sequence.keys):
            self._owner[sequence.keys[sequence.num_registered]] = sequence

    def computed(self, sequence: Sequence, keys: list[bytes]) -> None:
        """Blocks of a sequence with these keys, its next ones, can be found from now on."""
        if self._owner:
            self._owner.pop(keys[0], None)
        if sequence.num_registered < len(sequence.keys):
            self.computing(sequence)
        if self._behind:
            for key in keys:
                self._wake(key)

    def gave_up(self, sequence: Sequence) -> None:
        """A sequence lost its row: nobody waits for what it was computing."""
        keys = sequence.keys[sequence.num_registered :]
        if keys and self._owner.get(keys[0]) is sequence:
            del self._owner[keys[0]]
        if self._behind:
            for key in keys:
                self._wake(key)

    def is_ready(self, family: Family) -> None:
        """The prompt was computed: the other continuations may start."""
        family.is_ready = True
        for member in family.members:
            if member is not family.source and member.finish_reason is None:
                self.push(member)

    def lost_source(self, family: Family) -> None:
        """The source ended before the prompt was computed: another continuation takes its part."""
        for member in family.members:
            if member.finish_reason is None:
                family.source = member
                self.push(member)
                return

    def _wake(self, key: bytes) -> None:
        for sequence in self._behind.pop(key, ()):
            if sequence.finish_reason is None:
                self.push(sequence)
