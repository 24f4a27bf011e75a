"""What the KV cache stores, named without torch: its layout over the ranks and its number
formats."""

from typing import Literal

from tpinfer.config.dtypes import DType

KVLayoutName = Literal["auto", "replicated"]
KVCacheDTypeName = Literal["auto", "bf16", "int8", "fp8"]
SCALE_BYTES = 4
"""One float32 factor beside each stored key and value vector of an 8-bit cache."""
_STORED_AS = {"bf16": DType.BFLOAT16, "int8": DType.INT8, "fp8": DType.FLOAT8_E4M3}


def kv_cache_dtype(name: KVCacheDTypeName, compute_dtype: DType) -> DType:
    """The stored dtype; `auto` is the one computed in."""
    return compute_dtype if name == "auto" else _STORED_AS[name]


def has_scales(dtype: DType) -> bool:
    """Whether a cache of `dtype` keeps a scale per token and head."""
    return dtype.num_bytes == 1


def kv_vector_bytes(head_dim: int, dtype: DType) -> int:
    """Bytes of one head's key, or value, of one token, its scale included."""
    return head_dim * dtype.num_bytes + (SCALE_BYTES if has_scales(dtype) else 0)
