"""What a group of ranks can do together, whichever backend carries it; and the group of one rank.

Every call is collective: all ranks make the same calls in the same order, with the same shapes and
dtypes. A call returns when this rank's result may be used: in stream order on a GPU, at once on a
CPU. Sums add in rank order where the backend allows it. Choosing a backend is `choose`, opening one
is `opening`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch

from tpinfer.config.dtypes import DType
from tpinfer.config.errors import RankError

AllReduceCall = Callable[[torch.Tensor], None]
NormedReduceCall = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]
"""(delta [T, M], residual [T, M]) -> hidden [T, M]; None, with nothing done, where T is too many.
See `Group.bind_normed_reduce`."""


class Group(ABC):
    """Ranks that work together. Made by `open_group`; `close` it on every rank.

    A call that another rank does not join in time raises RankError; the group is then of no more
    use on any rank.
    """

    name: str = ""
    """Backend, as choices name it."""
    can_record = False
    """Whether its calls may be part of a recorded device step."""
    num_stamped: int = 0
    """Place in `stamps` that the next collective writes; whoever reads stamps sets it."""

    def __init__(self, rank: int, size: int) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank={rank} must lie in 0..{size - 1}")
        self.rank = rank
        self.size = size

    @property
    def last_wait_ns(self) -> int | None:
        """ns the last call spent between publishing this rank's part and seeing the last peer's.

        None where the backend does not measure it.
        """
        return None

    @property
    def stamps(self) -> torch.Tensor | None:
        """int64 on the device, where groups on GPUs leave their waits in ns, in stream order: each
        collective writes the place `num_stamped` and counts it up. A call whose backend does not
        measure writes 0. None where nothing is written."""
        return None

    @abstractmethod
    def all_reduce(self, t: torch.Tensor) -> None:
        """t <- the sum of t over the ranks, in place; any shape, a floating or integer dtype.

        16-bit floats are summed in float32 and rounded once where the backend allows it.
        """

    @abstractmethod
    def all_gather(self, out: torch.Tensor, t: torch.Tensor) -> None:
        """out[r] <- rank r's t, any dtype; out is contiguous with shape [size, *t.shape]."""

    @abstractmethod
    def reduce_scatter(self, out: torch.Tensor, t: torch.Tensor) -> None:
        """out <- the sum over ranks of t[rank]; t has shape [size, *out.shape]."""

    @abstractmethod
    def all_to_all_v(
        self,
        out: torch.Tensor,
        t: torch.Tensor,
        out_rows: Sequence[int],
        in_rows: Sequence[int],
    ) -> None:
        """Send in_rows[r] rows of t to each rank r and receive out_rows[r] rows from it into out.

        Rows run along dim 0 and lie in rank order in both tensors; their other dims agree.
        """

    def all_to_all(self, out: torch.Tensor, t: torch.Tensor) -> None:
        """out[r] <- rank r's t[rank]; both contiguous, of one dtype and shape [size, ...]."""
        rows = [1] * self.size
        self.all_to_all_v(out, t, rows, rows)

    @abstractmethod
    def broadcast(self, t: torch.Tensor, src: int) -> None:
        """t <- rank src's t, in place."""

    @abstractmethod
    def send(self, t: torch.Tensor, dst: int) -> None:
        """Hand t to rank dst, which must call `recv`. Only these two ranks take part."""

    @abstractmethod
    def recv(self, t: torch.Tensor, src: int) -> None:
        """t <- what rank src sends, in place."""

    @abstractmethod
    def barrier(self) -> None:
        """Return once every rank has called it."""

    @abstractmethod
    def abort(self) -> None:
        """Make the other ranks' present and later calls fail as soon as the backend can."""

    @abstractmethod
    def close(self) -> None:
        """Let go of memory, files and connections. May be called twice; not a collective call."""

    def bind_all_reduce(self, max_bytes: int, dtype: DType) -> AllReduceCall:
        """The fastest `all_reduce` for one call site, whose tensors are contiguous, of `dtype` and
        at most `max_bytes`. Backends that have nothing faster give `all_reduce` itself.
        """
        return self.all_reduce

    def bind_normed_reduce(self, weight: torch.Tensor, eps: float) -> NormedReduceCall | None:
        """A sum of delta that also adds it to the residual, in place, and norms that by `weight`
        [M]. None where sum and norm stay apart."""
        return None

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        if kind is not None:
            self.abort()
        self.close()


class SingleGroup(Group):
    """One rank alone: sums are what they were, gathers copy."""

    name = "single"
    can_record = True

    def __init__(self) -> None:
        super().__init__(0, 1)

    def all_reduce(self, t: torch.Tensor) -> None:
        """Nothing to add."""

    def all_gather(self, out: torch.Tensor, t: torch.Tensor) -> None:
        check_gather(out, t, 1)
        out[0].copy_(t)

    def reduce_scatter(self, out: torch.Tensor, t: torch.Tensor) -> None:
        check_gather(t, out, 1)
        out.copy_(t[0])

    def all_to_all_v(
        self,
        out: torch.Tensor,
        t: torch.Tensor,
        out_rows: Sequence[int],
        in_rows: Sequence[int],
    ) -> None:
        check_all_to_all(out, t, out_rows, in_rows, 1)
        out.copy_(t)

    def broadcast(self, t: torch.Tensor, src: int) -> None:
        check_peer(src, 1, None)

    def send(self, t: torch.Tensor, dst: int) -> None:
        check_peer(dst, 1, 0)

    def recv(self, t: torch.Tensor, src: int) -> None:
        check_peer(src, 1, 0)

    def barrier(self) -> None:
        """Nobody to wait for."""

    def abort(self) -> None:
        """Nobody to tell."""

    def close(self) -> None:
        """Nothing was opened."""


def check_gather(whole: torch.Tensor, part: torch.Tensor, size: int) -> None:
    """Raise ValueError unless `whole` is [size, *part.shape], contiguous and of part's dtype."""
    if whole.shape != (size, *part.shape) or whole.dtype != part.dtype:
        raise ValueError(
            f"a {part.dtype} part of shape {list(part.shape)} on {size} ranks needs a whole of "
            f"shape {[size, *part.shape]} and the same dtype, not {whole.dtype} {list(whole.shape)}"
        )
    if not whole.is_contiguous():
        raise ValueError(f"the whole of shape {list(whole.shape)} must be contiguous; copy it")


def check_all_to_all(
    out: torch.Tensor, t: torch.Tensor, out_rows: Sequence[int], in_rows: Sequence[int], size: int
) -> None:
    """Raise ValueError where row counts and tensors disagree."""
    if out.shape[1:] != t.shape[1:] or out.dtype != t.dtype:
        raise ValueError(
            f"rows of {out.dtype} {list(out.shape)} cannot hold rows of {t.dtype} {list(t.shape)}"
        )
    for what, tensor, rows in (("out", out, out_rows), ("in", t, in_rows)):
        if len(rows) != size or sum(rows) != tensor.shape[0] or min(rows) < 0:
            raise ValueError(
                f"{what}_rows={list(rows)} must be {size} counts that sum to {tensor.shape[0]} rows"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"the {what} tensor of shape {list(tensor.shape)} must be contiguous")


def check_peer(peer: int, size: int, own_rank: int | None) -> None:
    """Raise ValueError unless `peer` is a rank of the group other than `own_rank`."""
    if not 0 <= peer < size or peer == own_rank:
        own = "" if own_rank is None else f" other than this rank, {own_rank}"
        raise ValueError(f"peer={peer} must be a rank in 0..{size - 1}{own}")


def group_is_closed(name: str) -> RankError:
    """The error of a call on a closed group."""
    return RankError(f"the {name} group is closed on this rank; open it again")
