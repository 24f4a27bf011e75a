"""A step's columns on their way to the device, all in one copy."""

from collections.abc import Sequence

import torch


class Staging:
    """Columns of int64. On a GPU they are filled in pinned memory, of which there is more than one
    copy: what a step's transfer has not read yet the next step must not fill."""

    def __init__(self, shape: tuple[int, int], device: torch.device, num_copies: int) -> None:
        """shape: columns, and most entries of one that go by the shared copy."""
        self._device = device
        self._is_cuda = device.type == "cuda"
        count = num_copies if self._is_cuda else 1
        self._staged = [
            torch.empty(shape, dtype=torch.int64, pin_memory=self._is_cuda) for _ in range(count)
        ]
        self._arrays = [staged.numpy() for staged in self._staged]  # filled faster than tensors are
        self._copied = [torch.cuda.Event() for _ in range(count)] if self._is_cuda else []
        self._next = 0
        self.columns = self._staged[0]
        """int64 [columns, entries] on the device, always the same memory."""
        if self._is_cuda:
            self.columns = torch.zeros(shape, dtype=torch.int64, device=device)

    def transfer(self, columns: Sequence[list[int]]) -> list[torch.Tensor]:
        """Every column on the device: a view of `columns` where it is not too long for that."""
        place, self._next = self._next, (self._next + 1) % len(self._staged)
        if self._is_cuda:
            self._copied[place].synchronize()
        array, room = self._arrays[place], self.columns.shape[1]
        # More new blocks than a step has tokens: prompts that were found in the cache.
        long = {i for i, column in enumerate(columns) if len(column) > room}
        for i, column in enumerate(columns):
            if i not in long:
                array[i, : len(column)] = column
        if self._is_cuda:
            width = max(len(column) for i, column in enumerate(columns) if i not in long)
            count = len(columns)
            staged = self._staged[place][:count, :width]
            self.columns[:count, :width].copy_(staged, non_blocking=True)
            self._copied[place].record()
        return [
            torch.tensor(column, dtype=torch.int64, device=self._device)
            if i in long
            else self.columns[i, : len(column)]
            for i, column in enumerate(columns)
        ]
