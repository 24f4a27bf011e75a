"""From a topology to the collectives and the device of one rank: the best that is known of each.

Collectives are, in this order: those that the file gives under `ceilings:`; measured on the
machine; fitted to a fabric of its kind; NCCL's own model where cards are joined by an NVLink of
another kind; else one curve from the path's least time and bus bandwidth. A device is what a probe
measured, else what the catalogue says.
"""

from dataclasses import replace
from itertools import combinations

from tpinfer.config.ceilings import Ceilings
from tpinfer.config.dtypes import DType
from tpinfer.config.measured import DeviceMeasurement, GemmRate
from tpinfer.config.topology import Place, Topology
from tpinfer.costs.collective_sizes import planned_fits
from tpinfer.planner.collective_times import CollectiveTimes, Curve, collective_times
from tpinfer.planner.fabrics import fabric_of, fabric_times, nccl_times
from tpinfer.planner.kernel_times import DeviceTimes, device_times
from tpinfer.planner.traits import Traits


def group_times(
    topology: Topology, group: tuple[Place, ...], ceilings: Ceilings, engine: str = "nccl"
) -> CollectiveTimes:
    """Collectives of `group`, whose ranks have `ceilings`; `engine` as `Traits.collectives_of`."""
    plain = collective_times(ceilings, len(group))
    if len(group) == 1 or _has_own_numbers(topology, group):
        return plain
    fits, known_by = planned_fits(topology, group)
    if fits:
        peers = len(group) - 1
        curves = tuple(
            curve
            for fit in fits
            for curve in (
                Curve(fit.a_s + fit.b_s * peers, fit.b1_bytes_per_s),
                Curve(fit.c_s + fit.d_s * peers, fit.b2_bytes_per_s),
            )
        )
        by = " and ".join(fit.by for fit in fits)
        ops = {op.kind: op for op in topology.group_ops(group)}
        return replace(plain, curves=curves, origin=f"{known_by}, {by}", ops=ops)
    links = [topology.path(a, b) for a, b in combinations(group, 2)]
    if any(link.kind != "NVL" for link in links):
        return plain
    slowest = min(link.bytes_per_s for link in links)
    fabrics = {fabric_of(topology.host(name).device(device).sku) for name, device in group}
    fabric = fabrics.pop() if len(fabrics) == 1 else None
    if fabric is not None:
        return fabric_times(fabric, engine, len(group), slowest)
    return nccl_times(len(group), slowest, all(link.via for link in links))


def with_stages(
    times: CollectiveTimes, topology: Topology, first: Place, second: Place
) -> CollectiveTimes:
    """The same with transfers between pipeline stages over the path from `first` to `second`."""
    path = topology.path(first, second)
    return replace(
        times,
        transfer_latency_s=path.latency_s,
        transfer_bytes_per_s=path.bytes_per_s * path.attainable,
    )


def _has_own_numbers(topology: Topology, group: tuple[Place, ...]) -> bool:
    """Whether the file, or `--set`, gives a member's collectives under `ceilings:`."""
    for name, device in group:
        member = topology.host(name).device(device)
        for given in (member.overrides, member.set_overrides):
            if given.collective_latency_s or given.collective_bytes_per_s:
                return True
    return False


def measured_device(
    ceilings: Ceilings,
    measured: DeviceMeasurement | None,
    num_sharing: int,
    dtype: DType,
    power: float,
) -> DeviceTimes:
    """The device of one rank; `measured` adds how thin products do, the floor inside a graph and
    ops as they ran in steps. `power` as `Traits.overlap_power`."""
    device = device_times(ceilings)
    if measured is None:
        return device
    gemms = [gemm for gemm in measured.gemms if gemm.dtype is dtype]
    is_alike = measured.num_sharing == num_sharing
    return replace(
        device,
        kernel_floor_s=measured.graph_floor_s or device.kernel_floor_s,
        by_thinness=thinness(gemms, ceilings, power),
        ops={op.kind: op for op in measured.ops if op.dtype is dtype} if is_alike else {},
    )


def thinness(
    gemms: list[GemmRate], ceilings: Ceilings, power: float
) -> tuple[tuple[int, float], ...]:
    """(rows, part of the best arithmetic rate) of products, without what their bytes take.

    A product of few rows is slow because its weights must be read, which the step model counts by
    itself. What is left of its time is arithmetic: c = (t^p - m^p)^(1/p). Where nothing is left,
    arithmetic does not bind and counts as the best.
    """
    found: dict[int, float] = {}
    best = max((gemm.flops_per_s for gemm in gemms), default=0.0)
    for gemm in gemms:
        flops = 2 * gemm.rows * gemm.inner * gemm.columns
        size = gemm.inner * gemm.columns + gemm.rows * (gemm.inner + gemm.columns)
        num_bytes = size * gemm.dtype.num_bytes
        memory_s = num_bytes / ceilings.memory_level(num_bytes).bytes_per_s
        time_s = flops / gemm.flops_per_s
        share = 1.0
        if time_s > memory_s:
            compute_s = (time_s**power - memory_s**power) ** (1 / power)
            share = min(1.0, flops / best / compute_s)
        found[gemm.rows] = max(found.get(gemm.rows, 0.0), share)
    return tuple(sorted(found.items()))


def default_traits(topology: Topology) -> Traits:
    """What holds of a machine nobody calibrated: `probe` where it was measured."""
    if topology.measured is None:
        return Traits()
    plain = Traits(
        name=topology.name,
        mode="probe",
        origin=f"probe of {topology.measured.date}; host times are assumed",
    )
    times = [one.host_time for one in topology.measured.devices if one.host_time is not None]
    if not times:
        return plain
    slowest = max(times, key=lambda one: (one.step_s, one.row_s))
    return replace(
        plain,
        host_step_s=slowest.step_s,
        host_row_s=slowest.row_s,
        host_is_all=True,
        origin=f"probe of {topology.measured.date}",
    )
