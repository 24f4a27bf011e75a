"""What the classifier's tests share: ceilings, questions to a `Work`, what each one promises."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from tpprof.classify.manifest import Manifest, model_manifest
from tpprof.classify.work import Work, WorkKind
from tpprof.events import Trace

from tests.pure.models import tiny
from tests.pure.test_tpprof_roles import KERNELS
from tests.pure.tpprof_rows import Row
from tpinfer.config.ceilings import Ceilings, MemoryLevel
from tpinfer.config.dtypes import DType
from tpinfer.costs.leaves import LEAVES
from tpinfer.costs.ledger import CostLedger
from tpinfer.costs.ops import StepAggregates
from tpinfer.sharding.partition import partition_model

CEILINGS = Ceilings(
    memory=(MemoryLevel("L2", 50_000_000, 4e12), MemoryLevel("HBM", 80 << 30, 1e12)),
    flops_per_s={DType.BFLOAT16: 1e14, DType.FLOAT32: 1e13, DType.FLOAT8_E4M3: 2e14},
    kernel_floor_s=2e-6,
    collective_latency_s=5e-6,
    collective_bytes_per_s=1e11,
    origin="made up",
)
BF16 = "c10::BFloat16"
GEMM, REDUCE = KERNELS["gemm"], KERNELS["reduce"]


def mm(rows: int, depth: int, columns: int, dtype: str = BF16) -> tuple[str, list]:
    return "aten::mm", [([rows, depth], dtype), ([depth, columns], dtype)]


def at(trace: Trace, work: Work, row: Row) -> int:
    """Entry of a row; its times are its own in each trace."""
    rows = np.flatnonzero((work.start_ns == row.start_ns) & (work.end_ns == row.end_ns))
    [entry] = [i for i in rows.tolist() if trace.text(work.row[i]) == row.name]
    return entry


def leaf(work: Work, entry: int) -> str:
    return LEAVES[work.leaf[entry]]


def key(work: Work, entry: int) -> str:
    return work.keys[work.key[entry]] if work.key[entry] >= 0 else ""


def check_whole(trace: Trace, work: Work) -> None:
    """What a Work promises, of any trace."""
    columns = [column for column in vars(work).values() if isinstance(column, np.ndarray)]
    assert {len(column) for column in columns} == {len(work)}
    assert all(len(column) == len(work) for column in work.ceilings_ns.values())
    order = np.lexsort((-work.end_ns, work.lane, work.start_ns))
    assert (order == np.arange(len(work))).all()
    assert (work.floor_ns >= 0).all() and (work.end_ns >= work.start_ns).all()
    for column in (work.key, work.comm_op, work.comm_group):
        assert column.max(initial=-1) < len(work.keys)
    comm = np.isin(work.kind, (WorkKind.COMM, WorkKind.FUSED_COMM))
    assert ((work.leaf == LEAVES.index("comm_unsplit")) == comm).all()
    assert ((work.comm_op >= 0) == comm).all()
    assert ((work.leaf == LEAVES.index("copy")) == (work.kind == WorkKind.COPY)).all()


def ours(size: int = 2, **changes: object) -> tuple[CostLedger, Manifest]:
    ledger = CostLedger(
        tiny(**changes), partition_model(tiny(**changes), size), 0, DType.BFLOAT16, DType.BFLOAT16
    )
    return ledger, replace(model_manifest(ledger), ceilings=CEILINGS)


SUMS = StepAggregates(3, 3, 0, 60, 60, 3, 60, 60)


def annotation(number: int, sums: StepAggregates = SUMS) -> str:
    return f"tpinfer.step id={number} phase=decode " + " ".join(
        f"{name}={value}" for name, value in sums.named().items()
    )


def check_costs(work: Work, ledger: CostLedger, ops: Mapping[str, list[int]]) -> None:
    """Entries of each op together cost what the ledger says."""
    for op, entries in ops.items():
        cost = ledger.cost(op, SUMS)
        assert work.flops[entries].sum() == cost.flops, op
        assert work.num_bytes[entries].sum() == cost.bytes_moved, op
        assert {key(work, entry) for entry in entries} == {op}
