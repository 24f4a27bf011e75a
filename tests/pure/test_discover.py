"""Discovery reads a kernel's files: affinity, cgroups of both versions, caches, memory nodes."""

import os
from pathlib import Path

import pytest

from tpinfer.machine.discover import (
    available_memory_bytes,
    discover_machine,
    parse_cpu_list,
    usable_cores,
)
from tpinfer.machine.nvml import Gpu, list_gpus, select_visible

GIB = 1 << 30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with the cores of this process, two memory nodes and 8 GiB."""
    cores = usable_cores()
    put(
        tmp_path / "proc/cpuinfo",
        "vendor_id : GenuineIntel\nmodel name : Big\nflags : avx2 amx_bf16\n",
    )
    put(
        tmp_path / "proc/meminfo",
        f"MemTotal: {8 * GIB >> 10} kB\nMemAvailable: {6 * GIB >> 10} kB\n",
    )
    for core in cores:
        for index, (level, kind, size, shared) in enumerate(
            [
                (1, "Data", "32K", str(core)),
                (1, "Instruction", "32K", str(core)),
                (3, "Unified", "16M", ",".join(map(str, cores))),
            ]
        ):
            folder = tmp_path / f"sys/devices/system/cpu/cpu{core}/cache/index{index}"
            for name, text in {
                "level": str(level),
                "type": kind,
                "size": size,
                "shared_cpu_list": shared,
            }.items():
                put(folder / name, text)
    put(tmp_path / "sys/devices/system/node/node0/cpulist", str(cores[0]))
    put(tmp_path / "sys/devices/system/node/node1/cpulist", "1000-1003")
    (tmp_path / "dev/shm").mkdir(parents=True)
    return tmp_path


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_processor_caches_and_nodes(root: Path):
    machine = discover_machine(root)
    count = len(usable_cores())
    assert (machine.cpu_vendor, machine.cpu_model) == ("intel", "Big")
    assert machine.cpu_flags == {"avx2", "amx_bf16"}
    assert machine.cache_bytes(1) == count * 32 * 1024
    assert machine.cache_bytes(3) == 16 << 20
    assert machine.cache_bytes(2) == 0
    assert machine.numa_nodes == ((usable_cores()[0],),)
    assert machine.num_cores == count


def test_without_cgroups_the_kernels_numbers_stand(root: Path):
    machine = discover_machine(root)
    assert (machine.memory_bytes, machine.available_bytes) == (8 * GIB, 6 * GIB)


def test_cgroup_2_limits_memory_and_cores(root: Path):
    put(root / "proc/self/cgroup", "0::/pod/job\n")
    group = root / "sys/fs/cgroup/pod/job"
    put(group / "memory.max", "max")
    put(group / "cpu.max", "100000 100000")
    put(group.parent / "memory.max", str(2 * GIB))
    put(group.parent / "memory.current", str(GIB))
    put(group.parent / "memory.stat", f"anon 5\ninactive_file {GIB >> 2}\n")
    machine = discover_machine(root)
    assert machine.memory_bytes == 2 * GIB
    assert machine.available_bytes == available_memory_bytes(root) == GIB + (GIB >> 2)
    assert machine.num_cores == 1


def test_cgroup_1_limits_memory_and_cores(root: Path):
    put(root / "proc/self/cgroup", "4:memory:/box\n3:cpu,cpuacct:/box\n0::/\n")
    memory = root / "sys/fs/cgroup/memory"
    put(memory / "memory.limit_in_bytes", "9223372036854771712")
    put(memory / "box/memory.limit_in_bytes", str(3 * GIB))
    put(memory / "box/memory.usage_in_bytes", str(GIB))
    put(root / "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us", "150000")
    put(root / "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us", "100000")
    machine = discover_machine(root)
    assert (machine.memory_bytes, machine.available_bytes) == (3 * GIB, 2 * GIB)
    assert machine.num_cores == 1


def test_this_machine_has_a_core_and_memory():
    machine = discover_machine()
    assert 1 <= machine.num_cores <= len(machine.cores) <= (os.cpu_count() or 1)
    assert 0 < machine.available_bytes <= machine.memory_bytes
    assert machine.gpus or machine.no_gpu_reason


def test_cpu_lists():
    assert parse_cpu_list("0-3,8\n") == (0, 1, 2, 3, 8)
    assert parse_cpu_list("") == ()


def test_visible_gpus_follow_cudas_rules():
    cards = tuple(Gpu(i, f"GPU-{c}", "card", 1, 1) for i, c in enumerate(("aa1", "aa2", "bb3")))
    assert select_visible(cards, None) == cards
    assert select_visible(cards, ("2", "0")) == (cards[2], cards[0])
    assert select_visible(cards, ("GPU-bb",)) == (cards[2],)
    assert select_visible(cards, ("1", "9", "0")) == (cards[1],)
    assert select_visible(cards, ("GPU-aa",)) == ()
    assert list_gpus(()) == ((), "CUDA_VISIBLE_DEVICES is empty")
