"""DeepSpeed's shared-memory all-reduce, from a library built at set-up; everything else goes
over our own ring.

Used only where it is safe: it executes AVX-512 without asking, spins without ever yielding,
serves the world group alone, returns silently un-reduced for other dtypes, and never unlinks its
70 MB segment per rank.
"""

import importlib.util
import os
from collections.abc import Callable, Iterable
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

import torch

from tpinfer.collectives.gathered import GatheredGroup
from tpinfer.collectives.group import Group
from tpinfer.config.environment import export_variables, read_environment
from tpinfer.config.errors import RankError
from tpinfer.steps.segment import DEEPSPEED_PREFIX, PREFIX, SHM_DIRECTORY

MODULE = "deepspeed_shm_comm"
SEGMENT_BYTES = 70_000_000
"""What each rank takes of /dev/shm."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def library_path() -> Path:
    """Where set-up puts the built library."""
    version = torch.__version__.replace("+", "-")
    return read_environment().user_cache / f"{MODULE}-torch{version}.so"


def why_not(
    cpu_flags: Iterable[str],
    num_ranks: int,
    num_cores: int,
    shm_free_bytes: int,
    is_world: bool = True,
) -> str | None:
    """Why DeepSpeed's op must not be used here, or None where it is safe."""
    if "avx512bw" not in cpu_flags:
        return "this CPU has no AVX-512, which DeepSpeed's op executes without asking"
    if num_ranks > num_cores:
        return f"{num_ranks} ranks share {num_cores} cores, and it spins without yielding"
    if shm_free_bytes < num_ranks * SEGMENT_BYTES:
        need = num_ranks * SEGMENT_BYTES >> 20
        return f"/dev/shm has {shm_free_bytes >> 20} MB free and it needs {need} MB"
    if not is_world:
        return "it serves the group of all ranks only"
    return None


class DeepSpeedGroup(GatheredGroup):
    """All-reduce by DeepSpeed's op; gathers, barriers and what it cannot add by the ring inside."""

    name = "shared_memory"

    def __init__(self, ring: Group, library: Path, run_id: str) -> None:
        """`ring` is the group it is built around. A collective call: all ranks map each other's
        segments."""
        super().__init__(ring.rank, ring.size)
        self._ring = ring
        # Its segments are named after these three: the run id keeps two runs apart, and rank 0's
        # process id tells a later run that nobody needs what a killed one left.
        maker = torch.tensor([os.getpid()])
        ring.broadcast(maker, 0)
        named = f"{PREFIX}{int(maker)}-{run_id}"
        export_variables({"LOCAL_SIZE": str(ring.size), "MASTER_ADDR": named, "MASTER_PORT": "0"})
        loader = ExtensionFileLoader(MODULE, str(library))
        spec = importlib.util.spec_from_loader(MODULE, loader)
        if spec is None:
            raise RankError(f"{library} cannot be loaded; delete it and run the set-up again")
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        ring.barrier()
        module.initialize(ring.size, ring.rank)
        ring.barrier()  # everybody has mapped everybody: the names can go
        for path in SHM_DIRECTORY.glob(f"{DEEPSPEED_PREFIX}*_{named}_0_{ring.rank}"):
            path.unlink(missing_ok=True)
        self._reduce: Callable[[torch.Tensor], torch.Tensor] = (
            torch.ops.deepspeed.inference_all_reduce_.default
        )

    @property
    def ring(self) -> Group:
        """The group inside."""
        return self._ring

    def all_reduce(self, tensor: torch.Tensor) -> None:
        if tensor.dtype in _DTYPES and tensor.is_contiguous():
            self._reduce(tensor)
        else:
            self._ring.all_reduce(tensor)

    def all_gather(self, out: torch.Tensor, tensor: torch.Tensor) -> None:
        self._ring.all_gather(out, tensor)

    def barrier(self) -> None:
        self._ring.barrier()

    def abort(self) -> None:
        self._ring.abort()

    def close(self) -> None:
        self._ring.close()
