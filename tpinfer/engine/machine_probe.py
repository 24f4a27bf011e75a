"""One rank's part of `topo probe`: meet the others, measure, and say it as the measured layer of a
topology."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch

from tpinfer.collectives.group import Group
from tpinfer.collectives.opening import open_group
from tpinfer.config.dtypes import DType
from tpinfer.config.errors import ConfigError
from tpinfer.config.measured import DeviceMeasurement, GroupMeasurement, Measurement
from tpinfer.config.topology import Topology
from tpinfer.costs.ops import OpKind
from tpinfer.engine.op_probe import measure_ops
from tpinfer.launching.seat import Seat
from tpinfer.layers.matmul import MatMul, can_pack, packed_matmul, plain_matmul
from tpinfer.machine.clock_source import sampler_of
from tpinfer.machine.clocks import measured_clocks
from tpinfer.machine.discover import discover_machine
from tpinfer.machine.gpu_survey import survey_gpus
from tpinfer.machine.measure import RankFigures, measure_collectives, measure_rank
from tpinfer.machine.nvml_driver import open_driver

_STEPS_SHARE, _COLLECTIVES_SHARE = 0.5, 0.25
"""Of the time: for steps of a model, and for collectives where there are several ranks."""
_CPU_COLLECTIVES = ("shared_memory", "deepspeed", "gloo")
_MEET_S = 60.0
_MachineFacts = tuple[frozenset[str], int, int]


def probe_machine(
    topology: Topology, seat: Seat, seconds: float, say: Callable[[str], None]
) -> Measurement:
    """What the ranks of this run reach, in about `seconds`; they are the first group of
    `topology`. A collective call; the same on every rank.

    Raises TopologyError for more ranks than the topology has places, RankError where one is lost.
    """
    places = topology.groups(seat.world)[0]
    machine, device = discover_machine(), torch.device(seat.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, machine.num_cores // seat.local_world))
    facts = machine.cpu_flags, machine.num_cores, machine.shared_memory_free_bytes
    groups = _open_groups(seat, device, facts)
    try:
        alone = seat.world == 1
        sums_s = 0.0 if alone else _COLLECTIVES_SHARE * seconds
        steps_s = _STEPS_SHARE * seconds
        budget_s = seconds - steps_s - sums_s
        whole = next(iter(groups.values()))
        sampler, _ = sampler_of(device, seat.rank)
        with sampler or nullcontext():
            figures = measure_rank(
                whole, device, machine, _dtypes(device), _bind_linear, budget_s, say
            )
        clocks = measured_clocks(sampler.samples()) if sampler else None
        fits = () if alone else measure_collectives(groups, device, sums_s, say)
        whole.barrier()  # as in `_open_groups`
    finally:
        for group in groups.values():
            group.close()
    again = replace(seat, generation=seat.generation + len(_CPU_COLLECTIVES) + 1)
    ops, host_time = measure_ops(again, steps_s, say)
    shared = tuple(op for op in ops if OpKind(op.kind).is_collective)
    own = tuple(op for op in ops if op not in shared)
    return Measurement(
        topology=topology.name,
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        driver=_driver_version() if device.type == "cuda" else None,
        versions=_versions(device),
        devices=(
            replace(
                _device(topology, places, seat, figures),
                ops=own,
                clocks=clocks,
                host_time=host_time,
            ),
        ),
        groups=() if alone else (GroupMeasurement(places, fits, shared),),
    )


def _device(
    topology: Topology, places: tuple[tuple[str, str], ...], seat: Seat, figures: RankFigures
) -> DeviceMeasurement:
    host = topology.host(places[0][0])
    on_cpu = host.computes_on_cpu
    ids = [device.id for device in host.devices] if on_cpu else [name for _, name in places]
    return DeviceMeasurement(
        host=host.name,
        devices=tuple(ids),
        num_sharing=seat.local_world if on_cpu else 1,
        memory=figures.memory,
        gemms=figures.gemms,
        eager_floor_s=figures.eager_floor_s,
        graph_floor_s=figures.graph_floor_s,
        copies=figures.copies,
    )


def _open_groups(seat: Seat, device: torch.device, facts: _MachineFacts) -> dict[str, Group]:
    """The backend that a run would take, and the others that work here, each in a generation of its
    own. A collective call."""
    first, choice = open_group("auto", seat, device, _MEET_S, facts)
    found = {"deepspeed" if choice.variant == "deepspeed" else choice.name: first}
    if device.type != "cpu" or seat.world == 1 or seat.world != seat.local_world:
        return found
    for number, wanted in enumerate(_CPU_COLLECTIVES, 1):
        if wanted in found:
            continue
        first.barrier()  # nobody makes the next meeting place while the last one is taken away
        again = replace(seat, generation=seat.generation + number)
        try:
            found[wanted], _ = open_group(wanted, again, device, _MEET_S, facts)
        except ConfigError:  # every rank is refused alike, before any is met
            continue
    first.barrier()
    return found


def _dtypes(device: torch.device) -> list[DType]:
    """A GPU has units for all of them; a CPU without some is slow at them, which is worth
    knowing."""
    found = [DType.FLOAT32, DType.BFLOAT16]
    return [*found, DType.FLOAT16] if device.type == "cuda" else found


def _bind_linear(weight: torch.Tensor, device: torch.device) -> MatMul:
    """As `worker.kernels` binds a rank's linears."""
    bind = packed_matmul if can_pack(weight.dtype, device) else plain_matmul
    return bind(weight, None)


def _versions(device: torch.device) -> dict[str, str]:
    try:
        own = version("tpinfer")
    except PackageNotFoundError:
        own = "(not installed)"
    found = {"tpinfer": own, "torch": str(torch.__version__)}
    if device.type == "cuda":
        from torch.cuda import nccl

        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, nccl.version()))
    return found


def _driver_version() -> str | None:
    """What NVML says; None where it says nothing."""
    driver, _ = open_driver()
    if driver is None:
        return None
    try:
        return survey_gpus(driver).driver_version
    finally:
        driver.close()
