"""Whether blocks and rows add up. For tests, and for an engine that has nothing to do."""

from collections.abc import Collection

from tpinfer.scheduling.request import Sequence
from tpinfer.scheduling.rows import RunningRows
from tpinfer.scheduling.sequence_blocks import SequenceBlocks


def check_sums(blocks: SequenceBlocks, rows: RunningRows, unfinished: Collection[Sequence]) -> None:
    """Raises RuntimeError, with numbers, unless free, cached and referenced blocks make up the
    cache and its host tier, and every row is free or has one sequence."""
    blocks.pool.recount([sequence.blocks for sequence in unfinished])
    host = blocks.host
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


def check_at_rest(
    blocks: SequenceBlocks, rows: RunningRows, unfinished: Collection[Sequence]
) -> None:
    """Raises RuntimeError, with numbers, when anything is held though nothing is left to do."""
    check_sums(blocks, rows, unfinished)
    if unfinished or blocks.pool.num_referenced or blocks.host.num_held or rows.running:
        raise RuntimeError(
            f"not at rest: {len(unfinished)} sequences unfinished, {len(rows.running)} in rows, "
            f"{blocks.pool.num_referenced} of {blocks.pool.num_blocks} blocks referenced, "
            f"{blocks.host.num_held} of {blocks.host.num_blocks} host blocks held"
        )
