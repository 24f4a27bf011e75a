"""safetensors files read by byte range. Knows headers and offsets, not what the tensors are for.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}},
then the bytes; offsets count from the end of the header. Several files are tied together by
model.safetensors.index.json. Pickle files are never opened.
"""

import itertools
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tpinfer.config.dtypes import DType
from tpinfer.config.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""Longest header that is believed; safetensors' own limit."""
_DTYPES = {
    "F32": DType.FLOAT32,
    "BF16": DType.BFLOAT16,
    "F16": DType.FLOAT16,
    "F8_E4M3": DType.FLOAT8_E4M3,
    "I8": DType.INT8,
    "U8": DType.UINT8,
    "I32": DType.INT32,
    "I64": DType.INT64,
    "BOOL": DType.BOOL,
}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    file: Path
    dtype: DType
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    stop: int
    """One past the last byte."""


class CheckpointReader:
    """All tensors of a checkpoint directory, readable by byte range. Close it, or use it in
    `with`."""

    def __init__(self, directory: Path) -> None:
        """Read every header. Raises CheckpointError naming the file and what is wrong with it."""
        self.directory = directory
        self.bytes_read = 0
        """Bytes asked of the system for tensors, headers not counted."""
        self._files: dict[Path, int] = {}
        try:
            self.tensors: Mapping[str, TensorEntry] = self._open_all()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, entry: TensorEntry, offset: int, target: memoryview) -> None:
        """Fill `target` from `offset` bytes into the tensor. Raises CheckpointError if the file
        ends first."""
        descriptor, place, num_left = self._files[entry.file], entry.start + offset, len(target)
        self.bytes_read += num_left
        while num_left:
            count = os.preadv(descriptor, [target[len(target) - num_left :]], place)
            if count <= 0:
                raise CheckpointError(
                    f"{entry.file}: ends at byte {place}, {num_left} bytes short of a tensor; "
                    "it changed or was truncated - copy it again"
                )
            place += count
            num_left -= count

    def _open_all(self) -> dict[str, TensorEntry]:
        index = self.directory / "model.safetensors.index.json"
        single = self.directory / "model.safetensors"
        if index.is_file():
            return self._open_indexed(index)
        if single.is_file():
            return self._open_file(single)
        pickles = sorted(path.name for pattern in _PICKLES for path in self.directory.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{self.directory}: has only pickle weights ({pickles[0]}), which can run code "
                "when opened and "
                "are refused; convert them with transformers' save_pretrained(..., "
                "safe_serialization=True)"
            )
        raise CheckpointError(
            f"{self.directory}: has neither model.safetensors nor model.safetensors.index.json; "
            "point --model at a complete checkpoint"
        )

    def _open_indexed(self, index: Path) -> dict[str, TensorEntry]:
        weight_map = _index_map(index)
        found: dict[str, TensorEntry] = {}
        for name in sorted(set(weight_map.values())):
            path = self.directory / name
            if not path.is_file():
                raise CheckpointError(f"{index}: names {name}, which is missing; download it again")
            found |= self._open_file(path)
        lost = next((tensor for tensor in weight_map if tensor not in found), None)
        if lost is not None:
            raise CheckpointError(
                f"{index}: places tensor {lost} in {weight_map[lost]}, whose header lacks it; "
                "index and files are of different checkpoints"
            )
        return found

    def _open_file(self, path: Path) -> dict[str, TensorEntry]:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be opened ({error.strerror}); check permissions"
            ) from error
        self._files[path] = descriptor
        size = os.fstat(descriptor).st_size
        header, first = _read_header(path, descriptor, size)
        entries = {
            name: _entry(path, name, fields, first, size)
            for name, fields in header.items()
            if name != "__metadata__"
        }
        _refuse_overlap(path, entries)
        return entries


def _index_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = [(str(k), str(v)) for k, v in weight_map.items()]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index}: is not a weight index ({error!r}); expected an object with `weight_map`"
        ) from error
    for _, file in names:
        if file != Path(file).name or file in (".", ".."):
            raise CheckpointError(
                f"{index}: names file {file!r} outside its own directory; refused"
            )
    return dict(names)


def _read_header(path: Path, descriptor: int, size: int) -> tuple[dict[str, Any], int]:
    prefix = os.pread(descriptor, 8, 0)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(
            f"{path}: says its header has {length} bytes, but the file has {size}; "
            "it is truncated or not a safetensors file - copy it again"
        )
    try:
        header = json.loads(os.pread(descriptor, length, 8))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: header is not JSON ({error}); copy the file again"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header is a {type(header).__name__}, expected an object")
    return header, 8 + length


def _entry(path: Path, name: str, fields: Any, first: int, size: int) -> TensorEntry:
    try:
        dtype_name, shape = fields["dtype"], tuple(fields["shape"])
        start, stop = fields["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: tensor {name}: header entry {fields!r:.80} lacks dtype, shape or "
            "data_offsets; copy the file again"
        ) from error
    if dtype_name not in _DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name}: dtype {dtype_name} is not supported; use one of "
            f"{', '.join(_DTYPES)}"
        )
    dtype = _DTYPES[dtype_name]
    if not whole or stop - start != prod(shape) * dtype.num_bytes:
        raise CheckpointError(
            f"{path}: tensor {name}: shape {shape} of {dtype_name} does not fill offsets "
            f"{start}..{stop}; the file is damaged - copy it again"
        )
    if first + stop > size:
        raise CheckpointError(
            f"{path}: tensor {name}: expected to end at byte {first + stop}, but the file has "
            f"{size}; "
            "it is truncated - copy it again"
        )
    return TensorEntry(path, dtype, shape, first + start, first + stop)


def _refuse_overlap(path: Path, entries: Mapping[str, TensorEntry]) -> None:
    placed = sorted((e.start, e.stop, name) for name, e in entries.items() if e.stop > e.start)
    for (_, stop, before), (start, _, behind) in itertools.pairwise(placed):
        if start < stop:
            raise CheckpointError(
                f"{path}: tensors {before} and {behind} overlap; the file is damaged"
            )
