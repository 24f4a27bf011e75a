"""What a user may set about one engine run. Holds wishes, not what was decided from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tpinfer.config.dtypes import DType
from tpinfer.config.errors import ConfigError
from tpinfer.config.kv_cache import KVCacheDTypeName, KVLayoutName
from tpinfer.config.model import ModelSpec

LoadFormat = Literal["auto", "random"]
CollectiveName = Literal[
    "auto",
    "nccl",
    "gloo",
    "mpi",
    "shared_memory",
    "deepspeed",
    "symmetric_memory",
    "nccl_symmetric",
]
DeviceName = Literal["auto", "cpu", "cuda"]
MAX_WAIT_S = 1e6
"""Longest --wait-timeout, about eleven days: what waits counts in 64-bit ns."""
MAX_STEPS_IN_FLIGHT = 16
DEFAULT_BATCHED_TOKENS = 2048
"""Most tokens of a step where neither the user nor a topology's rates say another number."""
COMPUTE_DTYPES = (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one run, the same on every rank. Raises ConfigError for what cannot work."""

    model_dir: Path
    """Directory of a checkpoint in Hugging Face's layout."""
    tp: int = 1
    """Tensor-parallel ranks."""
    dtype: DType | None = None
    """Compute dtype; None takes what suits the checkpoint and the machine."""
    load_format: LoadFormat = "auto"
    """`random` makes weights from the seed instead of reading any."""
    max_model_len: int | None = None
    """Longest sequence in tokens; None takes the checkpoint's limit as far as KV memory allows."""
    memory_utilization: float = 0.9
    """Share of the memory free at start that weights, activations and KV may take together."""
    kv_bytes: int | None = None
    """Bytes of KV cache per rank; None takes what is left."""
    kv_host_bytes: int = 0
    """Host memory per rank for blocks that are moved out of the cache; 0 keeps none."""
    kv_layout: KVLayoutName = "auto"
    """`auto` shares the blocks of a KV head out among the ranks that read it, where the cut allows
    it; `replicated` stores it whole on each."""
    kv_cache_dtype: KVCacheDTypeName = "auto"
    """What keys and values are stored in; `auto` is the compute dtype."""
    block_size: int = 16
    """Tokens per KV block."""
    max_num_seqs: int = 32
    """Most sequences in one step."""
    max_num_batched_tokens: int | None = None
    """Most tokens in one step; a longer prompt is prefilled in chunks. None takes what suits the
    rates of the topology, and without one 2048."""
    step_budget_s: float | None = None
    """Predicted time of a step that prompts may fill it up to; None counts tokens alone."""
    prefix_caching: bool = True
    """Whether requests share the keys and values of what their prompts begin with."""
    steps_in_flight: int | None = None
    """Steps on their way at once; above 1 the next ones are planned while one runs. None is 2 on
    GPUs, which then never wait for the host, and 1 on CPUs."""
    cuda_graphs: bool = True
    """Whether decode steps on a GPU are recorded once and replayed, where they can be."""
    batch_invariant: bool = False
    """Whether a row's attention on a GPU is the same bits in every batch, which costs speed."""
    collective: CollectiveName = "auto"
    """Backend of the tensor-parallel collectives."""
    device: DeviceName = "auto"
    """Where ranks compute."""
    share_device: bool = False
    """Whether several ranks may sit on one GPU: emulation, with no claim to speed."""
    nccl_library: str | None = None
    """libnccl.so.2 to load instead of torch's, in ranks that share a GPU; None keeps torch's."""
    topology: str | None = None
    """Topology file, or name of a shipped one; None measures the ceilings at start-up."""
    topology_settings: tuple[str, ...] = ()
    """Values of the topology to change, as `hosts.box.links.0.bw=16GB/s`."""
    seed: int = 0
    """Key of random weights."""
    num_layers_override: int | None = None
    """Build only this many layers (with random weights, a slice of a large shape)."""
    wait_timeout_s: float = 300.0
    """Longest wait for another rank before the run ends."""
    step_timeout_s: float = 60.0
    """Longest wait for a step before its ranks are given up. The first step of a generation, in
    which kernels are compiled, has `wait_timeout_s` where that is longer."""
    max_rebuilds: int = 3
    """How often in a row an engine that starts its own ranks starts them anew after one died or
    hung, without any request ending in between; 0 never."""

    def __post_init__(self) -> None:
        self._require_known("load_format", get_args(LoadFormat))
        self._require_known("collective", get_args(CollectiveName))
        self._require_known("device", get_args(DeviceName))
        self._require_known("kv_layout", get_args(KVLayoutName))
        self._require_known("kv_cache_dtype", get_args(KVCacheDTypeName))
        if self.dtype is not None and self.dtype not in COMPUTE_DTYPES:
            allowed = ", ".join(COMPUTE_DTYPES)
            raise ConfigError(f"dtype={self.dtype} cannot be computed in; use one of {allowed}")
        self._require_types()
        whole = ("tp", "block_size", "max_num_seqs")
        optional = ("max_model_len", "kv_bytes", "num_layers_override", "max_num_batched_tokens")
        optional += ("steps_in_flight",)
        for name in whole + optional:
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a whole number of 1 or more")
        if (self.steps_in_flight or 1) > MAX_STEPS_IN_FLIGHT:
            raise ConfigError(
                f"steps_in_flight={self.steps_in_flight} is out of range; use 1 to "
                f"{MAX_STEPS_IN_FLIGHT}: 2 keeps a device busy, and an end is noticed that much "
                "later"
            )
        if self.step_budget_s is not None and not 0 < self.step_budget_s < 1e6:
            raise ConfigError(
                f"step_budget_s={self.step_budget_s} must be above 0 seconds, such as 0.025"
            )
        host = self.kv_host_bytes
        if isinstance(host, bool) or not isinstance(host, int) or host < 0:
            raise ConfigError(f"kv_host_bytes={host!r} must be a whole number of 0 or more")
        if not 0 < self.memory_utilization <= 1:
            raise ConfigError(
                f"memory_utilization={self.memory_utilization} must be above 0 and at most 1; "
                "0.9 leaves a tenth of the free memory to others"
            )
        if not 0 < self.wait_timeout_s <= MAX_WAIT_S:
            raise ConfigError(
                f"wait_timeout_s={self.wait_timeout_s} must be above 0 and at most {MAX_WAIT_S:g} "
                "seconds"
            )
        if not 0 < self.step_timeout_s <= MAX_WAIT_S:
            raise ConfigError(
                f"step_timeout_s={self.step_timeout_s} must be above 0 and at most {MAX_WAIT_S:g} "
                "seconds"
            )
        most = self.max_rebuilds
        if isinstance(most, bool) or not isinstance(most, int) or most < 0:
            raise ConfigError(f"max_rebuilds={most!r} must be a whole number of 0 or more")
        if self.num_layers_override is not None and self.load_format != "random":
            raise ConfigError(
                f"num_layers_override={self.num_layers_override} leaves out layers of a real "
                "checkpoint; use it with load_format=random"
            )

    def _require_types(self) -> None:
        for name in ("memory_utilization", "step_budget_s", "wait_timeout_s", "step_timeout_s"):
            value = getattr(self, name)
            if name == "step_budget_s" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{name}={value!r} is not a number; give one such as 0.5")
        for name in ("prefix_caching", "batch_invariant", "cuda_graphs", "share_device"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"{name}={value!r} must be True or False")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed={self.seed!r} must be a whole number")
        if not isinstance(self.topology, str | None):
            raise ConfigError(f"topology={self.topology!r} must be text: a file, or a name")
        if not isinstance(self.nccl_library, str | None):
            raise ConfigError(f"nccl_library={self.nccl_library!r} must be text: a file")
        if self.nccl_library is not None and not self.share_device:
            raise ConfigError(
                f"--nccl-library {self.nccl_library} is for ranks that share a GPU; add "
                "--share-device"
            )
        if self.topology_settings and self.topology is None:
            raise ConfigError("--set changes a topology; name one with --topology")

    @property
    def batched_tokens(self) -> int:
        """Most tokens in one step, as given or by default."""
        return self.max_num_batched_tokens or DEFAULT_BATCHED_TOKENS

    def check_model(self, spec: ModelSpec) -> None:
        """Raises ConfigError where these settings do not suit the model."""
        if self.max_model_len is not None and self.max_model_len > spec.max_position:
            raise ConfigError(
                f"max_model_len={self.max_model_len} is beyond the {spec.max_position} positions "
                "the model was made for (max_position_embeddings in config.json); lower it"
            )

    def _require_known(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ConfigError(f"{name}={value!r} is not known; use one of {', '.join(allowed)}")


@dataclass(frozen=True, slots=True)
class RecordingRequest:
    """Which steps of a run to record, and where to."""

    directory: Path
    num_skipped: int
    """Steps that run before; 0 records from before the first request is accepted."""
    num_steps: int
