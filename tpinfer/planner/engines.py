"""How serving engines run by default, as far as it bears on speed and room for the cache.

Sources: the engines' own documentation of these options. `tpinfer` is this runtime.
"""

from dataclasses import dataclass

from tpinfer.config.engine import DEFAULT_BATCHED_TOKENS
from tpinfer.config.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EngineHabits:
    """One engine's defaults."""

    name: str
    memory_share: float
    """Of a device's memory, what the engine may fill."""
    shares_rest: bool
    """Whether that is of the memory that weights leave, rather than of all of it."""
    max_num_seqs: int
    max_num_batched_tokens: int
    reserves_output: bool
    """Whether a request is admitted only if its whole output fits too."""
    quantizes_kv: bool
    """Whether the cache is 8-bit where the weights are 8-bit or smaller; else it has the compute
    dtype."""


ENGINES = {
    one.name: one
    for one in (
        # trtllm-bench: kv_cache_free_gpu_mem_fraction 0.95, GUARANTEED_NO_EVICT, max_num_tokens
        # 8192, max_batch_size 2048; FP8 checkpoints of ModelOpt quantize the cache as well.
        EngineHabits("trtllm", 0.95, True, 2048, 8192, True, True),
        # gpu_memory_utilization 0.9, kv-cache-dtype auto; servers are benchmarked with 8192 tokens.
        EngineHabits("vllm", 0.90, False, 1024, 8192, False, False),
        # mem-fraction-static 0.88, kv-cache-dtype auto, chunked-prefill-size 8192.
        EngineHabits("sglang", 0.88, False, 1024, 8192, False, False),
        # Without a topology; with one both plan and runtime ask `costs.chunk`.
        EngineHabits("tpinfer", 0.90, False, 256, DEFAULT_BATCHED_TOKENS, False, False),
    )
}


def engine_named(name: str) -> EngineHabits:
    """Raises ConfigError for an engine that is not known."""
    if name not in ENGINES:
        raise ConfigError(f"engine {name!r} is unknown; known are {', '.join(ENGINES)}")
    return ENGINES[name]
