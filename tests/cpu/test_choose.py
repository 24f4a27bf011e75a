"""Which backend carries the collectives: a pure function of facts."""

from dataclasses import replace

import pytest

from tpinfer.collectives.choose import CollectiveFacts, choose_collective
from tpinfer.config.errors import ConfigError

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
        ("auto", replace(FACTS, device_type="cuda", num_gpus=2), "nccl", ""),
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
        ("mpi", FACTS, "launch/mpirun.sh"),
        ("mpi", replace(FACTS, launcher="mpirun"), "pip install"),
    ],
)
def test_what_cannot_work_is_refused(wanted: str, facts: CollectiveFacts, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        choose_collective(wanted, facts)


def test_what_was_measured_to_be_quickest_is_taken_where_it_can_be() -> None:
    facts = replace(FACTS, world=2, local_world=2)
    found = choose_collective("auto", facts, ("gloo", "3.0 us against 9.0"))
    assert (found.name, found.reason) == ("gloo", "3.0 us against 9.0")
    assert choose_collective("shared_memory", facts, ("gloo", "3.0 us")).name == "shared_memory"
    cannot = choose_collective("auto", facts, ("nccl", "1.0 us"))
    assert cannot.name == "shared_memory"
    assert "the quickest measured cannot be used: --collective nccl needs GPU" in cannot.reason
