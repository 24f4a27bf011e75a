"""Rank program of test_loading: load one rank's share and say what it took from the system."""

import ctypes
import re
from pathlib import Path

from tpinfer.launching.seat import Seat

_M_MMAP_THRESHOLD = -3
"""mallopt(3)."""


def load(seat: Seat, directory: str) -> dict[str, int]:
    """Bytes of the rank's share in the file and in memory, bytes the system read for it, and by how
    much its memory grew at most meanwhile.
    """
    import torch

    from tpinfer.checkpoint.loader import load_parameters
    from tpinfer.checkpoint.reader import CheckpointReader
    from tpinfer.config.dtypes import DType
    from tpinfer.config.huggingface import read_model_spec
    from tpinfer.numerics.torch_dtypes import to_torch
    from tpinfer.sharding.parameters import ParameterSpec, decoder_parameters
    from tpinfer.sharding.partition import partition_model

    spec = read_model_spec(Path(directory))
    wanted = decoder_parameters(spec, partition_model(spec, seat.world), DType.FLOAT32)

    def allocate(parameter: ParameterSpec) -> torch.Tensor:
        return torch.empty(parameter.shard.local_shape(seat.rank), dtype=to_torch(parameter.dtype))

    # What is given back leaves at once, so that the peak is what was held and not the allocator's.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 << 10)
    with CheckpointReader(Path(directory)) as reader:  # once for the pages of code that it takes
        load_parameters(reader, wanted, seat.rank, allocate)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before_bytes, read_bytes = _status("VmRSS"), _num_read()
    with CheckpointReader(Path(directory)) as reader:
        loaded = load_parameters(reader, wanted, seat.rank, allocate)
    grown_bytes, read_bytes = _status("VmHWM") - before_bytes, _num_read() - read_bytes
    num_elements = sum(tensor.numel() for tensor in loaded.values())
    assert all(bool(tensor.isfinite().all()) for tensor in loaded.values())
    return {
        "share_bytes": num_elements * spec.dtype.num_bytes,
        "kept_bytes": num_elements * 4,
        "read_bytes": read_bytes,
        "grown_bytes": grown_bytes,
    }


def _num_read() -> int:
    """Bytes this process has asked the system for, from files and elsewhere."""
    found = re.search(r"^rchar: (\d+)$", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10
