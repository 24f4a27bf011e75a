"""`tpinfer topo probe` on real ranks: the measured layer it writes is read back and used."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cpu.tpinfer_command import user_environment
from tpinfer.config.dtypes import DType
from tpinfer.config.measured_yaml import read_measured
from tpinfer.config.topology_reader import load_topology, shipped_directory

pytestmark = pytest.mark.ranks


def probe(file: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tpinfer", "topo", "probe", str(file), *flags]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=400, check=False, env=user_environment()
    )


def test_what_two_ranks_and_then_one_reach(tmp_path: Path) -> None:
    file = tmp_path / "cpu-laptop.yaml"
    shutil.copy(shipped_directory() / "cpu-laptop.yaml", file)
    assumed = load_topology(file).ceilings_of_rank(0, 2)
    done = probe(file, "--tp", "2", "--seconds", "1", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "all_reduce by shared_memory" in done.stdout
    assert "\nclocks: " in done.stdout

    beside = tmp_path / "cpu-laptop.measured.yaml"
    [two] = read_measured(beside).devices
    assert two.num_sharing == 2
    assert [read.working_set_bytes for read in two.memory] == sorted(
        read.working_set_bytes for read in two.memory
    )
    assert two.memory[-1].level == "DRAM"
    assert {gemm.rows for gemm in two.gemms} >= {1, 2, 64}
    assert all(gemm.flops_per_s > 0 for gemm in two.gemms)
    kinds = {op.kind for op in two.ops}
    assert {"embed", "linear", "norm", "rope", "attention", "activation"} <= kinds
    linear = next(op for op in two.ops if op.kind == "linear")
    assert set(linear.rates) >= {1, 8, 64, 512}
    assert linear.dtype in (DType.BFLOAT16, DType.FLOAT32), "whichever this CPU multiplies faster"
    assert all(op.floor_s or op.bytes_per_s or op.flops_per_s or op.rates for op in two.ops)
    assert "linear" in done.stdout
    [group] = read_measured(beside).groups
    assert {op.kind for op in group.ops} >= {"reduce", "gather"}
    assert {fit.op for fit in group.collectives} == {"all_reduce", "all_gather"}
    assert {"shared_memory", "gloo"} <= {fit.by for fit in group.collectives}

    measured = load_topology(file).ceilings_of_rank(0, 2)
    assert assumed is not None and measured is not None
    assert "measured" in measured.origin and measured.memory != assumed.memory
    assert measured.kernel_floor_s == two.eager_floor_s

    again = probe(file, "--seconds", "1", "--device", "cpu")
    assert again.returncode == 0, again.stderr
    both = read_measured(beside)
    assert [one.num_sharing for one in both.devices] == [2, 1]
    assert both.groups == (group,)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["nowhere.yaml"], "neither a file nor shipped"),
        ([], "topo discover -o FILE` writes it"),
        (["cpu-laptop", "--seconds", "0"], "--seconds 0 must lie in 1..600"),
        (["cpu-laptop", "--tp", "0"], "--tp 0"),
        (["cpu-laptop", "-o", "/nowhere/x.yaml"], "/nowhere"),
        (["cpu-laptop", "--device", "cuda"], "cuda"),
        (["cpu-laptop", "--set", "placement.tp=1"], "--set"),
    ],
)
def test_mistakes_are_told(flags: list[str], told: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tpinfer", "topo", "probe", *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path,
        env=user_environment(),
    )  # fmt: skip
    assert done.returncode == 2
    assert told in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_discovered_host_has_its_rates_from_the_probe_alone(tmp_path: Path) -> None:
    file = tmp_path / "box.yaml"
    command = [sys.executable, "-m", "tpinfer", "topo", "discover", "-o", str(file)]
    subprocess.run(command, check=True, timeout=60, env=user_environment(), capture_output=True)
    if not load_topology(file).hosts[0].computes_on_cpu:
        pytest.skip("ranks of this host compute on GPUs")
    assert load_topology(file).ceilings_of_rank(0, 1) is None
    done = probe(file, "--seconds", "1", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    found = load_topology(file).ceilings_of_rank(0, 1)
    assert found is not None
    assert found.memory[-1].name == "DRAM"
    assert found.memory[-1].capacity_bytes > 1 << 28
    assert found.flops_per_s and found.kernel_floor_s > 0
