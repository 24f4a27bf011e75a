"""Which backend carries the collectives: a pure function of facts."""

from dataclasses import replace

import pytest

from tpinfer.collectives.choose import CollectiveFacts, choose_collective
from tpinfer.config.errors import ConfigError
from tpinfer.config.measured import CollectiveFit
from tpinfer.costs.collective_sizes import CollectiveCurves

FACTS = CollectiveFacts(
    device_type="cpu",
    world=2,
    local_world=2,
    launcher="tpinfer",
    num_gpus=0,
    has_mpi=False,
    has_native_ring=True,
    ring_reason="",
    deepspeed_reason=None,
)
"""Two CPU ranks on a host where everything but MPI can be had."""
NO_RING = replace(FACTS, has_native_ring=False, ring_reason="no C compiler found")


@pytest.mark.parametrize(
    ("wanted", "facts", "name", "variant"),
    [
        ("auto", FACTS, "shared_memory", "native"),
        ("shared_memory", FACTS, "shared_memory", "native"),
        ("deepspeed", FACTS, "shared_memory", "deepspeed"),
        ("auto", NO_RING, "shared_memory", "deepspeed"),
        ("auto", replace(NO_RING, deepspeed_reason="not built"), "shared_memory", "python"),
        ("auto", replace(NO_RING, deepspeed_reason="x", machine="aarch64"), "gloo", ""),
        ("gloo", FACTS, "gloo", ""),
        ("auto", replace(FACTS, world=1, local_world=1), "none", ""),
        ("auto", replace(FACTS, device_type="cuda", num_gpus=2), "symmetric_memory", ""),
        ("nccl", replace(FACTS, device_type="cuda", num_gpus=2), "nccl", ""),
        ("nccl_symmetric", replace(FACTS, device_type="cuda", num_gpus=2), "nccl", "symmetric"),
        ("mpi", replace(FACTS, launcher="mpirun", has_mpi=True), "mpi", ""),
        ("auto", replace(FACTS, local_world=1, launcher="mpirun", has_mpi=True), "mpi", ""),
        ("auto", replace(FACTS, local_world=1, launcher="mpirun"), "gloo", ""),
        ("auto", replace(FACTS, local_world=1, launcher="torchrun", has_mpi=True), "gloo", ""),
        ("gloo", replace(FACTS, local_world=1), "gloo", ""),
        ("auto", replace(FACTS, local_world=1, device_type="cuda", num_gpus=1), "nccl", ""),
    ],
)
def test_choices(wanted: str, facts: CollectiveFacts, name: str, variant: str) -> None:
    found = choose_collective(wanted, facts)
    assert (found.name, found.variant) == (name, variant)
    assert found.reason


@pytest.mark.parametrize(
    ("wanted", "facts", "told"),
    [
        ("nccl", FACTS, "needs GPU ranks"),
        ("nccl", replace(FACTS, device_type="cuda", num_gpus=1), "2 ranks, 1 GPUs"),
        ("shared_memory", replace(FACTS, device_type="cuda", num_gpus=2), "use nccl"),
        ("shared_memory", replace(FACTS, local_world=1), "only 1 of 2 ranks are here; use gloo"),
        ("deepspeed", replace(FACTS, local_world=1), "stays on one host"),
        ("nccl", replace(FACTS, local_world=1), "use gloo"),
        ("deepspeed", replace(FACTS, deepspeed_reason="not built"), "not built; use shared_mem"),
        ("symmetric_memory", FACTS, "use shared_memory"),
        ("symmetric_memory", replace(FACTS, local_world=1, device_type="cuda"), "use nccl"),
        ("symmetric_memory", replace(FACTS, device_type="cuda", num_gpus=1), "--share-device"),
        ("nccl", replace(FACTS, device_type="cuda", num_gpus=1, shares_device=True), "1 GPUs"),
        ("nccl_symmetric", FACTS, "use shared_memory"),
        ("nccl_symmetric", replace(FACTS, local_world=1, device_type="cuda"), "one host"),
        ("nccl_symmetric", replace(FACTS, device_type="cuda", shares_device=True), "GPU each"),
        ("nccl_symmetric", replace(FACTS, device_type="cuda", num_gpus=1), "2 ranks, 1 GPUs"),
        ("mpi", FACTS, "launch/mpirun.sh"),
        ("mpi", replace(FACTS, launcher="mpirun"), "pip install"),
    ],
)
def test_what_cannot_work_is_refused(wanted: str, facts: CollectiveFacts, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        choose_collective(wanted, facts)


RING = CollectiveFit(
    "all_reduce", "shared_memory", False, 4e-6, 0.0, 2e9, 4e-6, 0.0, 2e9, 512, 1 << 23, 0.05
)
GLOO = replace(RING, by="gloo", a_s=9e-5, c_s=9e-5, b1_bytes_per_s=8e9, b2_bytes_per_s=8e9)
NCCL = replace(RING, by="nccl", a_s=1e-6, c_s=1e-6)


def curves(*fits: CollectiveFit, step_bytes: int = 4 << 20) -> CollectiveCurves:
    return CollectiveCurves(2, 4096, step_bytes, fits, "measured 2026-11-25")


def test_the_size_decides_where_two_backends_are_worth_it() -> None:
    found = choose_collective("auto", FACTS, curves(GLOO, RING))
    assert (found.name, found.variant) == ("shared_memory", "native")
    assert found.large is not None and found.large.name == "gloo"
    assert 4096 < found.from_bytes < 4 << 20
    assert found.words.startswith("shared_memory native; for ")
    assert found.words.endswith(" and more gloo")
    assert "4.1 kB 6.0 against 90.5 us by gloo" in found.reason


def test_a_wish_beats_the_measurement() -> None:
    for wanted in ("gloo", "shared_memory"):
        found = choose_collective(wanted, FACTS, curves(GLOO, RING))
        assert (found.name, found.large) == (wanted, None)
        assert found.reason.startswith("asked for")


def test_what_was_measured_but_cannot_be_used_is_left_out_and_named() -> None:
    found = choose_collective("auto", FACTS, curves(NCCL, RING))
    assert (found.name, found.large) == ("shared_memory", None)
    assert "nccl cannot be used: --collective nccl needs GPU ranks" in found.reason
    none = choose_collective("auto", FACTS, curves(NCCL))
    assert none.name == "shared_memory" and "nccl cannot be used" in none.reason


SHARED = replace(FACTS, device_type="cuda", num_gpus=1, shares_device=True)


@pytest.mark.parametrize(
    ("wanted", "facts", "name", "rest", "told"),
    [
        ("auto", replace(SHARED, shares_device=False, num_gpus=2), "symmetric_memory", "nccl", ""),
        ("auto", SHARED, "symmetric_memory", "gloo", "stock NCCL refuses"),
        ("auto", replace(SHARED, nccl_shares="by x"), "symmetric_memory", "nccl", "by x"),
        ("nccl", replace(SHARED, nccl_shares="by x"), "nccl", "", "by x"),
        ("gloo", SHARED, "gloo", "", "asked for"),
    ],
)
def test_what_stands_beside_symmetric_memory(
    wanted: str, facts: CollectiveFacts, name: str, rest: str, told: str
) -> None:
    found = choose_collective(wanted, facts)
    assert (found.name, found.rest) == (name, rest)
    assert told in found.reason
