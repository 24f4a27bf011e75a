"""Collectives of tensors on GPUs through the host's memory and another group: right where nothing
better can run, as with several ranks on one GPU, and slow. Every call waits for the device."""

import torch

from tpinfer.collectives.gathered import GatheredGroup
from tpinfer.collectives.group import Group, check_gather


class HostStagedGroup(GatheredGroup):
    """Copies to the host, calls `host`, which it owns, and copies back."""

    def __init__(self, host: Group, device: torch.device) -> None:
        super().__init__(host.rank, host.size)
        self.name = f"{host.name} through the host"
        self._host = host
        self._pins = device.type == "cuda"

    def all_reduce(self, t: torch.Tensor) -> None:
        is_short = t.is_floating_point() and t.element_size() < 4
        staged = self._staged(t, torch.float32 if is_short else t.dtype)
        self._host.all_reduce(staged)
        t.copy_(staged)

    def all_gather(self, out: torch.Tensor, t: torch.Tensor) -> None:
        check_gather(out, t, self.size)
        gathered = torch.empty(out.shape, dtype=out.dtype, pin_memory=self._pins)
        self._host.all_gather(gathered, self._staged(t, t.dtype))
        out.copy_(gathered)

    def broadcast(self, t: torch.Tensor, src: int) -> None:
        staged = self._staged(t, t.dtype)
        self._host.broadcast(staged, src)
        t.copy_(staged)

    def send(self, t: torch.Tensor, dst: int) -> None:
        self._host.send(self._staged(t, t.dtype), dst)

    def recv(self, t: torch.Tensor, src: int) -> None:
        staged = torch.empty(t.shape, dtype=t.dtype, pin_memory=self._pins)
        self._host.recv(staged, src)
        t.copy_(staged)

    def barrier(self) -> None:
        self._host.barrier()

    def abort(self) -> None:
        self._host.abort()

    def close(self) -> None:
        self._host.close()

    def _staged(self, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        staged = torch.empty(t.shape, dtype=dtype, pin_memory=self._pins)
        return staged.copy_(t)
