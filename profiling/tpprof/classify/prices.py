"""What each piece of work should cost: FLOPs, memory traffic, bytes on the wire; -1 where nobody
knows.

Three sources, asked in this order: a tpinfer manifest (op ids and step sums), the shapes of the
operator that launched a kernel, and the ledger of a model that the user names (roles from the order
of kernels). Each fills in what the ones before left open.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tpinfer.config.dtypes import DType
from tpinfer.config.model import ModelSpec
from tpinfer.costs.ledger import CostLedger
from tpinfer.costs.ops import TERMS, StepAggregates
from tpinfer.sharding.partition import partition_model
from tpprof.classify.manifest import Manifest
from tpprof.classify.roles import assign_roles
from tpprof.classify.rules import Verdict
from tpprof.classify.shapes import cost_of
from tpprof.classify.sharing import share_out
from tpprof.classify.steps import Step
from tpprof.classify.work import WorkKind
from tpprof.events import NONE, Trace

DTYPES = tuple(DType)


@dataclass(frozen=True)
class CostSource:
    """What is known besides the trace."""

    manifest: Manifest | None = None
    spec: ModelSpec | None = None
    tp: int = 1


@dataclass
class Entries:
    """The work of a trace while it is being judged; columns of n entries in order of time."""

    row: np.ndarray
    start_ns: np.ndarray
    end_ns: np.ndarray
    kind: np.ndarray
    step: np.ndarray
    """int64 [n]: place in the list of steps; -1 for none."""
    op: np.ndarray
    """int64 [n]: row of the framework operator it belongs to; -1 for none."""
    op_id: list[str]
    """tpinfer op per entry, "" for none."""
    unit: np.ndarray
    """int64 [n]: entries of one execution of a tpinfer op share a number."""

    def __len__(self) -> int:
        return len(self.row)


class Prices:
    """The columns being filled."""

    def __init__(self, count: int) -> None:
        self.flops = np.full(count, NONE, np.int64)
        self.num_bytes = np.full(count, NONE, np.int64)
        self.num_sent = np.full(count, NONE, np.int64)
        self.dtype = np.full(count, DTYPES.index(DType.BFLOAT16), np.int8)
        self.key = [""] * count
        self.layer = np.full(count, NONE, np.int32)
        self.warnings: list[str] = []

    def fill(
        self,
        entries: np.ndarray,
        costs: tuple[np.ndarray, np.ndarray, np.ndarray],
        dtype: np.ndarray,
        unit: np.ndarray,
        length: np.ndarray,
    ) -> None:
        """Share the costs (FLOPs, bytes, bytes sent; of whole units, each int64 [m]) out over
        `entries` (int64 [m]) that have none yet."""
        fresh = (self.flops[entries] < 0) & (costs[0] >= 0)
        at = entries[fresh]
        for column, values in zip((self.flops, self.num_bytes, self.num_sent), costs, strict=True):
            column[at] = share_out(np.maximum(values[fresh], 0), unit[fresh], length[fresh])
        self.dtype[at] = dtype[fresh]


def price_by_manifest(
    prices: Prices, entries: Entries, manifest: Manifest, sums: Sequence[Mapping[str, int]]
) -> None:
    """By op id and step."""
    place = np.array([manifest.place.get(name, NONE) for name in entries.op_id], np.int64)
    known = np.flatnonzero((place >= 0) & (entries.step >= 0))
    if not len(known) or not sums:
        return
    tables = manifest.prices(sums)
    where = entries.step[known], place[known]
    flops, moved, sent = (table[where] for table in tables)
    dtype = np.full(len(known), DTYPES.index(manifest.compute_dtype), np.int8)
    length = entries.end_ns[known] - entries.start_ns[known]
    prices.fill(known, (flops, moved, sent), dtype, entries.unit[known], length)


def price_by_shapes(prices: Prices, entries: Entries, trace: Trace) -> None:
    """By the operator that each kernel was launched for, or that it is."""
    has = np.flatnonzero(entries.op >= 0)
    if not len(has):
        return
    op = entries.op[has]
    shapes = trace.shapes[op]
    has, op, shapes = has[shapes >= 0], op[shapes >= 0], shapes[shapes >= 0]
    if not len(has):
        return
    calls = trace.name[op].astype(np.int64) * (len(trace.strings) + 1) + shapes
    distinct, which = np.unique(calls, return_inverse=True)
    width = len(trace.strings) + 1
    table = np.full((len(distinct), 2), NONE, np.int64)
    dtypes = np.zeros(len(distinct), np.int8)
    for i, call in enumerate(distinct.tolist()):
        found = cost_of(trace.strings[call // width], trace.strings[call % width])
        if found is not None:
            table[i] = found.flops, found.num_bytes
            dtypes[i] = DTYPES.index(found.dtype)
    costs = table[which, 0], table[which, 1], np.full(len(has), NONE, np.int64)
    length = entries.end_ns[has] - entries.start_ns[has]
    prices.fill(has, costs, dtypes[which], op, length)


def price_by_roles(
    prices: Prices,
    entries: Entries,
    names: np.ndarray,
    verdicts: Sequence[Verdict],
    steps: Sequence[Step],
    source: CostSource,
) -> None:
    """By the model the user names. names: int32 [n] string index; verdicts: per entry."""
    assert source.spec is not None, "roles need a model"
    spec = source.spec
    ledger = CostLedger(spec, partition_model(spec, source.tp), 0, spec.dtype, spec.dtype)
    ids = frozenset(ledger.op_ids())
    reasons: dict[str, int] = {}
    work = np.flatnonzero(entries.kind != WorkKind.COPY)
    for place, step in enumerate(steps):
        mine = work[entries.step[work] == place]
        if not len(mine):
            continue
        found = assign_roles(names[mine].tolist(), [verdicts[i] for i in mine], spec.num_layers)
        if found.reason:
            reasons[found.reason] = reasons.get(found.reason, 0) + 1
            continue
        _price_step(prices, entries, mine, found.keys, found.layers, (ledger, ids, step))
    for reason, count in reasons.items():
        told = f"{count} of {len(steps)} steps were not read as the model: {reason}"
        prices.warnings.append(told)


def _price_step(
    prices: Prices,
    entries: Entries,
    mine: np.ndarray,
    keys: Sequence[str],
    layers: Sequence[int],
    model: tuple[CostLedger, frozenset[str], Step],
) -> None:
    ledger, ids, step = model
    known = [key in ids for key in keys]
    for entry, key, layer, is_known in zip(mine.tolist(), keys, layers, known, strict=True):
        prices.layer[entry] = layer if prices.layer[entry] < 0 else prices.layer[entry]
        if is_known and not prices.key[entry]:
            prices.key[entry] = key
    aggregates, has_context = aggregates_of(step.sums)
    if aggregates is None:
        return
    at = mine[np.array(known, bool)]
    chosen = [key for key, is_known in zip(keys, known, strict=True) if is_known]
    costs = {key: ledger.cost(key, aggregates) for key in dict.fromkeys(chosen)}
    place = {key: i for i, key in enumerate(costs)}
    unit = np.array([place[key] for key in chosen], np.int64)
    blind = np.array([not has_context and key.endswith("attn.core") for key in chosen], bool)

    def column(values: Sequence[int]) -> np.ndarray:
        return np.where(blind, NONE, np.array(values, np.int64)[unit])

    found = list(costs.values())
    columns = (
        column([cost.flops for cost in found]),
        column([cost.bytes_moved for cost in found]),
        column([cost.bytes_sent for cost in found]),
    )
    dtype = np.full(len(at), DTYPES.index(ledger.compute_dtype), np.int8)
    prices.fill(at, columns, dtype, unit, entries.end_ns[at] - entries.start_ns[at])


def aggregates_of(sums: Mapping[str, int]) -> tuple[StepAggregates | None, bool]:
    """(sums for the ledger's formulas, whether the context lengths are among them).

    Without tokens, one a row is taken: a decode step. None where not even rows are known.
    """
    rows = sums.get("rows")
    if rows is None:
        return None, False
    tokens = sums.get("tokens", rows)
    has_context = "sk" in sums and "sqsk" in sums
    known = {
        "tokens": tokens,
        "rows": rows,
        "full_rows": 0,
        "sk": sums.get("sk", 0),
        "sqsk": sums.get("sqsk", 0),
        "sqsq": sums.get("sqsq", tokens),
        "sk_window": sums.get("sk_window", sums.get("sk", 0)),
        "pairs_window": sums.get("pairs_window", sums.get("sqsk", 0)),
    }
    return StepAggregates(**{term: known[term] for term in TERMS[1:]}), has_context
