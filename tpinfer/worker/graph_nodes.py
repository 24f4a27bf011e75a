"""Kernels of a CUDA graph while it is recorded, asked of the driver: which of them an op added, and
what they are called.

Only names for a profiler depend on it. Where the driver has not these calls (12.3 has), or one of
them fails, nothing is known, and a recording is as good without.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

from tpinfer.costs.graph_nodes import name_pattern

_CAPTURING = 1
"""CU_STREAM_CAPTURE_STATUS_ACTIVE."""
_KERNEL = 0
"""CU_GRAPH_NODE_TYPE_KERNEL."""


class _KernelParams(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2 of cuda.h."""

    _fields_ = (
        ("func", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("params", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kern", ctypes.c_void_p),
        ("ctx", ctypes.c_void_p),
    )


class DriverError(Exception):
    """A call of the driver that is not there or failed."""


class Driver:
    """The few calls of libcuda that tell of a graph in the making."""

    def __init__(self, path: str = "libcuda.so.1") -> None:
        """Raises DriverError where the library or one of the calls is not there."""
        names = (
            "cuStreamGetCaptureInfo_v3",
            "cuGraphGetNodes",
            "cuGraphNodeGetType",
            "cuGraphKernelNodeGetParams_v2",
            "cuFuncGetName",
            "cuKernelGetName",
        )
        try:
            library = ctypes.CDLL(path)
            self._calls = {name: getattr(library, name) for name in names}
        except (OSError, AttributeError) as error:
            raise DriverError(str(error)) from error

    def nodes(self, stream: int) -> list[int]:
        """Nodes of the graph that a stream is recorded into, in no order that is promised. Raises
        DriverError where it is recorded into none."""
        status, place = ctypes.c_int(), ctypes.c_uint64()
        graph, before, edges = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        count = ctypes.c_size_t()
        # Edges are asked for too: without them it fails behind a dependent launch.
        outs = (status, place, graph, before, edges, count)
        self._call("cuStreamGetCaptureInfo_v3", ctypes.c_void_p(stream), *map(ctypes.byref, outs))
        if status.value != _CAPTURING:
            raise DriverError("the stream is not being recorded")
        self._call("cuGraphGetNodes", graph, None, ctypes.byref(count))
        found = (ctypes.c_void_p * count.value)()
        if count.value:
            self._call("cuGraphGetNodes", graph, found, ctypes.byref(count))
        return [node for node in found if node]

    def kernel_name(self, node: int) -> str | None:
        """Symbol of a node's kernel; None for copies and the like. Raises DriverError."""
        kind = ctypes.c_int()
        self._call("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
        if kind.value != _KERNEL:
            return None
        params, name = _KernelParams(), ctypes.c_char_p()
        self._call("cuGraphKernelNodeGetParams_v2", ctypes.c_void_p(node), ctypes.byref(params))
        call, handle = "cuFuncGetName", params.func
        if not handle:
            call, handle = "cuKernelGetName", params.kern
        self._call(call, ctypes.byref(name), ctypes.c_void_p(handle))
        return (name.value or b"").decode("utf-8", "replace")

    def _call(self, name: str, *arguments: Any) -> None:
        code = self._calls[name](*arguments)
        if code:
            raise DriverError(f"{name} failed with {code}")


class NodeWatch:
    """Kernels that come into one recording between two marks."""

    def __init__(self, driver: Driver, stream: int) -> None:
        """stream: handle of the stream that is recorded."""
        self._driver = driver
        self._stream = stream
        self._seen: set[int] = set()
        self._kernels: list[list[str]] | None = []

    def mark(self) -> None:
        """Call while the stream is recorded, at the start of what is to be told apart and behind
        every part of it."""
        if self._kernels is None:
            return
        try:
            fresh = [node for node in self._driver.nodes(self._stream) if node not in self._seen]
            names = [self._driver.kernel_name(node) for node in fresh]
        except DriverError:
            self._kernels = None
            return
        self._seen.update(fresh)
        self._kernels.append([name_pattern(name) for name in names if name is not None])

    def parts(self) -> Sequence[Sequence[str]] | None:
        """Patterns of the kernels before each mark and behind the mark before it; None where the
        driver did not tell."""
        return self._kernels


def load_driver() -> Driver | None:
    """The driver of this machine; None where it does not tell of graphs."""
    try:
        return Driver()
    except DriverError:
        return None
