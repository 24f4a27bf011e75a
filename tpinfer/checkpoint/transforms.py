"""From file bytes to a parameter's memory: straight where the dtypes agree, through a small
scratch where not."""

from collections.abc import Iterator

import torch

from tpinfer.checkpoint.reader import CheckpointReader, TensorEntry
from tpinfer.numerics.torch_dtypes import from_torch, to_torch
from tpinfer.sharding.spec import Range

SCRATCH_BYTES = 4 << 20
"""Most bytes ever held that are not a parameter."""


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as writable bytes."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_slice(
    reader: CheckpointReader,
    entry: TensorEntry,
    rows: Range,
    columns: Range | None,
    target: torch.Tensor,
) -> None:
    """Fill `target` with rows (and, where given, columns) of a tensor in the file.

    target: [rows] or [rows, columns], any dtype and device. Only the bytes asked for are read.
    The row of a wide tensor is one read; whole rows are read many at a time.
    """
    num_rows = rows[1] - rows[0]
    width = entry.shape[1] if len(entry.shape) == 2 else 1
    first, last = columns or (0, width)
    if not num_rows or first == last:
        return
    matrix = target.view(num_rows, last - first)
    is_direct = (
        target.device.type == "cpu"
        and target.is_contiguous()
        and from_torch(target.dtype) is entry.dtype
    )
    if is_direct:
        _read_rows(reader, entry, rows, (first, last), matrix)
        return
    for start, stop in _chunks(num_rows, (last - first) * entry.dtype.num_bytes):
        scratch = torch.empty(stop - start, last - first, dtype=to_torch(entry.dtype))
        _read_rows(reader, entry, (rows[0] + start, rows[0] + stop), (first, last), scratch)
        matrix[start:stop].copy_(scratch)


def _chunks(num_rows: int, row_bytes: int) -> Iterator[Range]:
    step = max(1, SCRATCH_BYTES // row_bytes)
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def _read_rows(
    reader: CheckpointReader, entry: TensorEntry, rows: Range, columns: Range, target: torch.Tensor
) -> None:
    """Straight into contiguous CPU memory of the file's dtype."""
    width = entry.shape[1] if len(entry.shape) == 2 else 1
    size = entry.dtype.num_bytes
    view = byte_view(target)
    if columns == (0, width):
        reader.read(entry, rows[0] * width * size, view)
        return
    part_bytes = (columns[1] - columns[0]) * size
    offset = (rows[0] * width + columns[0]) * size
    for start in range(0, len(view), part_bytes):
        reader.read(entry, offset, view[start : start + part_bytes])
        offset += width * size
