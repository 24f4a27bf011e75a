"""The fields of NVIDIA's management library that describe a machine, through ctypes; no torch.

Every field is optional: what a driver does not know, or does not know yet, reads as None. Nothing
is ever set.
"""

import ctypes
from collections.abc import Callable
from typing import Any, Protocol

_LIBRARY = "libnvidia-ml.so.1"
_SUCCESS = 0
_TEXT_BYTES = 128
_CLOCK_COMPUTE, _CLOCK_MEMORY = 1, 2
_TEMPERATURE_GPU = 0
_SCOPE_NODE = 0
_NODE_WORDS = 16
_NVLINK_SPEED_MBPS = 90
_POWER_INSTANT = 186
MOST_LINKS = 36
"""NVML_NVLINK_MAX_LINKS."""
READ, NVLINK = 0, 2
"""Capabilities of `p2p_status`: NVML_P2P_CAPS_INDEX_READ, _NVLINK."""

Value = int | str


class Driver(Protocol):
    """Where fields are read from: the library, or a dict in tests."""

    def read(self, field: str, *at: int) -> Value | None:
        """A field of the machine (no `at`), of a device, of a slice (device, place) or link
        (device, link), or of a pair. None where unknown.

        driver_version, count; name, uuid, bus (`00000000:17:00.0`), memory_bytes, memory_node,
        compute_clock_mhz, memory_clock_mhz (the highest), compute_clock_now_mhz,
        memory_clock_now_mhz, clock_reasons (bits of nvmlClocksEventReasons), power_mw,
        power_limit_mw, temperature_c, bus_width_bits, pcie_generation, pcie_width,
        nvlink_mb_per_s, mig_mode, mig_places; slice_name, slice_uuid; nvlink_active,
        nvlink_remote_type (0 GPU, 2 switch), nvlink_remote_bus; ancestor (10 PIX, 20 PXB, 30 and
        40 PHB, 50 SYS); p2p_status (device, device, capability; 0 is OK).
        """
        ...


class _PciPlace(ctypes.Structure):
    """nvmlPciInfo_t."""

    _fields_ = (
        ("bus_legacy", ctypes.c_char * 16),
        ("domain", ctypes.c_uint),
        ("bus", ctypes.c_uint),
        ("device", ctypes.c_uint),
        ("device_id", ctypes.c_uint),
        ("subsystem_id", ctypes.c_uint),
        ("bus_id", ctypes.c_char * 32),
    )


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class _Field(ctypes.Structure):
    """nvmlFieldValue_t, its value as an unsigned number."""

    _fields_ = (
        ("field", ctypes.c_uint),
        ("scope", ctypes.c_uint),
        ("timestamp", ctypes.c_longlong),
        ("latency_us", ctypes.c_longlong),
        ("value_type", ctypes.c_uint),
        ("code", ctypes.c_uint),
        ("value", ctypes.c_ulonglong),
    )


class NvmlDriver:
    """Reads from the library that comes with the driver."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._handles: dict[tuple[int, ...], ctypes.c_void_p | None] = {}

    def read(self, field: str, *at: int) -> Value | None:
        """See `Driver`."""
        reader = _READERS.get(field)
        try:
            return reader(self, *at) if reader else None
        except AttributeError:  # an older library lacks the function
            return None

    def close(self) -> None:
        """Let go of the library."""
        self._library.nvmlShutdown()

    def handle(self, *at: int) -> ctypes.c_void_p | None:
        """Of a device, or of a slice of it."""
        if at not in self._handles:
            found = ctypes.c_void_p()
            if len(at) == 1:
                code = self._library.nvmlDeviceGetHandleByIndex_v2(at[0], ctypes.byref(found))
            else:
                card, place = self.handle(at[0]), ctypes.c_uint(at[1])
                get = self._library.nvmlDeviceGetMigDeviceHandleByIndex
                code = get(card, place, ctypes.byref(found)) if card else 1
            self._handles[at] = found if code == _SUCCESS else None
        return self._handles[at]

    def call(self, function: str, *arguments: Any) -> bool:
        """Whether a call succeeds; not with a handle that is not there."""
        if None in arguments:
            return False
        return getattr(self._library, function)(*arguments) == _SUCCESS

    def number(self, function: str, *arguments: Any) -> int | None:
        """The unsigned number that a function leaves in its last argument."""
        found = ctypes.c_uint()
        return found.value if self.call(function, *arguments, ctypes.byref(found)) else None

    def text(self, function: str, *arguments: Any) -> str | None:
        """The text that a function leaves in its last but one argument."""
        found = ctypes.create_string_buffer(_TEXT_BYTES)
        known = self.call(function, *arguments, found, ctypes.c_uint(_TEXT_BYTES))
        return (found.value.decode(errors="replace") or None) if known else None


def open_driver() -> tuple[NvmlDriver | None, str]:
    """(the driver, why there is none)."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None, "no NVIDIA driver is installed"
    if (code := library.nvmlInit_v2()) != _SUCCESS:
        return None, f"the NVIDIA driver did not start (NVML error {code})"
    return NvmlDriver(library), ""


def _bus(driver: NvmlDriver, index: int) -> str | None:
    found = _PciPlace()
    if not driver.call("nvmlDeviceGetPciInfo_v3", driver.handle(index), ctypes.byref(found)):
        return None
    return found.bus_id.decode(errors="replace") or None


def _remote_bus(driver: NvmlDriver, index: int, link: int) -> str | None:
    found = _PciPlace()
    arguments = driver.handle(index), ctypes.c_uint(link), ctypes.byref(found)
    if not driver.call("nvmlDeviceGetNvLinkRemotePciInfo_v2", *arguments):
        return None
    return found.bus_id.decode(errors="replace") or None


def _memory_bytes(driver: NvmlDriver, index: int) -> int | None:
    found = _Memory()
    if not driver.call("nvmlDeviceGetMemoryInfo", driver.handle(index), ctypes.byref(found)):
        return None
    return found.total


def _memory_node(driver: NvmlDriver, index: int) -> int | None:
    """The first memory node near the card, from a bit per node."""
    words = (ctypes.c_ulong * _NODE_WORDS)()
    arguments = driver.handle(index), ctypes.c_uint(_NODE_WORDS), words, ctypes.c_uint(_SCOPE_NODE)
    if not driver.call("nvmlDeviceGetMemoryAffinity", *arguments):
        return None
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    return next((i for i in range(bits * _NODE_WORDS) if words[i // bits] >> (i % bits) & 1), None)


def _clock(function: str, which: int) -> Callable[..., int | None]:
    """Reader of one of a device's clocks."""
    return lambda driver, index: driver.number(function, driver.handle(index), ctypes.c_uint(which))


def _field_value(driver: NvmlDriver, index: int, field: int) -> int | None:
    """A number of nvmlDeviceGetFieldValues; None where it is zero."""
    found = _Field(field=field)
    arguments = driver.handle(index), ctypes.c_int(1), ctypes.byref(found)
    known = driver.call("nvmlDeviceGetFieldValues", *arguments) and found.code == _SUCCESS
    return (found.value & 0xFFFFFFFF) or None if known else None


def _nvlink_mb_per_s(driver: NvmlDriver, index: int) -> int | None:
    return _field_value(driver, index, _NVLINK_SPEED_MBPS)


def _power_mw(driver: NvmlDriver, index: int) -> int | None:
    """At this moment; on older cards and drivers as nvmlDeviceGetPowerUsage averages it."""
    try:
        now = _field_value(driver, index, _POWER_INSTANT)
    except AttributeError:  # a library without field values
        now = None
    return now or driver.number("nvmlDeviceGetPowerUsage", driver.handle(index))


def _clock_reasons(driver: NvmlDriver, index: int) -> int | None:
    """A bit per reason; the function had another name before driver 535."""
    found = ctypes.c_ulonglong()
    for name in (
        "nvmlDeviceGetCurrentClocksEventReasons",
        "nvmlDeviceGetCurrentClocksThrottleReasons",
    ):
        try:
            if driver.call(name, driver.handle(index), ctypes.byref(found)):
                return found.value
        except AttributeError:  # not in this library
            continue
    return None


def _temperature_c(driver: NvmlDriver, index: int) -> int | None:
    sensor = ctypes.c_uint(_TEMPERATURE_GPU)
    return driver.number("nvmlDeviceGetTemperature", driver.handle(index), sensor)


def _mig_mode(driver: NvmlDriver, index: int) -> int | None:
    current, pending = ctypes.c_uint(), ctypes.c_uint()
    arguments = driver.handle(index), ctypes.byref(current), ctypes.byref(pending)
    return current.value if driver.call("nvmlDeviceGetMigMode", *arguments) else None


def _number(function: str) -> Callable[..., int | None]:
    """Reader of a device's number."""
    return lambda driver, index: driver.number(function, driver.handle(index))


def _text(function: str) -> Callable[..., str | None]:
    """Reader of a device's or slice's text."""
    return lambda driver, *at: driver.text(function, driver.handle(*at))


def _of_link(function: str) -> Callable[..., int | None]:
    """Reader of a link's number."""
    return lambda driver, index, link: driver.number(
        function, driver.handle(index), ctypes.c_uint(link)
    )


def _of_pair(function: str) -> Callable[..., int | None]:
    """Reader of a pair's number, with a further argument where the function takes one."""
    return lambda driver, first, second, *more: driver.number(
        function, driver.handle(first), driver.handle(second), *map(ctypes.c_uint, more)
    )


_READERS: dict[str, Callable[..., Value | None]] = {
    "driver_version": lambda driver: driver.text("nvmlSystemGetDriverVersion"),
    "count": lambda driver: driver.number("nvmlDeviceGetCount_v2"),
    "name": _text("nvmlDeviceGetName"),
    "uuid": _text("nvmlDeviceGetUUID"),
    "bus": _bus,
    "memory_bytes": _memory_bytes,
    "memory_node": _memory_node,
    "compute_clock_mhz": _clock("nvmlDeviceGetMaxClockInfo", _CLOCK_COMPUTE),
    "memory_clock_mhz": _clock("nvmlDeviceGetMaxClockInfo", _CLOCK_MEMORY),
    "compute_clock_now_mhz": _clock("nvmlDeviceGetClockInfo", _CLOCK_COMPUTE),
    "memory_clock_now_mhz": _clock("nvmlDeviceGetClockInfo", _CLOCK_MEMORY),
    "clock_reasons": _clock_reasons,
    "power_mw": _power_mw,
    "power_limit_mw": _number("nvmlDeviceGetEnforcedPowerLimit"),
    "temperature_c": _temperature_c,
    "bus_width_bits": _number("nvmlDeviceGetMemoryBusWidth"),
    "pcie_generation": _number("nvmlDeviceGetMaxPcieLinkGeneration"),
    "pcie_width": _number("nvmlDeviceGetMaxPcieLinkWidth"),
    "nvlink_mb_per_s": _nvlink_mb_per_s,
    "mig_mode": _mig_mode,
    "mig_places": _number("nvmlDeviceGetMaxMigDeviceCount"),
    "slice_name": _text("nvmlDeviceGetName"),
    "slice_uuid": _text("nvmlDeviceGetUUID"),
    "nvlink_active": _of_link("nvmlDeviceGetNvLinkState"),
    "nvlink_remote_type": _of_link("nvmlDeviceGetNvLinkRemoteDeviceType"),
    "nvlink_remote_bus": _remote_bus,
    "ancestor": _of_pair("nvmlDeviceGetTopologyCommonAncestor"),
    "p2p_status": _of_pair("nvmlDeviceGetP2PStatus"),
}
