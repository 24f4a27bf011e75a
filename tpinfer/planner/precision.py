"""Number formats of a run by the names that people give them."""

from dataclasses import dataclass

from tpinfer.config.dtypes import DType
from tpinfer.config.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Precision:
    """What weights, products and the cache are stored and computed in."""

    name: str
    weight_bytes: float
    """Bytes of one weight of a layer's linears, its part of a scale included."""
    product: str
    """Format that linears multiply in: a `DType`, or `fp4`, which torch has no element type for."""
    activation: DType = DType.BFLOAT16
    """Format of activations, of the embedding and of the head."""
    kv: DType = DType.BFLOAT16

    def with_kv(self, kv: DType) -> "Precision":
        """The same with another cache format."""
        return Precision(self.name, self.weight_bytes, self.product, self.activation, kv)


_SCALE_GROUP = 128
"""Weights that share a scale of two bytes in the int4 formats of AWQ and GPTQ."""
_FP4_GROUP = 16
"""Values that share a scale of one byte in NVFP4."""
PRECISIONS = {
    one.name: one
    for one in (
        Precision("fp32", 4.0, DType.FLOAT32, DType.FLOAT32, DType.FLOAT32),
        Precision("bf16", 2.0, DType.BFLOAT16),
        Precision("fp16", 2.0, DType.FLOAT16, DType.FLOAT16, DType.FLOAT16),
        Precision("fp8", 1.0, DType.FLOAT8_E4M3),
        Precision("int8", 1.0, DType.INT8),
        Precision("int4", 0.5 + 2 / _SCALE_GROUP, DType.BFLOAT16),
        Precision("fp4", 0.5 + 1 / _FP4_GROUP, "fp4"),
    )
}
"""int4 stores weights alone: products are made in bfloat16."""


def precision_named(name: str) -> Precision:
    """The format of that name. Raises ConfigError."""
    if name not in PRECISIONS:
        raise ConfigError(f"precision {name!r} is unknown; give one of {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def ledger_precision(compute: DType, kv: DType) -> Precision:
    """Weights as they are computed in."""
    for one in PRECISIONS.values():
        if one.product == compute and one.activation is compute:
            return one.with_kv(kv)
    return Precision(compute.value, float(compute.num_bytes), compute, compute, kv)
