"""What is decided for this machine, in one frozen record with the reason behind each choice.

`choose_execution` is pure: the same configuration and machine give the same choices.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from tpinfer.config.ceilings import Ceilings
from tpinfer.config.dtypes import DType
from tpinfer.config.engine import EngineConfig
from tpinfer.config.kv_cache import has_scales, kv_cache_dtype, kv_vector_bytes
from tpinfer.config.model import ModelSpec
from tpinfer.config.units import format_size
from tpinfer.costs.binding import Binding
from tpinfer.sharding.partition import Partition


@dataclass(frozen=True, slots=True)
class Choice:
    """One decision."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class ExecutionChoices:
    """How one run computes."""

    device_type: str
    """`cpu` or `cuda`."""
    compute_dtype: DType
    kv_dtype: DType
    num_threads: int
    """CPU threads of each rank's tensor ops."""
    reasons: tuple[Choice, ...]

    def with_choice(self, choice: Choice) -> "ExecutionChoices":
        """The same with one more decision on record."""
        return replace(self, reasons=(*self.reasons, choice))

    def explain(self) -> list[str]:
        """One line per choice, for people."""
        width = max(len(choice.name) for choice in self.reasons)
        return [f"{c.name:<{width}}  {c.value}  ({c.reason})" for c in self.reasons]


def choose_execution(
    config: EngineConfig,
    spec: ModelSpec,
    device: str,
    ranks_per_host: int,
    num_cores: int,
    cpu_flags: Collection[str],
    binding: Binding | None = None,
    ceilings: Ceilings | None = None,
) -> ExecutionChoices:
    """Decide dtype and threads of a rank that sits on `device` (`cpu` or `cuda:i`); `binding` says
    more of the threads where it is known, `ceilings` what its arithmetic reaches."""
    device_type = device.partition(":")[0]
    dtype, dtype_reason = _dtype(config, spec, cpu_flags, device_type)
    threads = max(1, num_cores // ranks_per_host)
    why = f"{num_cores} cores over {ranks_per_host} ranks"
    placed: tuple[Choice, ...] = ()
    if binding is not None:
        threads, why = binding.num_threads, binding.threads_reason
        placed = (Choice("binding", binding.place, binding.place_reason),)
    return ExecutionChoices(
        device_type=device_type,
        compute_dtype=dtype,
        kv_dtype=kv_cache_dtype(config.kv_cache_dtype, dtype),
        num_threads=threads,
        reasons=(
            Choice(
                "device", device, "asked for" if config.device != "auto" else "what the seat has"
            ),
            Choice("dtype", dtype.value, dtype_reason + _rates(dtype, spec, ceilings)),
            _kv_dtype_choice(config, spec, dtype),
            Choice("threads", str(threads), why),
            *placed,
        ),
    )


def shared_device_choice(words: str) -> Choice:
    """That figures of this run claim nothing."""
    why = "asked for by --share-device; ranks take turns, and what one waits for is no cause"
    return Choice("shared device", words, why)


def attention_choice(is_native: bool, reason: str) -> Choice:
    """What runs attention; `reason` says where the compiled kernel came from, or why there is
    none."""
    if is_native:
        return Choice("attention", "compiled kernel for decode, torch for prompts", reason)
    return Choice("attention", "reference", f"plain torch over the paged cache; {reason}")


def triton_attention_choice(is_used: bool, reason: str) -> Choice:
    """What runs attention on a GPU; `reason` as for `attention_choice`."""
    if is_used:
        return Choice("attention", "paged kernel for decode and prompts", reason)
    return Choice("attention", "reference", f"plain torch, sequence by sequence; {reason}")


def prefill_attention_choice(library: str | None, reason: str) -> Choice:
    """What runs attention for the prompts of a step on a GPU, where the Triton kernel decodes:
    `library`, or the same kernel. `reason` says how fast the library is, or why none is used."""
    return Choice("prefill attention", library or "Triton", reason)


def recorded_choice(counts: Sequence[int], reason: str) -> Choice:
    """For which numbers of rows decode steps were recorded; for none, `reason` says why."""
    if not counts:
        return Choice("recorded steps", "none", f"every op is launched by itself; {reason}")
    value = f"for up to {max(counts)} rows"
    return Choice("recorded steps", value, f"{len(counts)} sizes from {min(counts)}; {reason}")


def sampling_choice(is_native: bool, reason: str) -> Choice:
    """What reads whole rows of logits; `reason` as for `attention_choice`."""
    if is_native:
        return Choice("sampling", "compiled passes over the logits", reason)
    return Choice("sampling", "reference", f"plain torch, the same tokens; {reason}")


def layers_choice(is_fused: bool, reason: str) -> Choice:
    """What computes norms, rotation and activation on a GPU; `reason` says where the kernels come
    from, or why they are not used."""
    if is_fused:
        return Choice("layers", "fused kernels around torch's products", reason)
    return Choice("layers", "plain torch", reason)


def device_sampling_choice(is_own: bool, reason: str) -> Choice:
    """What finds the likeliest tokens on a GPU; `reason` as for `layers_choice`."""
    if is_own:
        return Choice("sampling", "own kernel for greedy rows, torch for drawn ones", reason)
    return Choice("sampling", "reference", f"plain torch, the same tokens; {reason}")


def linears_choice(
    is_packed: bool, weight_bytes: int, skinny: str = "", why_plain: str = ""
) -> Choice:
    """How the `weight_bytes` of a rank's linears and head lie for matrix products. `skinny` says
    what multiplies few rows on a GPU, `why_plain` why only torch's product does."""
    size = format_size(weight_bytes)
    if is_packed:
        reason = f"{size} copied into oneDNN's blocks once; a tied head beside the embedding"
        return Choice("linears", "packed", reason)
    plain = f"torch's product over {size} of weights as they lie"
    if skinny:
        return Choice("linears", skinny, f"each measured at start; for more rows {plain}")
    return Choice("linears", "plain", f"{plain}; {why_plain}" if why_plain else plain)


def kv_layout_choice(config: EngineConfig, spec: ModelSpec, partition: Partition) -> Choice:
    """How KV heads lie on the ranks of `partition`, and why."""
    ranks, num_kv_heads = partition.kv_group_size, spec.num_kv_heads
    heads = f"{num_kv_heads} KV head{'' if num_kv_heads == 1 else 's'}"
    if ranks > 1:
        reason = f"{partition.size} ranks are a multiple of {heads}: no key is stored twice"
        return Choice("KV layout", f"blocks shared out over {ranks} ranks a head", reason)
    if not partition.num_replicated_kv_heads():
        on = f"on {partition.size} rank{'' if partition.size == 1 else 's'}"
        return Choice("KV layout", "own heads per rank", f"{heads} {on}")
    if config.kv_layout == "replicated":
        return Choice("KV layout", "replicated", "asked for")
    if partition.size % num_kv_heads:
        reason = f"{partition.size} ranks are no multiple of {heads}, so ranks share some"
    else:
        reason = f"uneven shares cut {heads} so that a rank reads two or ranks share unequally"
    return Choice("KV layout", "replicated", reason)


def _kv_dtype_choice(config: EngineConfig, spec: ModelSpec, compute_dtype: DType) -> Choice:
    dtype = kv_cache_dtype(config.kv_cache_dtype, compute_dtype)
    reason = "the compute dtype" if config.kv_cache_dtype == "auto" else "asked for"
    vectors = 2 * spec.num_layers * spec.num_kv_heads
    size = format_size(vectors * kv_vector_bytes(spec.head_dim, dtype))
    reason += f"; {size} a token over all heads"
    if has_scales(dtype):
        full = vectors * spec.head_dim * compute_dtype.num_bytes
        reason += f", a scale per token and head with it, instead of {format_size(full)}"
    return Choice("KV dtype", dtype.value, reason)


def _rates(dtype: DType, spec: ModelSpec, ceilings: Ceilings | None) -> str:
    """What products reach in `dtype` and in what else might have been taken."""
    if ceilings is None or dtype not in ceilings.flops_per_s:
        return ""
    rates = ceilings.flops_per_s
    others = dict.fromkeys(one for one in (spec.dtype, DType.FLOAT32) if one is not dtype)
    against = "".join(f", {rates[one] / 1e9:.3g} in {one}" for one in others if one in rates)
    return f"; products at {rates[dtype] / 1e9:.3g} GFLOPS{against}, by {ceilings.origin}"


def _dtype(
    config: EngineConfig, spec: ModelSpec, cpu_flags: Collection[str], device_type: str
) -> tuple[DType, str]:
    if config.dtype is not None:
        return config.dtype, "asked for"
    if device_type == "cpu" and spec.dtype is DType.FLOAT16 and "avx512_fp16" not in cpu_flags:
        return DType.FLOAT32, "float16 matmuls of more than one row are several times slower here"
    if device_type == "cpu" and "avx512_bf16" not in cpu_flags:
        return DType.FLOAT32, "no AVX512_BF16 here, so 16-bit matmuls would be slower than float32"
    if spec.dtype in (DType.BFLOAT16, DType.FLOAT16):
        return spec.dtype, "the checkpoint's"
    return DType.BFLOAT16 if device_type == "cuda" else spec.dtype, "for a float32 checkpoint"
