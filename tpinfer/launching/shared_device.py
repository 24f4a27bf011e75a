"""Several ranks on one GPU, for trying out what needs several: emulation, with no claim to speed.

Three routes, by what carries the collectives. C: symmetric memory, gloo through the host for the
rest; nothing else is needed. A: an NCCL of 2.30 or newer, which lets ranks share a GPU when told
to; torch brings an older one, so it is loaded before torch (LD_PRELOAD). B: torch's own NCCL with a
host name of its own for each rank, so that it takes them for hosts and goes through sockets.

Sources: torch's CUDASymmetricMemory.cu; NCCL's env.rst (NCCL_MULTI_RANK_GPU_ENABLE, NCCL_MAX_CTAS:
channels of all ranks must fit the GPU at once, or they wait for each other for ever) and its
misc/utils.cc (NCCL_HOSTID).
"""

from dataclasses import dataclass
from pathlib import Path

from tpinfer.config.errors import ConfigError

EMULATION = "emulation: no speed claim"
_SYMMETRIC = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
_NCCL = {"NCCL_NVLS_ENABLE": "0", "NCCL_RAS_ENABLE": "0", "NCCL_SOCKET_IFNAME": "lo"}
_AS_HOSTS = {"NCCL_MNNVL_ENABLE": "0", "NCCL_IB_DISABLE": "1"}
_FEW_RANKS = 2


@dataclass(frozen=True, slots=True)
class SharedDevice:
    """How one rank shares its GPU."""

    num_sharing: int
    """Most ranks on one GPU."""
    variables: dict[str, str]
    """What its libraries read from the environment, before they connect."""
    by_nccl: str
    """By what NCCL lets ranks share a GPU; empty where it is not asked to."""

    @property
    def words(self) -> str:
        """For people."""
        return f"{EMULATION}: {self.num_sharing} ranks share one GPU"


def share_device(
    rank: int,
    ranks: tuple[int, int],
    wanted: str,
    nccl_library: str | None,
    maps: Path = Path("/proc/self/maps"),
) -> SharedDevice | None:
    """None where every rank of the host has a GPU of its own. ranks: (ranks, GPUs) of this host;
    wanted: the collective asked for. Raises ConfigError where `nccl_library` was not loaded first.
    """
    num_ranks, num_gpus = ranks
    if num_ranks <= num_gpus:
        return None
    num_sharing = -(-num_ranks // num_gpus)
    few = {"NCCL_MAX_CTAS": "4" if num_sharing <= _FEW_RANKS else "2"}
    if nccl_library is not None:
        _require_loaded(nccl_library, maps)
        told = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", **_NCCL, **few}
        by_nccl = f"{Path(nccl_library).name} lets ranks share a GPU"
        return SharedDevice(num_sharing, {**_SYMMETRIC, **told}, by_nccl)
    if wanted == "nccl":
        told = {"NCCL_HOSTID": f"rank{rank}", **_AS_HOSTS, **_NCCL, **few}
        by_nccl = "NCCL takes each rank for a host, and goes through sockets"
        return SharedDevice(num_sharing, {**_SYMMETRIC, **told}, by_nccl)
    return SharedDevice(num_sharing, dict(_SYMMETRIC), "")


def preload_variables(nccl_library: str | None) -> dict[str, str]:
    """What a process is started with, so that it has this NCCL instead of torch's. Raises
    ConfigError."""
    if nccl_library is None:
        return {}
    path = Path(nccl_library)
    if not path.is_file():
        raise ConfigError(
            f"--nccl-library {nccl_library}: there is no such file; name the libnccl.so.2 of an "
            "nvidia-nccl wheel of 2.30 or newer"
        )
    return {"LD_PRELOAD": str(path.resolve())}


def _require_loaded(nccl_library: str, maps: Path) -> None:
    wanted = str(Path(nccl_library).resolve())
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if line.strip()}
    if wanted not in loaded:
        raise ConfigError(
            f"--nccl-library {nccl_library} is not loaded in this process, and torch brings an "
            f"NCCL of its own; start it with LD_PRELOAD={wanted}, or through `tpinfer generate`"
        )
