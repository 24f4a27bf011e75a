"""What this machine has, read from /proc, /sys and the GPU driver. No torch; measures nothing.

Cores and memory are those this process may use: CPU affinity and cgroup limits count.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from tpinfer.config.environment import read_environment
from tpinfer.machine.nvml import Gpu, list_gpus

_UNLIMITED_BYTES = 1 << 60
"""cgroup v1 writes a number above this for no limit."""


@dataclass(frozen=True, slots=True)
class Cache:
    """One level of data cache."""

    level: int
    num_bytes: int
    """Of one instance."""
    num_sharing: int
    """Usable cores behind one instance."""
    num_instances: int
    """Instances behind the usable cores."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a process on this machine can use."""

    cpu_model: str
    cpu_vendor: str
    cpu_flags: frozenset[str]
    """As the kernel names them: `avx2`, `avx512f`, `avx512_bf16`, `amx_bf16`."""
    cores: tuple[int, ...]
    """Ids of the cores this process may run on."""
    num_cores: int
    """Of them, as many as a cgroup's CPU quota lets run at once."""
    caches: tuple[Cache, ...]
    """Data caches, smallest level first."""
    numa_nodes: tuple[tuple[int, ...], ...]
    """Usable cores of each memory node that has any."""
    memory_bytes: int
    """Memory of the machine or of the cgroup, whichever is less."""
    available_bytes: int
    """What can be taken now without swapping or hitting the cgroup's limit."""
    shared_memory_bytes: int
    """Size of /dev/shm; 0 where there is none."""
    shared_memory_free_bytes: int
    gpus: tuple[Gpu, ...]
    no_gpu_reason: str
    """Why `gpus` is empty."""
    core_siblings: tuple[tuple[int, ...], ...] = ()
    """Usable hardware threads of each core; empty where the kernel does not say."""

    def cache_bytes(self, level: int) -> int:
        """All of one cache level behind the usable cores; 0 where unknown."""
        return sum(c.num_bytes * c.num_instances for c in self.caches if c.level == level)


def discover_machine(root: Path = Path("/")) -> Machine:
    """Read this machine. `root` stands in for /; affinity and GPUs are always this process's."""
    cores = usable_cores()
    vendor, model, flags = _processor(root)
    gpus, no_gpu_reason = list_gpus(read_environment().visible_gpus)
    limit, cgroup_available = _cgroup_memory(root)
    total, available = _memory(root)
    shm_total, shm_free = _shared_memory(root)
    return Machine(
        cpu_model=model,
        cpu_vendor=vendor,
        cpu_flags=flags,
        cores=cores,
        num_cores=max(1, int(min(len(cores), _cgroup_cpus(root)))),
        caches=_caches(root, cores),
        numa_nodes=_numa_nodes(root, cores),
        memory_bytes=min(total, limit),
        available_bytes=min(available, cgroup_available),
        shared_memory_bytes=shm_total,
        shared_memory_free_bytes=shm_free,
        gpus=gpus,
        no_gpu_reason=no_gpu_reason,
        core_siblings=_core_siblings(root, cores),
    )


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Bytes this process can take now without swapping or hitting its cgroup's limit."""
    return min(_memory(root)[1], _cgroup_memory(root)[1])


def usable_cores() -> tuple[int, ...]:
    """Ids of the cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """The kernel's `0-3,8` as (0, 1, 2, 3, 8)."""
    found: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def _processor(root: Path) -> tuple[str, str, frozenset[str]]:
    """(vendor, model, flags) of the first core; ARM kernels say `Features` and give no name."""
    text = _read(root / "proc/cpuinfo") or ""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags") or fields.get("Features") or ""
    vendor = {"GenuineIntel": "intel", "AuthenticAMD": "amd", "0x41": "arm"}.get(
        fields.get("vendor_id") or fields.get("CPU implementer") or "", "unknown"
    )
    return vendor, fields.get("model name", "unknown"), frozenset(flags.split())


def _caches(root: Path, cores: tuple[int, ...]) -> tuple[Cache, ...]:
    """Data and unified caches of the usable cores, one entry per level (the first core's size)."""
    sharing: dict[int, set[frozenset[int]]] = {}
    sizes: dict[int, int] = {}
    for core in cores:
        for index in (root / f"sys/devices/system/cpu/cpu{core}/cache").glob("index*"):
            size = _size(_read(index / "size") or "")
            if _read(index / "type") == "Instruction" or not size:
                continue
            level = int(_read(index / "level") or 0)
            listed = parse_cpu_list(_read(index / "shared_cpu_list") or str(core))
            sizes.setdefault(level, size)
            sharing.setdefault(level, set()).add(frozenset(listed) & frozenset(cores))
    return tuple(
        Cache(level, sizes[level], max(map(len, groups)), len(groups))
        for level, groups in sorted(sharing.items())
    )


def _size(text: str) -> int:
    """`32768K` in bytes; 0 where it cannot be read."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]] if match else 0


def _numa_nodes(root: Path, cores: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    folders = (root / "sys/devices/system/node").glob("node[0-9]*")
    ordered = sorted(folders, key=lambda folder: int(folder.name[4:]))
    listed = (parse_cpu_list(_read(folder / "cpulist") or "") for folder in ordered)
    usable = (tuple(c for c in node if c in cores) for node in listed)
    return tuple(node for node in usable if node) or (cores,)


def _core_siblings(root: Path, cores: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    found: set[tuple[int, ...]] = set()
    for core in cores:
        folder = root / f"sys/devices/system/cpu/cpu{core}/topology"
        listed = _read(folder / "thread_siblings_list")
        if not listed:
            return ()
        found.add(tuple(c for c in parse_cpu_list(listed) if c in cores))
    return tuple(sorted(found))


def _memory(root: Path) -> tuple[int, int]:
    """(total, available) bytes as the kernel sees them."""
    text = _read(root / "proc/meminfo") or ""
    found = {m[1]: int(m[2]) * 1024 for m in re.finditer(r"^(\w+):\s+(\d+) kB", text, re.M)}
    total = found.get("MemTotal", 0)
    return total, found.get("MemAvailable", found.get("MemFree", total))


def _shared_memory(root: Path) -> tuple[int, int]:
    try:
        found = os.statvfs(root / "dev/shm")
    except OSError:
        return 0, 0
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """This process's cgroup for `controller` and those above it, in both versions.

    Inside a container the path in /proc may not exist under its /sys; then only the top is read.
    """
    folders: list[Path] = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Version 1 mounts controllers under their joint name, often under each one's own too.
        for mount in {controllers, controllers and controller}:
            top = root / "sys/fs/cgroup" / mount
            here = top / path.lstrip("/")
            folders += [f for f in (here, *here.parents) if f.is_relative_to(top) and f.is_dir()]
    return folders


def _cgroup_memory(root: Path) -> tuple[int, int]:
    """(limit, available) bytes of the tightest cgroup; both huge where nothing limits.

    File cache that the kernel can drop counts as available.
    """
    tightest, least = _UNLIMITED_BYTES, _UNLIMITED_BYTES
    for folder in _cgroup_folders(root, "memory"):
        limit = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current", folder / "memory.usage_in_bytes")
        if limit is None or limit >= _UNLIMITED_BYTES:
            continue
        text = _read(folder / "memory.stat") or ""
        counts = re.findall(r"^(?:total_)?inactive_file (\d+)", text, re.M)
        droppable = max(map(int, counts), default=0)
        tightest = min(tightest, limit)
        least = min(least, max(0, limit - (used or 0) + droppable))
    return tightest, least


def _cgroup_cpus(root: Path) -> float:
    """Cores' worth of CPU time that the tightest cgroup grants; infinite where nothing limits."""
    granted = float("inf")
    for folder in _cgroup_folders(root, "cpu"):
        quota, _, period = (_read(folder / "cpu.max") or "").partition(" ")
        if not period:
            quota = _read(folder / "cpu.cfs_quota_us") or ""
            period = _read(folder / "cpu.cfs_period_us") or ""
        if quota.isdigit() and period.isdigit() and int(period):
            granted = min(granted, int(quota) / int(period))
    return granted


def _number(*candidates: Path) -> int | None:
    texts = (_read(path) for path in candidates)
    return next((int(text) for text in texts if text and text.isdigit()), None)


def _read(path: Path) -> str | None:
    """A small kernel file, stripped; None where it is missing or closed to us."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
