"""The words that wall time is split into, the same for the live counters, the profiler and the
planner."""

from collections.abc import Mapping

ROLLUP: dict[str, tuple[str, ...]] = {
    "compute": ("compute",),
    "memory": ("memory", "copy"),
    "communication": ("comm_transfer", "comm_wait", "comm_unsplit", "fused_comm"),
    "small_kernels": ("latency", "graph_gap", "unmodelled"),
    "host": (
        "host", "launch_latency", "dependency_wait", "host_tail", "idle_unexplained", "unrecorded",
    ),
    "queue": ("queue",),
}  # fmt: skip
"""The six words and the leaves under each."""
LEAVES = tuple(leaf for under in ROLLUP.values() for leaf in under)
"""Every leaf, in the order of reports."""


def roll_up(leaves: Mapping[str, int]) -> dict[str, int]:
    """ns by the six words; they sum to what the leaves sum to."""
    return {word: sum(leaves.get(leaf, 0) for leaf in under) for word, under in ROLLUP.items()}
