"""What a framework operator costs, from the shapes of its inputs.

FLOPs count a multiply-add as two. Bytes are each input read once and the output written once, with
nothing kept in a cache between them. `operators` has the models.
"""

from dataclasses import dataclass
from math import prod

import msgspec

from tpinfer.config.dtypes import DType

MOST = 1 << 62
"""Numbers beyond it are damage."""
_DTYPES = {
    "float": (DType.FLOAT32, 4), "double": (DType.FLOAT32, 8), "c10::half": (DType.FLOAT16, 2),
    "half": (DType.FLOAT16, 2), "c10::bfloat16": (DType.BFLOAT16, 2), "int": (DType.INT32, 4),
    "bfloat16": (DType.BFLOAT16, 2), "c10::float8_e4m3fn": (DType.FLOAT8_E4M3, 1),
    "c10::float8_e4m3fnuz": (DType.FLOAT8_E4M3, 1), "c10::float8_e5m2": (DType.FLOAT8_E4M3, 1),
    "c10::float8_e5m2fnuz": (DType.FLOAT8_E4M3, 1), "c10::float8_e8m0fnu": (DType.FLOAT8_E4M3, 1),
    "long int": (DType.INT64, 8), "long": (DType.INT64, 8), "int64": (DType.INT64, 8),
    "long long": (DType.INT64, 8), "short": (DType.INT32, 2), "short int": (DType.INT32, 2),
    "signed char": (DType.INT8, 1), "char": (DType.INT8, 1), "unsigned char": (DType.UINT8, 1),
    "uint8": (DType.UINT8, 1), "bool": (DType.BOOL, 1), "float32": (DType.FLOAT32, 4),
    "float16": (DType.FLOAT16, 2), "int32": (DType.INT32, 4), "int8": (DType.INT8, 1),
    "float8_e4m3fn": (DType.FLOAT8_E4M3, 1), "float64": (DType.FLOAT32, 8),
}  # fmt: skip
"""Names recorders use -> (dtype to judge by, bytes of an element)."""
_OF_LISTS = (DType.BFLOAT16, 2)
"""Recorders do not tell the dtype of tensors in a list: two bytes, so that no floor is overstated
in the formats that models mostly use."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input."""

    dims: tuple[int, ...]
    dtype: DType
    element_bytes: int
    in_list: bool = False
    """One of a list of tensors: its dtype is a guess."""

    @property
    def num_elements(self) -> int:
        return prod(self.dims)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.element_bytes


@dataclass(frozen=True, slots=True)
class ShapeCost:
    """What one call does."""

    flops: int
    num_bytes: int
    dtype: DType


def parse_shapes(shapes: str) -> list[Tensor]:
    """Tensors among the inputs, in order; lists of tensors are laid flat. Empty for damage."""
    try:
        dims, types = msgspec.json.decode(shapes)
        pairs = list(zip(dims, types, strict=True))
    except (ValueError, TypeError, RecursionError):
        return []
    found = []
    for sizes, named in pairs:
        dtype = _DTYPES.get(str(named).lower())
        many = isinstance(sizes, list) and sizes and all(isinstance(one, list) for one in sizes)
        for one in sizes if many else [sizes]:
            if _is_dims(one) and (dtype is not None or many):
                kind, size = dtype or _OF_LISTS
                found.append(Tensor(tuple(one), kind, size, bool(many)))
    return found


def _is_dims(sizes: object) -> bool:
    if not isinstance(sizes, list) or not sizes:
        return False
    return all(type(size) is int and 0 <= size <= MOST for size in sizes)
