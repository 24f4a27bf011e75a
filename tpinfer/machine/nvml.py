"""GPUs as the NVIDIA driver's management library lists them, through ctypes; no torch, no context.

Reads names, ids and memory only; never changes a setting.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

_LIBRARY = "libnvidia-ml.so.1"
_SUCCESS = 0
_TEXT_BYTES = 96


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card that the driver shows."""

    index: int
    """The driver's number for it."""
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def list_gpus(visible: tuple[str, ...] | None = None) -> tuple[tuple[Gpu, ...], str]:
    """(cards, why there are none). `visible` holds CUDA_VISIBLE_DEVICES; None shows all."""
    if visible == ():
        return (), "CUDA_VISIBLE_DEVICES is empty"
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return (), "no NVIDIA driver is installed"
    if (code := library.nvmlInit_v2()) != _SUCCESS:
        return (), f"the NVIDIA driver did not start (NVML error {code})"
    try:
        found = _read_all(library)
    finally:
        library.nvmlShutdown()
    shown = select_visible(found, visible)
    if shown:
        return shown, ""
    hidden = f"CUDA_VISIBLE_DEVICES hides all {len(found)}" if found else "the driver sees no card"
    return (), hidden


def select_visible(gpus: tuple[Gpu, ...], visible: tuple[str, ...] | None) -> tuple[Gpu, ...]:
    """The cards that CUDA_VISIBLE_DEVICES names, in its order.

    Entries are indices or (starts of) UUIDs; as in CUDA, the first unknown one ends the list. A MIG
    slice has an id of its own that cards do not carry, so it shows nothing here.
    """
    if visible is None:
        return gpus
    shown: list[Gpu] = []
    for name in visible:
        match = [g for g in gpus if str(g.index) == name or (name and g.uuid.startswith(name))]
        if len(match) != 1:
            break
        shown.append(match[0])
    return tuple(shown)


def _read_all(library: Any) -> tuple[Gpu, ...]:
    count = ctypes.c_uint()
    if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != _SUCCESS:
        return ()
    found = (_read(library, index) for index in range(count.value))
    return tuple(gpu for gpu in found if gpu is not None)


def _read(library: Any, index: int) -> Gpu | None:
    """One card; None where the driver does not let this process see it."""
    handle = ctypes.c_void_p()
    if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != _SUCCESS:
        return None
    memory = _Memory()
    library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    name, uuid = (
        _text(getter, handle) for getter in (library.nvmlDeviceGetName, library.nvmlDeviceGetUUID)
    )
    return Gpu(index, uuid, name, memory.total, memory.free)


def _text(getter: Any, handle: ctypes.c_void_p) -> str:
    buffer = ctypes.create_string_buffer(_TEXT_BYTES)
    known = getter(handle, buffer, ctypes.c_uint(_TEXT_BYTES)) == _SUCCESS
    return buffer.value.decode(errors="replace") if known else "unknown"
