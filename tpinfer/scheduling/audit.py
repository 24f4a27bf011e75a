"""Whether blocks and rows add up. For tests, and for an engine that has nothing to do."""

from collections.abc import Collection

from tpinfer.scheduling.block_store import BlockStore
from tpinfer.scheduling.request import Sequence
from tpinfer.scheduling.rows import RunningRows


def check_sums(store: BlockStore, rows: RunningRows, unfinished: Collection[Sequence]) -> None:
    """Raises RuntimeError, with numbers, unless free, cached and referenced blocks make up the
    cache and its host tier, and every row is free or has one sequence."""
    store.pool.recount([sequence.blocks for sequence in unfinished])
    host = store.host
    held = sum(len(sequence.host_blocks) for sequence in unfinished)
    if held != host.num_held or host.num_free + host.num_cached + held != host.num_blocks:
        raise RuntimeError(
            f"host blocks do not add up: {host.num_free} free + {host.num_cached} cached + "
            f"{host.num_held} held of {host.num_blocks}; sequences hold {held}"
        )
    taken = [sequence.row for sequence in rows.running]
    if sorted([*taken, *rows.free]) != list(range(rows.num_rows)):
        raise RuntimeError(
            f"rows do not add up: {taken} taken and {rows.free} free of {rows.num_rows}"
        )


def check_at_rest(store: BlockStore, rows: RunningRows, unfinished: Collection[Sequence]) -> None:
    """Raises RuntimeError, with numbers, when anything is held though nothing is left to do."""
    check_sums(store, rows, unfinished)
    if unfinished or store.pool.num_referenced or store.host.num_held or rows.running:
        raise RuntimeError(
            f"not at rest: {len(unfinished)} sequences unfinished, {len(rows.running)} in rows, "
            f"{store.pool.num_referenced} of {store.pool.num_blocks} blocks referenced, "
            f"{store.host.num_held} of {store.host.num_blocks} host blocks held"
        )
