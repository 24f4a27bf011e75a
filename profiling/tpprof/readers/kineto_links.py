"""Which launch issued a kernel, for which operator, and which rows are collectives."""

import numpy as np

from ..events import NONE, Collectives, Kind, no_collectives
from .assembly import Rows, StringTable
from .collective_names import NOT_COLLECTIVES, collective_name, message_bytes
from .kineto_columns import CollectiveList, as_number
from .links import enclosing_op, first_with, is_around

_LAUNCHERS = ("launch", "memcpy", "memset")
_COMM_OP = "record_param_comms"


def link(rows: Rows, correlation: np.ndarray, external: np.ndarray, strings: StringTable) -> None:
    """Fill `launch` and `op` of the rows, and the grids that only launches carry.

    A kernel belongs to the launch of its correlation id. Operators are found by External id, or,
    where that is missing or cannot be right, as the innermost one around the launch on its thread.
    Kernels of a graph replay were issued for no operator of this moment, so they get none.
    """
    is_device = rows.kind <= Kind.MEMSET
    is_launch = rows.kind == Kind.LAUNCH
    device, launches = np.flatnonzero(is_device), np.flatnonzero(is_launch)
    ops = np.flatnonzero(rows.kind == Kind.OP)
    likely = strings.holding(*_LAUNCHERS)[rows.name[launches]]
    order = launches[np.lexsort((rows.start_ns[launches], ~likely, correlation[launches]))]
    launch = first_with(correlation[order], order, correlation[device])
    is_graph = strings.holding("graphlaunch")
    in_graph = (launch >= 0) & is_graph[rows.name[launch]]

    by_id = ops[np.argsort(external[ops], kind="stable")]
    op_of_launch = first_with(external[by_id], by_id, external[launches], lowest=1)
    op_of_launch[~is_around(rows, op_of_launch, rows.start_ns[launches])] = NONE
    alone = op_of_launch < 0
    op_of_launch[alone] = enclosing_op(rows, ops, launches[alone])
    rows.op[launches] = op_of_launch

    op = first_with(external[by_id], by_id, external[device], lowest=1)
    issued = np.where(launch >= 0, rows.start_ns[launch], rows.start_ns[op])
    op[~is_around(rows, op, issued)] = NONE
    op = np.where((op < 0) & (launch >= 0), rows.op[launch], op)
    op[in_graph] = NONE
    rows.launch[device], rows.op[device] = launch, op
    told = (op >= 0) & (launch >= 0)
    untold = told & (rows.op[launch] < 0)
    rows.op[launch[untold]] = op[untold]

    grid = np.where((launch >= 0) & ~in_graph, rows.num_blocks[launch], NONE)
    own = rows.num_blocks[device]
    rows.num_blocks[device] = np.where(own < 0, grid, own)
    rows.num_blocks[rows.kind != Kind.KERNEL] = NONE


def collectives(rows: Rows, found: CollectiveList, strings: StringTable) -> Collectives:
    """The table of collectives: kernels where there are any, else (CPU ranks) the operators.

    A kernel without arguments takes those of the `record_param_comms` it was launched for.
    """
    told = dict(zip(found.rows, found.arguments, strict=True))
    kernels = np.flatnonzero(rows.kind == Kind.KERNEL)
    if len(kernels):
        entries = {row: told[row] for row in told if rows.kind[row] == Kind.KERNEL}
        comm_ops = [row for row in told if rows.kind[row] == Kind.OP]
        from_ops = kernels[np.isin(rows.op[kernels], comm_ops)]
        is_nccl = strings.holding("nccl")
        for row in from_ops[is_nccl[rows.name[from_ops]]].tolist():
            entries.setdefault(row, told[int(rows.op[row])])
    else:
        comm = strings.get(_COMM_OP, NONE)
        entries = {row: told[row] for row in told if rows.name[row] == comm}
    names = {row: collective_name(entries[row].collective or "") for row in sorted(entries)}
    kept = [row for row, name in names.items() if name not in NOT_COLLECTIVES]
    if not kept:
        return no_collectives()
    arguments = [entries[row] for row in kept]
    groups = [NONE if a.group_name is None else strings[str(a.group_name)] for a in arguments]
    sizes = [
        message_bytes(a.dtype, as_number(a.in_elements), as_number(a.out_elements))
        for a in arguments
    ]
    return Collectives(
        row=np.array(kept, np.int64),
        op=np.array([strings[names[row]] for row in kept], np.int32),
        num_bytes=np.array(sizes, np.int64),
        group=np.array(groups, np.int32),
        group_size=_clipped([as_number(a.group_size) for a in arguments]),
        sequence=np.array([as_number(a.sequence) for a in arguments], np.int64),
    )


def _clipped(values: list[int]) -> np.ndarray:
    """int32: sizes; NONE for what is none."""
    sizes = np.array(values, np.int64)
    return np.where((sizes > 0) & (sizes < 2**31), sizes, NONE).astype(np.int32)
