"""The project's dtypes as torch's. The only place that knows both."""

import torch

from tpinfer.config.dtypes import DType


def to_torch(dtype: DType) -> torch.dtype:
    """torch's dtype of the same name."""
    return getattr(torch, dtype.value)


def from_torch(dtype: torch.dtype) -> DType:
    """The project's name for a torch dtype. Raises ValueError for one it has none for."""
    return DType(str(dtype).removeprefix("torch."))
