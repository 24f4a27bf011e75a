"""Groups over MPI, for ranks that mpirun started. Needs the extra `mpi`; nothing else may call
MPI in the process."""

import torch

from tpinfer.collectives.gathered import GatheredGroup
from tpinfer.config.errors import RankError


class MpiGroup(GatheredGroup):
    """MPI_COMM_WORLD, or a part of it, over CPU tensors. MPI has no 16-bit floats: they are added
    as float32."""

    name = "mpi"

    def __init__(self, rank: int, size: int, part: int | None = None) -> None:
        """`part` is the same number on the ranks of one part, which all ranks of the run open at
        once; None is all ranks. Raises RankError without mpi4py, or when MPI counts other ranks
        than the launcher."""
        super().__init__(rank, size)
        try:
            from mpi4py import MPI  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise RankError(
                f"--collective mpi needs mpi4py and an MPI library ({error}); pip install "
                "'tpinfer[mpi]'"
            ) from error
        self._comm = MPI.COMM_WORLD if part is None else MPI.COMM_WORLD.Split(part, rank)
        self._in_place = MPI.IN_PLACE
        if (self._comm.Get_rank(), self._comm.Get_size()) != (rank, size):
            raise RankError(
                f"MPI says rank {self._comm.Get_rank()} of {self._comm.Get_size()}, the launcher "
                f"{rank} of "
                f"{size}; start the ranks with the mpirun of the MPI that mpi4py uses"
            )

    def all_reduce(self, tensor: torch.Tensor) -> None:
        if tensor.dtype in (torch.bfloat16, torch.float16) or not tensor.is_contiguous():
            payload = tensor.float().contiguous()
            self._comm.Allreduce(self._in_place, payload.numpy())
            tensor.copy_(payload)
        else:
            self._comm.Allreduce(self._in_place, tensor.numpy())

    def all_gather(self, out: torch.Tensor, tensor: torch.Tensor) -> None:
        source = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        self._comm.Allgather(source, out.view(-1).view(torch.uint8).numpy())

    def all_to_all(self, out: torch.Tensor, t: torch.Tensor) -> None:
        source = t.view(-1).view(torch.uint8).numpy()
        self._comm.Alltoall(source, out.view(-1).view(torch.uint8).numpy())

    def send(self, tensor: torch.Tensor, to: int) -> None:
        self._comm.Send(tensor.contiguous().view(-1).view(torch.uint8).numpy(), to)

    def recv(self, tensor: torch.Tensor, source: int) -> None:
        payload = torch.empty(tensor.nbytes, dtype=torch.uint8)
        self._comm.Recv(payload.numpy(), source)
        tensor.copy_(payload.view(tensor.dtype).view(tensor.shape))

    def abort(self) -> None:
        self._comm.Abort(1)
