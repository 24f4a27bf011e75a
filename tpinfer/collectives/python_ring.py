"""The protocol of ring.c in Python over torch views of the same segment: its oracle, and what runs
where no compiler is. Ranks of either kind can work in one group.

For x86 only: it relies on stores becoming visible in order (total store order), which Python has no
means to ask for elsewhere. Takes contiguous CPU tensors, checks nothing.
"""

import os
import time
from collections.abc import Callable, Sequence

import torch

from tpinfer.collectives.ring_segment import (
    ABORT,
    ABORTED,
    CLOSED,
    INTERRUPTED,
    PEER_GONE,
    TIMED_OUT,
    RingSegment,
)
from tpinfer.config.errors import ConfigError
from tpinfer.steps.segment import KEEPS_STORE_ORDER

NUM_SPINS = 200
"""Looks at a counter before the core is given away, about 20 us."""
GRAIN = 32
"""Elements at whose multiples parts start; as in ring.c."""
_CHECK_EVERY, _SLEEP_AFTER_NS, _SLEEP_S = 32, 20_000_000, 50e-6
_PEERS_EVERY_NS, _MOST_VIEWS = 50_000_000, 256


class PythonRing:
    """One rank's end of the ring, in Python."""

    def __init__(self, segment: RingSegment, one_shot_bytes: int, num_spins: int) -> None:
        """`num_spins` 0 yields the core at every look. Raises ConfigError where not on x86."""
        if not KEEPS_STORE_ORDER:
            raise ConfigError(
                "the Python shared-memory ring needs an x86 processor; install a C compiler for "
                "the native one or use --collective gloo"
            )
        layout = segment.layout
        self._segment, self._layout = segment, layout
        self._rank, self._size = segment.rank, layout.size
        self._words = segment.words
        self._memory = torch.frombuffer(segment.memory, dtype=torch.uint8)
        self._one_shot_bytes = min(one_shot_bytes, layout.slot_bytes)
        self._num_spins = num_spins
        self._phase = 0
        self._is_closed = False
        self._views: dict[tuple[int, torch.dtype], list[list[torch.Tensor]]] = {}
        self.last_wait_ns = 0
        order = [(segment.rank + step) % layout.size for step in range(1, layout.size)]
        self._peers = [(layout.flag_word(peer), peer) for peer in order]

    def bind_all_reduce(self, dtype: torch.dtype) -> Callable[[torch.Tensor], None]:
        """All-reduce of contiguous CPU tensors of one dtype."""
        width = dtype.itemsize

        def all_reduce(t: torch.Tensor) -> None:
            num_elements = t.numel()
            if num_elements == 0:
                return
            if self._is_closed:
                raise self._segment.failure(CLOSED, self._rank)
            self.last_wait_ns = 0
            flat = t.view(-1)
            if num_elements * width <= self._one_shot_bytes:
                parts = self._parts(num_elements, dtype)[self._phase + 1 & 1]
                parts[self._rank].copy_(flat)
                self._meet(self._phase + 1)
                _add_up(flat, parts)
                return
            for chunk in flat.split(self._layout.slot_bytes // width):
                self._reduce_chunk(chunk)

        return all_reduce

    def all_gather(self, out: torch.Tensor, t: torch.Tensor) -> None:
        self.last_wait_ns = 0
        parts, most = _as_bytes(t), self._layout.slot_bytes
        whole = _as_bytes(out).view(self._size, -1)
        for at in range(0, parts.numel(), most):
            chunk = parts[at : at + most]
            self._exchange(chunk)
            for peer in range(self._size):
                found = self._slot(peer, self._phase, 0, chunk.numel(), torch.uint8)
                whole[peer, at : at + most].copy_(found)

    def reduce_scatter(self, out: torch.Tensor, t: torch.Tensor) -> None:
        self.last_wait_ns = 0
        flat, whole, width = out.view(-1), t.view(self._size, -1), t.dtype.itemsize
        most = self._layout.slot_bytes // self._size // width // GRAIN * GRAIN
        for at in range(0, flat.numel(), most):
            phase = self._phase + 1
            for peer in range(self._size):
                part = whole[peer, at : at + most]
                offset = peer * most * width
                self._slot(self._rank, phase, offset, part.numel(), t.dtype).copy_(part)
            self._meet(phase)
            self._sum(flat[at : at + most], phase, self._rank * most * width)

    def all_to_all_v(
        self,
        out: torch.Tensor,
        t: torch.Tensor,
        out_bytes: Sequence[int],
        in_bytes: Sequence[int],
        num_rounds: int,
    ) -> None:
        self.last_wait_ns = 0
        sources = _as_bytes(t).split(list(in_bytes))
        targets = _as_bytes(out).split(list(out_bytes))
        most = self._layout.slot_bytes // self._size // 64 * 64
        for at in range(0, num_rounds * most, most):
            phase = self._phase + 1
            for peer, source in enumerate(sources):
                part = source[at : at + most]
                slot = self._slot(self._rank, phase, peer * most, part.numel(), torch.uint8)
                slot.copy_(part)
            self._meet(phase)
            for peer, target in enumerate(targets):
                part = target[at : at + most]
                offset = self._rank * most
                part.copy_(self._slot(peer, phase, offset, part.numel(), torch.uint8))

    def broadcast(self, t: torch.Tensor, src: int) -> None:
        self.last_wait_ns = 0
        for chunk in _as_bytes(t).split(self._layout.slot_bytes):
            slot = self._slot(src, self._phase + 1, 0, chunk.numel(), torch.uint8)
            if self._rank == src:
                slot.copy_(chunk)
            self._meet(self._phase + 1)
            if self._rank != src:
                chunk.copy_(slot)

    def barrier(self) -> None:
        self.last_wait_ns = 0
        self._meet(self._phase + 1)

    def send(self, t: torch.Tensor, dst: int) -> None:
        sent, taken = self._layout.mail_words(self._rank, dst)
        box = self._mailbox(self._rank, dst)
        for piece in _as_bytes(t).split(self._layout.mail_bytes):
            count = self._words[sent]
            self._wait(taken, count, dst)
            box[: piece.numel()].copy_(piece)
            self._words[sent] = count + 1

    def recv(self, t: torch.Tensor, src: int) -> None:
        sent, taken = self._layout.mail_words(src, self._rank)
        box = self._mailbox(src, self._rank)
        for piece in _as_bytes(t).split(self._layout.mail_bytes):
            count = self._words[taken]
            self._wait(sent, count + 1, src)
            piece.copy_(box[: piece.numel()])
            self._words[taken] = count + 1

    def close(self) -> None:
        """Let go of the segment's memory; it can then be unmapped."""
        self._is_closed = True
        self._views.clear()
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _slot(
        self, rank: int, phase: int, offset: int, num_elements: int, dtype: torch.dtype
    ) -> torch.Tensor:
        start = self._layout.slot_offset(rank, phase) + offset
        return self._memory[start : start + num_elements * dtype.itemsize].view(dtype)

    def _mailbox(self, src: int, dst: int) -> torch.Tensor:
        layout = self._layout
        start = layout.mail_offset + (src * layout.size + dst) * layout.mail_bytes
        return self._memory[start : start + layout.mail_bytes]

    def _exchange(self, flat: torch.Tensor) -> None:
        """One phase in which every rank shows `flat`."""
        phase = self._phase + 1
        self._slot(self._rank, phase, 0, flat.numel(), flat.dtype).copy_(flat)
        self._meet(phase)

    def _sum(self, flat: torch.Tensor, phase: int, offset: int) -> None:
        """flat <- the sum, in rank order, of what lies at `offset` in the slots of `phase`."""
        count, dtype = flat.numel(), flat.dtype
        _add_up(flat, [self._slot(peer, phase, offset, count, dtype) for peer in range(self._size)])

    def _parts(self, num_elements: int, dtype: torch.dtype) -> list[list[torch.Tensor]]:
        """For even and odd phases: the start of every rank's slot. Made once per message size."""
        key = num_elements, dtype
        found = self._views.get(key)
        if found is None:
            if len(self._views) == _MOST_VIEWS:
                self._views.clear()
            ranks = range(self._size)
            found = [[self._slot(r, p, 0, num_elements, dtype) for r in ranks] for p in (0, 1)]
            self._views[key] = found
        return found

    def _reduce_chunk(self, flat: torch.Tensor) -> None:
        """Each rank sums its part of the chunk, then all gather the parts."""
        num_elements, width = flat.numel(), flat.dtype.itemsize
        part = -(-num_elements // self._size)
        part = -(-part // GRAIN) * GRAIN
        cuts = [min(peer * part, num_elements) for peer in range(self._size + 1)]
        first, last = cuts[self._rank], cuts[self._rank + 1]
        self._exchange(flat)
        phase = self._phase + 1
        mine = self._slot(self._rank, phase, first * width, last - first, flat.dtype)
        self._sum(mine, self._phase, first * width)
        self._meet(phase)
        for peer in range(self._size):
            start, stop = cuts[peer], cuts[peer + 1]
            found = self._slot(peer, phase, start * width, stop - start, flat.dtype)
            flat[start:stop].copy_(found)

    def _meet(self, phase: int) -> None:
        """Publish this rank's part of `phase` and wait for everybody's."""
        if self._words[ABORT]:
            raise self._segment.failure(ABORTED, self._rank)
        began_ns = time.perf_counter_ns()
        self._phase = phase
        self._words[self._layout.flag_word(self._rank)] = phase
        for flag, peer in self._peers:
            self._wait(flag, phase, peer)
        self.last_wait_ns += time.perf_counter_ns() - began_ns

    def _wait(self, flag: int, want: int, peer: int) -> None:
        words = self._words
        for _ in range(self._num_spins):
            if words[flag] >= want:
                break
        else:
            try:
                self._wait_long(flag, want, peer)
            except (KeyboardInterrupt, SystemExit):
                self._segment.abort(INTERRUPTED)
                raise

    def _wait_long(self, flag: int, want: int, peer: int) -> None:
        words, segment = self._words, self._segment
        began_ns = asked_ns = time.perf_counter_ns()
        timeout_ns = segment.timeout_s * 1e9
        num_looks = 0
        while words[flag] < want:
            if words[ABORT] and words[flag] < want:
                raise segment.failure(ABORTED, peer)
            num_looks += 1
            os.sched_yield()
            if num_looks % _CHECK_EVERY:
                continue
            now_ns = time.perf_counter_ns()
            waited_ns = now_ns - began_ns
            if waited_ns > _SLEEP_AFTER_NS:
                num_looks = _CHECK_EVERY - 1  # look at the clock every time
                time.sleep(_SLEEP_S)
            code = TIMED_OUT if waited_ns > timeout_ns else 0
            if not code and now_ns - asked_ns > _PEERS_EVERY_NS:
                asked_ns = now_ns
                code = PEER_GONE if segment.is_gone(peer) and words[flag] < want else 0
            if code:
                segment.abort(code, peer)
                raise segment.failure(code, peer)


def _as_bytes(t: torch.Tensor) -> torch.Tensor:
    return t.view(-1).view(torch.uint8)


def _add_up(flat: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    """flat <- the sum of the parts in their order; 16-bit floats in float32, rounded once."""
    if flat.dtype.itemsize > 2:
        torch.add(parts[0], parts[1], out=flat)
        for part in parts[2:]:
            flat.add_(part)
        return
    total = parts[0].float()
    for part in parts[1:]:
        total.add_(part)
    flat.copy_(total)
