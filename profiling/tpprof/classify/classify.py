"""From a trace to its work, with the verdict on each piece."""

from collections.abc import Mapping, Sequence

import numpy as np

from tpinfer.config.ceilings import Ceilings
from tpinfer.config.model import ModelSpec
from tpinfer.costs.leaves import LEAVES
from tpinfer.costs.ledger import CostLedger
from tpinfer.sharding.partition import partition_model
from tpprof.classify.aggregates import completed
from tpprof.classify.by_nodes import place_by_nodes
from tpprof.classify.by_roles import place_in_graphs, place_in_model
from tpprof.classify.collectives import bytes_on_wire, communication, is_comm, mark_known
from tpprof.classify.entries import Entries, Texts, framework_keys, layers_of, make_entries
from tpprof.classify.executions import executions
from tpprof.classify.manifest import Manifest, model_manifest
from tpprof.classify.names import Names, copies, read_names
from tpprof.classify.prices import (
    CostSource,
    Prices,
    price_by_manifest,
    price_by_shapes,
    price_copies,
)
from tpprof.classify.steps import Step, find_steps
from tpprof.classify.verdicts import Verdicts, judge_all
from tpprof.classify.work import Work, WorkKind
from tpprof.events import NONE, Trace

MOST_DARK = 0.5
"""Share of kernel time without a model that is worth a warning."""


def classify_trace(
    trace: Trace, ceilings: Ceilings | None = None, costs: CostSource | None = None
) -> Work:
    """Judge all work of one rank. Without ceilings, those of the manifest are taken."""
    costs = costs or CostSource()
    manifest = costs.manifest
    work = executions(trace)
    steps = find_steps(trace)
    entries = make_entries(trace, work, steps)
    names = read_names(trace, entries, work)
    entries.kind = names.kinds(len(trace.strings))
    entries.kind[copies(trace, entries)] = WorkKind.COPY
    sums: list[Mapping[str, int]] = [step.sums for step in steps]
    program, told = manifest, []
    layer = np.full(len(entries), NONE, np.int32)
    mark_known(trace, entries, manifest)
    if manifest is not None:
        is_read, told = np.zeros(len(entries), bool), []
        if costs.nodes is not None:
            read = place_by_nodes(trace, entries, names, costs.nodes)
            is_read, told = read.is_read, read.warnings()
        placed = place_in_graphs(entries, names, manifest, is_read)
        layer, told = placed.layer, [*told, *placed.warnings]
        mark_known(trace, entries, manifest)
    prices = Prices(entries)
    if manifest is not None:
        price_by_manifest(prices, entries, manifest, sums)
    price_by_shapes(prices, entries, trace)
    if manifest is None and costs.spec is not None and not entries.is_cpu:
        program = _program(trace, costs.spec, costs.tp)
        sums = [completed(step, costs.spec) for step in steps]
        placed = place_in_model(entries, names, program, sums)
        layer, told = placed.layer, placed.warnings
        price_by_manifest(prices, entries, program, sums)
    price_copies(prices, entries, trace)
    prices.warnings += told
    if ceilings is None and manifest is not None:
        ceilings = manifest.ceilings
    sizes = program.working_sets(sums) if program is not None else np.full(len(sums), NONE)
    working_set = np.append(sizes, NONE)[entries.step]
    return _assemble(trace, entries, prices, names, steps, (ceilings, manifest, working_set, layer))


def _program(trace: Trace, spec: ModelSpec, tp: int) -> Manifest:
    """Formulas of the rank's share of a model; tensor-parallel ranks are neighbours."""
    partition = partition_model(spec, tp)
    rank = max(trace.rank, 0) % tp
    return model_manifest(CostLedger(spec, partition, rank, spec.dtype, spec.dtype))


def _assemble(
    trace: Trace,
    entries: Entries,
    prices: Prices,
    names: Names,
    steps: Sequence[Step],
    known: tuple[Ceilings | None, Manifest | None, np.ndarray, np.ndarray],
) -> Work:
    """known: ceilings, manifest, working set and layer (of those read by their order) per entry."""
    ceilings, manifest, working_set, read_layer = known
    texts = Texts()
    key = framework_keys(trace, entries, texts)
    layer = layers_of(trace, entries, key, texts)
    spoken = communication(trace, entries, names, manifest, texts)
    bytes_on_wire(prices, spoken, texts)
    found = judge_all(
        prices,
        entries.length_ns,
        is_comm(entries.kind),
        _has_small_grid(trace, entries),
        working_set,
        ceilings,
    )
    numbers = np.array([step.number for step in steps] + [NONE], np.int64)
    return Work(
        row=entries.row.astype(np.int64),
        start_ns=entries.start_ns,
        end_ns=entries.end_ns,
        lane=entries.lane,
        kind=entries.kind,
        leaf=_leaves(entries, found),
        balanced=found.balanced & (entries.kind == WorkKind.COMPUTE),
        floor_ns=found.floor_ns,
        flops=prices.flops,
        num_bytes=prices.num_bytes,
        key=key,
        layer=np.where(layer >= 0, layer, read_layer).astype(np.int32),
        step=numbers[entries.step],
        keys=texts.texts,
        comm_op=spoken.op,
        comm_bytes=spoken.num_bytes,
        comm_group=spoken.group,
        comm_size=spoken.size,
        comm_sequence=spoken.sequence,
        ceilings_ns=found.ceilings_ns,
        is_cpu=entries.is_cpu,
        warnings=(*prices.warnings, *_warnings(trace, entries, prices, ceilings)),
    )


def _leaves(entries: Entries, found: Verdicts) -> np.ndarray:
    """Copies and communication have leaves of their own, whatever ceiling is near."""
    leaf = found.leaf.copy()
    leaf[entries.kind == WorkKind.COPY] = LEAVES.index("copy")
    leaf[is_comm(entries.kind)] = LEAVES.index("comm_unsplit")
    return leaf


def _has_small_grid(trace: Trace, entries: Entries) -> np.ndarray:
    """bool [n]: fewer blocks than the device has processors."""
    processors = np.array(
        [
            trace.devices[lane.device].num_sms if lane.device in trace.devices else 0
            for lane in trace.lanes
        ]
        or [0]
    )
    blocks = trace.num_blocks[entries.row]
    return (blocks >= 0) & (blocks < processors[entries.lane])


def _warnings(
    trace: Trace, entries: Entries, prices: Prices, ceilings: Ceilings | None
) -> list[str]:
    if not len(entries):
        return []
    told = []
    if ceilings is None:
        told.append(
            "no ceilings are known, so no kernel is called compute- or memory-bound; pass "
            "--topology FILE or --device NAME"
        )
    compute = entries.kind == WorkKind.COMPUTE
    dark = compute & (prices.flops < 0)
    share = entries.length_ns[dark].sum() / max(int(entries.length_ns[compute].sum()), 1)
    if share > MOST_DARK:
        told.append(
            f"rank {trace.rank}: {100 * share:.0f} % of kernel time has no model of its cost; "
            "record shapes, or pass --model config.json --tp N"
        )
    return told
