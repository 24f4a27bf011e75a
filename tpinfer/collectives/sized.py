"""Two backends of the same ranks: one for small sums, one for large ones.

The size of a message decides, which is the same on every rank, so all go the same way. Everything
but sums goes over the first. Both are open from the start and end together: a rank that dies breaks
whichever the others wait in.
"""

from collections.abc import Sequence

import torch

from tpinfer.collectives.group import AllReduceCall, Group
from tpinfer.config.dtypes import DType


class SizedGroup(Group):
    """Sums of `from_bytes` and more over `large`, all else over `small`. Owns both."""

    def __init__(self, small: Group, large: Group, from_bytes: int) -> None:
        super().__init__(small.rank, small.size)
        self.name = small.name if small.name == large.name else f"{small.name}+{large.name}"
        self.small, self.large, self.from_bytes = small, large, from_bytes
        self._last = small

    @property
    def last_wait_ns(self) -> int | None:
        """Of the backend that made the last call; 0 where that one does not measure it but the
        other does."""
        waited = self._last.last_wait_ns
        if waited is None and self.small.last_wait_ns is not None:
            return 0
        return waited

    def all_reduce(self, t: torch.Tensor) -> None:
        self._last = self.large if t.nbytes >= self.from_bytes else self.small
        self._last.all_reduce(t)

    def bind_all_reduce(self, max_bytes: int, dtype: DType) -> AllReduceCall:
        small = self.small.bind_all_reduce(max_bytes, dtype)
        if max_bytes < self.from_bytes:
            return self._noted(small)
        large = self.large.bind_all_reduce(max_bytes, dtype)
        first, second, limit = self.small, self.large, self.from_bytes

        def all_reduce(t: torch.Tensor) -> None:
            if t.nbytes < limit:
                self._last = first
                small(t)
            else:
                self._last = second
                large(t)

        return all_reduce

    def all_gather(self, out: torch.Tensor, t: torch.Tensor) -> None:
        self._first().all_gather(out, t)

    def reduce_scatter(self, out: torch.Tensor, t: torch.Tensor) -> None:
        self._first().reduce_scatter(out, t)

    def all_to_all_v(
        self,
        out: torch.Tensor,
        t: torch.Tensor,
        out_rows: Sequence[int],
        in_rows: Sequence[int],
    ) -> None:
        self._first().all_to_all_v(out, t, out_rows, in_rows)

    def all_to_all(self, out: torch.Tensor, t: torch.Tensor) -> None:
        self._first().all_to_all(out, t)

    def broadcast(self, t: torch.Tensor, src: int) -> None:
        self._first().broadcast(t, src)

    def send(self, t: torch.Tensor, dst: int) -> None:
        self._first().send(t, dst)

    def recv(self, t: torch.Tensor, src: int) -> None:
        self._first().recv(t, src)

    def barrier(self) -> None:
        self._first().barrier()

    def abort(self) -> None:
        self.small.abort()
        self.large.abort()

    def close(self) -> None:
        self.large.close()
        self.small.close()

    def _first(self) -> Group:
        self._last = self.small
        return self.small

    def _noted(self, call: AllReduceCall) -> AllReduceCall:
        first = self.small

        def all_reduce(t: torch.Tensor) -> None:
            self._last = first
            call(t)

        return all_reduce
