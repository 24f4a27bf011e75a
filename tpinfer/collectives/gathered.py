"""The less used operations of a group, built on its all-reduce and all-gather: right everywhere,
fast where it matters little."""

from collections.abc import Sequence

import torch

from tpinfer.collectives.group import Group, check_all_to_all, check_gather, check_peer
from tpinfer.config.errors import RankError


class GatheredGroup(Group):
    """A backend that brings `all_reduce` and `all_gather` only."""

    last_wait_ns: int | None = None  # pyright: ignore[reportIncompatibleMethodOverride]
    """ns the latest all_reduce waited for its last peer, where the backend measures it."""

    def reduce_scatter(self, out: torch.Tensor, t: torch.Tensor) -> None:
        check_gather(t, out, self.size)
        summed = t.clone()
        self.all_reduce(summed)
        out.copy_(summed[self.rank])

    def all_to_all_v(
        self,
        out: torch.Tensor,
        t: torch.Tensor,
        out_rows: Sequence[int],
        in_rows: Sequence[int],
    ) -> None:
        check_all_to_all(out, t, out_rows, in_rows, self.size)
        table = self._gathered(torch.tensor(in_rows, dtype=torch.int64, device=t.device)).tolist()
        longest = max(sum(rows) for rows in table)
        padded = t.new_zeros(longest, *t.shape[1:])
        padded[: t.shape[0]] = t
        everyone = self._gathered(padded)
        start = 0
        for source, rows in enumerate(table):
            first, count = sum(rows[: self.rank]), rows[self.rank]
            out[start : start + count] = everyone[source, first : first + count]
            start += count

    def all_to_all(self, out: torch.Tensor, t: torch.Tensor) -> None:
        out.copy_(self._gathered(t)[:, self.rank])

    def broadcast(self, t: torch.Tensor, src: int) -> None:
        check_peer(src, self.size, None)
        t.copy_(self._gathered(t)[src])

    def send(self, t: torch.Tensor, dst: int) -> None:
        raise RankError(
            f"{self.name} groups send to nobody alone; use --collective gloo, nccl or mpi"
        )

    def recv(self, t: torch.Tensor, src: int) -> None:
        raise RankError(
            f"{self.name} groups receive from nobody alone; use --collective gloo, nccl or mpi"
        )

    def barrier(self) -> None:
        self.all_reduce(torch.zeros(1))

    def abort(self) -> None:
        """Most backends notice by their time-out."""

    def close(self) -> None:
        """Nothing to let go of."""

    def _gathered(self, t: torch.Tensor) -> torch.Tensor:
        out = torch.empty(self.size, *t.shape, dtype=t.dtype, device=t.device)
        self.all_gather(out, t.contiguous())
        return out
