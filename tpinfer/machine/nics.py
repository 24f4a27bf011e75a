"""Network cards of this host, from /sys."""

import re
from dataclasses import dataclass
from pathlib import Path

_MOST_SHARED_DEPTH = 64


@dataclass(frozen=True, slots=True)
class Port:
    """One port of a network card."""

    name: str
    bytes_per_s: float
    """One way."""
    type: str
    """`ib`, `roce` or `tcp`."""
    bus_path: tuple[str, ...] = ()
    """PCI bridges from the root down to the card, and itself."""

    @property
    def rdma(self) -> bool:
        """Whether it can read and write memory by itself."""
        return self.type != "tcp"


def survey_nics(root: Path = Path("/")) -> tuple[Port, ...]:
    """RDMA ports, and where there is none the Ethernet ports of real cards that are up."""
    ports = [_rdma(folder) for folder in _folders(root / "sys/class/infiniband")]
    found = tuple(port for port in ports if port is not None)
    if found:
        return found
    plain = [_ethernet(folder) for folder in _folders(root / "sys/class/net")]
    return tuple(port for port in plain if port is not None)


def pci_path(root: Path, bus: str | None) -> tuple[str, ...]:
    """PCI bridges from the root down to the device at `bus`; empty where unknown."""
    if bus is None:
        return ()
    return _pci_parts(root / "sys/bus/pci/devices" / bus)


def shares_bridge(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    """How many bridges two devices have in common below the root complex; 0 for none."""
    shared = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        shared += 1
    return max(0, shared - 1)


def _rdma(folder: Path) -> Port | None:
    for port in _folders(folder / "ports"):
        match = re.match(r"(\d+(?:\.\d+)?) Gb/sec", _read(port / "rate"))
        if match and "ACTIVE" in _read(port / "state") and float(match[1]):
            kind = "roce" if _read(port / "link_layer") == "Ethernet" else "ib"
            path = _pci_parts(folder / "device")
            return Port(folder.name, float(match[1]) * 1e9 / 8, kind, path)
    return None


def _ethernet(folder: Path) -> Port | None:
    speed = _read(folder / "speed")
    if not (folder / "device").exists() or _read(folder / "operstate") != "up":
        return None
    if not speed.isdecimal() or not int(speed):
        return None
    return Port(folder.name, int(speed) * 1e6 / 8, "tcp", _pci_parts(folder / "device"))


def _pci_parts(device: Path) -> tuple[str, ...]:
    """Parts of the real path that name a root complex or a PCI function."""
    try:
        parts = device.resolve(strict=True).parts
    except OSError:
        return ()
    named = r"pci[0-9a-f]{4}:[0-9a-f]{2}|[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.\d"
    return tuple(p for p in parts if re.fullmatch(named, p))[:_MOST_SHARED_DEPTH]


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir(), key=_natural)
    except OSError:
        return []


def _natural(path: Path) -> tuple[object, ...]:
    """Sorts mlx5_10 after mlx5_9."""
    return tuple(
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", path.name)
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
