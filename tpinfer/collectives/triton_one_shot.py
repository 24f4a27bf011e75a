"""Sums over ranks in one kernel: each rank copies its part into memory that all can read, raises a
flag at every peer, waits for theirs, and adds all parts in rank order. Also the same with the
residual and the RMSNorm behind it, and a gather. Imported only where Triton is chosen.

A rank's segment is two halves for parts and a pad of int32: word 0 is not 0 once the group is given
up; from word _FIRST_FLAG on, flag [block, rank] is the latest launch that `rank` has published. The
halves alternate. A launch may overwrite the half of the last but one without asking: it runs behind
the last, in which every peer's flag was seen, and a peer publishes a launch only once its reads of
the one before are over. So no barrier trails a sum. Launches are counted on the device, so that a
replayed graph counts on.

Shapes: P ranks, N elements, T rows, M hidden size.
"""

# Kernels are not Python to a type checker.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

MAX_BLOCKS = 64
"""Most programs of a launch: all must be on the device at once, beside those of other ranks."""
MAX_FUSED_ROWS = MAX_BLOCKS
"""Most rows of a sum with its norm: a program each."""
_FIRST_FLAG = tl.constexpr(32)
_COUNT_MASK = tl.constexpr((1 << 30) - 1)
_HALF_COUNT = tl.constexpr(1 << 29)
_TILE = 2048
_ALIGNED_BYTES = 128
_MOST_WARPS = 16


@triton.jit
def _launch_count(launches_ptr):
    """Number of this launch: one above the last that this program's slot has seen."""
    return (tl.load(launches_ptr + tl.program_id(0)) + 1) & _COUNT_MASK


@triton.jit
def _keep_count(launches_ptr, count, SLOTS: tl.constexpr):
    """Every slot sees every launch, whatever its number of programs."""
    for slot in range(tl.program_id(0), SLOTS, tl.num_programs(0)):
        tl.store(launches_ptr + slot, count)


@triton.jit
def _part(segments_ptr, peer, count, half_bytes, like_ptr):
    """Where `peer` keeps its part of this launch, as a pointer of like_ptr's kind."""
    address = tl.load(segments_ptr + peer) + (count & 1).to(tl.int64) * half_bytes
    return tl.multiple_of(address.to(like_ptr.dtype), 16)


@triton.jit
def _meet(
    segments_ptr, stamp_ptr, count, half_bytes, rank,
    WORLD: tl.constexpr, LANES: tl.constexpr, TIMED: tl.constexpr,
):  # fmt: skip
    """Tell every peer that this program's part is there, and wait for theirs or for the group's
    end. Program 0 stamps how long it waited: ns, or polls where there is no device clock."""
    lane = tl.arange(0, LANES)
    is_peer = lane < WORLD
    place = _FIRST_FLAG + tl.program_id(0) * WORLD
    peers = tl.load(segments_ptr + tl.where(is_peer, lane, rank)) + 2 * half_bytes
    # What all threads have written is behind this barrier, and so behind the release.
    tl.debug_barrier()
    theirs = peers.to(tl.pointer_type(tl.int32)) + place + rank
    tl.atomic_xchg(theirs, tl.zeros_like(lane) + count, mask=is_peer, sem="release", scope="sys")
    published = globaltimer() if TIMED else tl.zeros((), tl.int64)
    own = (tl.load(segments_ptr + rank) + 2 * half_bytes).to(tl.pointer_type(tl.int32))
    # The lanes behind the peers' watch word 0.
    watched = own + tl.where(is_peer, place + lane, 0)
    none = tl.full((LANES,), -1, tl.int32)  # no flag is ever -1: this compares and never swaps
    polls = tl.zeros((), tl.int64)
    waiting = tl.full((), 1, tl.int32)
    while waiting > 0:
        seen = tl.atomic_cas(watched, none, none, sem="acquire", scope="sys")
        # A peer may be one launch ahead; counts wrap.
        is_late = ((seen - count) & _COUNT_MASK) >= _HALF_COUNT
        num_late = tl.sum((is_peer & is_late).to(tl.int32), 0)
        given_up = tl.sum((~is_peer & (seen != 0)).to(tl.int32), 0)
        waiting = tl.where(given_up > 0, 0, num_late)
        polls += 1
    if tl.program_id(0) == 0:
        tl.store(stamp_ptr, globaltimer() - published if TIMED else polls - 1)


@triton.jit
def sum_parts(
    t_ptr, segments_ptr, launches_ptr, stamp_ptr, num_elements, half_bytes, rank,
    WORLD: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, TIMED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """t [N] <- the sum over ranks, in rank order, in float32, rounded once."""
    count = _launch_count(launches_ptr)
    mine = _part(segments_ptr, rank, count, half_bytes, t_ptr)
    first, stride = tl.program_id(0) * BLOCK, tl.num_programs(0) * BLOCK
    for start in range(first, num_elements, stride):
        at = start + tl.arange(0, BLOCK)
        tl.store(mine + at, tl.load(t_ptr + at, mask=at < num_elements), mask=at < num_elements)
    _meet(segments_ptr, stamp_ptr, count, half_bytes, rank, WORLD, LANES, TIMED)
    for start in range(first, num_elements, stride):
        at = start + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for peer in tl.static_range(WORLD):
            theirs = _part(segments_ptr, peer, count, half_bytes, t_ptr)
            # Not through L1, which no peer's store reaches.
            part = tl.load(theirs + at, mask=at < num_elements, other=0.0, cache_modifier=".cg")
            total += part.to(tl.float32)
        tl.store(t_ptr + at, total.to(t_ptr.dtype.element_ty), mask=at < num_elements)
    _keep_count(launches_ptr, count, SLOTS)


@triton.jit
def sum_and_norm(
    delta_ptr, residual_ptr, weight_ptr, hidden_ptr, segments_ptr, launches_ptr, stamp_ptr,
    width, half_bytes, rank, eps,
    WORLD: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, TIMED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """residual [T, M] += the sum of delta [T, M] over ranks, and hidden = rms_norm(residual) *
    weight; one program a row. Rounds where a sum, an addition and a norm of their own would."""
    count = _launch_count(launches_ptr)
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    inside = at < width
    mine = _part(segments_ptr, rank, count, half_bytes, delta_ptr)
    tl.store(mine + row + at, tl.load(delta_ptr + row + at, mask=inside), mask=inside)
    _meet(segments_ptr, stamp_ptr, count, half_bytes, rank, WORLD, LANES, TIMED)
    total = tl.zeros((BLOCK,), tl.float32)
    for peer in tl.static_range(WORLD):
        theirs = _part(segments_ptr, peer, count, half_bytes, delta_ptr)
        part = tl.load(theirs + row + at, mask=inside, other=0.0, cache_modifier=".cg")
        total += part.to(tl.float32)
    kind = residual_ptr.dtype.element_ty
    before = tl.load(residual_ptr + row + at, mask=inside, other=0.0).to(tl.float32)
    after = (before + total.to(kind).to(tl.float32)).to(kind)
    tl.store(residual_ptr + row + at, after, mask=inside)
    wide = after.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(hidden_ptr + row + at, (wide * factor * weight).to(kind), mask=inside)
    _keep_count(launches_ptr, count, SLOTS)


@triton.jit
def gather_parts(
    out_ptr, t_ptr, segments_ptr, launches_ptr, stamp_ptr, num_elements, half_bytes, rank,
    WORLD: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, TIMED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out [P, N] <- every rank's t [N]."""
    count = _launch_count(launches_ptr)
    mine = _part(segments_ptr, rank, count, half_bytes, t_ptr)
    first, stride = tl.program_id(0) * BLOCK, tl.num_programs(0) * BLOCK
    for start in range(first, num_elements, stride):
        at = start + tl.arange(0, BLOCK)
        tl.store(mine + at, tl.load(t_ptr + at, mask=at < num_elements), mask=at < num_elements)
    _meet(segments_ptr, stamp_ptr, count, half_bytes, rank, WORLD, LANES, TIMED)
    for start in range(first, num_elements, stride):
        at = start + tl.arange(0, BLOCK)
        for peer in tl.static_range(WORLD):
            theirs = _part(segments_ptr, peer, count, half_bytes, t_ptr)
            part = tl.load(theirs + at, mask=at < num_elements, cache_modifier=".cg")
            place = out_ptr + tl.cast(peer * num_elements, tl.int64)
            tl.store(place + at, part, mask=at < num_elements)
    _keep_count(launches_ptr, count, SLOTS)


def segment_bytes(half_bytes: int, size: int) -> int:
    """Bytes of a rank's segment: two halves and the pad."""
    return 2 * half_bytes + 4 * (_FIRST_FLAG.value + MAX_BLOCKS * size)


def aligned_half(max_bytes: int) -> int:
    """Bytes of a half that holds parts of up to `max_bytes`."""
    return -(-max(max_bytes, 1) // _ALIGNED_BYTES) * _ALIGNED_BYTES


@dataclass(frozen=True, slots=True)
class OneShot:
    """What one rank needs to take part. All ranks make the same calls in the same order."""

    rank: int
    size: int
    segments_P: torch.Tensor
    """int64 [P]: where each rank's segment lies in this process. The segments were zeroed, and all
    ranks knew it, before the first call."""
    launches: torch.Tensor
    """int32 [MAX_BLOCKS], zero at first."""
    half_bytes: int
    is_timed: bool
    """Whether the device has a clock that a kernel can read; else waits are counted in polls."""

    def sum(self, t: torch.Tensor, stamp: torch.Tensor) -> None:
        """t <- the sum over ranks, in place: contiguous, a float dtype, at most `half_bytes`.
        stamp: int64 [1], where the wait for the last peer goes. Raises ValueError."""
        self._check(t, t)
        if not t.numel():
            return
        blocks = min(MAX_BLOCKS, triton.cdiv(t.numel(), _TILE))
        sum_parts[blocks,](
            t, self.segments_P, self.launches, stamp, t.numel(), self.half_bytes, self.rank,
            **self._constants(), BLOCK=_TILE, num_warps=8,
        )  # fmt: skip

    def sum_and_norm(
        self,
        delta_TM: torch.Tensor,
        residual_TM: torch.Tensor,
        weight_M: torch.Tensor,
        eps: float,
        stamp: torch.Tensor,
    ) -> torch.Tensor:
        """hidden [T, M] of residual, to which the sum of delta over ranks is added in place; T is
        at most MAX_FUSED_ROWS. delta keeps this rank's part. Raises ValueError."""
        self._check(delta_TM, residual_TM)
        num_rows, width = delta_TM.shape
        if num_rows > MAX_FUSED_ROWS:
            raise ValueError(
                f"{num_rows} rows are summed and normed in one launch of at most {MAX_FUSED_ROWS}; "
                "sum them alone"
            )
        hidden = torch.empty_like(residual_TM)
        if not num_rows:
            return hidden
        block = triton.next_power_of_2(width)
        sum_and_norm[num_rows,](
            delta_TM, residual_TM, weight_M, hidden, self.segments_P, self.launches, stamp, width,
            self.half_bytes, self.rank, eps, **self._constants(), BLOCK=block,
            num_warps=max(1, min(_MOST_WARPS, block // 512)),
        )  # fmt: skip
        return hidden

    def gather(self, out: torch.Tensor, t: torch.Tensor, stamp: torch.Tensor) -> None:
        """out [P, ...] <- every rank's t: contiguous, any dtype, whole words of 4 bytes, at most
        `half_bytes`. Raises ValueError."""
        if t.nbytes % 4 or t.nbytes > self.half_bytes:
            raise ValueError(
                f"a part of {t.nbytes} bytes is no count of words up to {self.half_bytes} bytes; "
                "gather it by another backend"
            )
        if not t.numel():
            return
        words = t.contiguous().view(-1).view(torch.int32)
        blocks = min(MAX_BLOCKS, triton.cdiv(words.numel(), _TILE))
        gather_parts[blocks,](
            out.view(-1).view(torch.int32), words, self.segments_P, self.launches, stamp,
            words.numel(), self.half_bytes, self.rank, **self._constants(), BLOCK=_TILE,
            num_warps=8,
        )  # fmt: skip

    def _constants(self) -> dict[str, Any]:
        lanes = triton.next_power_of_2(self.size + 1)
        return {"WORLD": self.size, "LANES": lanes, "SLOTS": MAX_BLOCKS, "TIMED": self.is_timed}

    def _check(self, t: torch.Tensor, other: torch.Tensor) -> None:
        if not t.is_floating_point() or t.element_size() not in (2, 4) or t.dtype != other.dtype:
            raise ValueError(f"{t.dtype} parts cannot be summed here; use float32 or 16-bit floats")
        if not (t.is_contiguous() and other.is_contiguous()) or t.shape != other.shape:
            raise ValueError(f"parts of shape {list(t.shape)} must be contiguous and of one shape")
        if t.nbytes > self.half_bytes:
            raise ValueError(
                f"a part of {t.nbytes} bytes is larger than the {self.half_bytes} bytes shared for "
                "one; sum it by another backend"
            )


def give_up(segment: torch.Tensor, half_bytes: int) -> None:
    """Have every program that waits at this segment (uint8, its first byte first) leave, and later
    ones not wait."""
    segment[2 * half_bytes : 2 * half_bytes + 4] = 1
