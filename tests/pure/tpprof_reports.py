"""A hand-made report of two ranks for tests of tpprof's reports: exact sums, nasty names."""

from collections.abc import Mapping
from dataclasses import replace

from tpprof.results import (
    Alignment,
    CollectiveResult,
    Coverage,
    Group,
    OpResult,
    Report,
    Split,
    Window,
)

from tpinfer.costs.leaves import roll_up

NASTY = "<script>alert('kernel & co')</script>"
NUM_STEPS, NUM_LAYERS = 4, 3
CEILINGS: dict[str, object] = {
    "memory": [
        {"name": "L2", "capacity_bytes": 50_000_000, "bytes_per_s": 5.5e12},
        {"name": "HBM", "capacity_bytes": 80_000_000_000, "bytes_per_s": 2.78e12},
    ],
    "flops_per_s": {"bfloat16": 7.9e14, "float32": 5.4e13},
    "kernel_floor_s": 3.7e-6,
    "collective_latency_s": 6.7e-6,
    "collective_bytes_per_s": 3.5e11,
    "origin": "topology dgx-h100.yaml (catalogue h100-sxm-80g)",
}
_STEP = {
    0: {
        "compute": 410_003, "memory": 2_300_001, "copy": 12_000, "comm_transfer": 310_007,
        "comm_wait": 702_000, "latency": 240_000, "unmodelled": 31_000, "host": 800_011,
        "launch_latency": 60_000, "idle_unexplained": 9_000,
    },
    1: {
        "compute": 410_003, "memory": 3_010_001, "copy": 12_000, "comm_transfer": 310_007,
        "comm_wait": 4_000, "latency": 240_000, "unmodelled": 31_000, "host": 788_011,
        "launch_latency": 60_000, "idle_unexplained": 9_000,
    },
}  # fmt: skip


def split(rank: int, leaves: Mapping[str, int], hidden_ns: int = 0) -> Split:
    """A split whose wall is the sum of its leaves; the host part is mostly scheduling."""
    found = {leaf: spent for leaf, spent in leaves.items() if spent}
    host = found.get("host", 0)
    parts = {"schedule": host - host // 3, "python": host // 3} if host else {}
    return Split(rank, sum(found.values()), found, roll_up(found), parts, hidden_ns)


def times(leaves: Mapping[str, int], count: int) -> dict[str, int]:
    """Leaves of `count` equal stretches."""
    return {leaf: spent * count for leaf, spent in leaves.items()}


def collective(step: int, layer: int, part: str) -> CollectiveResult:
    """One all-reduce of 128 KiB that rank 1 comes to last."""
    return CollectiveResult(
        name="allreduce",
        bytes=131_072,
        ranks=[0, 1],
        wait_ns=[117_000, 0 if layer else 1_000],
        transfer_ns=[51_667, 51_667],
        busbw_gbps=2.54,
        last_rank=1,
        last_rank_was=f"layers.{layer}.{part}",
        start_ns=1_000_000 + step * 5_000_000 + layer * 1_500_000,
    )


def ops(rank: int) -> list[OpResult]:
    """Linears near the memory ceiling, a norm that is too small, a kernel nobody knows."""
    found = []
    for layer in range(NUM_LAYERS):
        for part, spent, floor, size in (
            ("attn.qkv", 900_000, 700_000, 1_900_000_000),
            ("mlp.gate_up", 1_500_000, 1_350_000, 3_700_000_000),
            ("mlp.down", 2_000_000 if rank else 1_100_000, 640_000, 1_800_000_000),
        ):
            found.append(
                OpResult(
                    f"layers.{layer}.{part}", rank, spent, floor, spent - floor, "memory",
                    NUM_STEPS, flops=size, bytes=size,
                    ceilings_ns={"compute": size // 790_000, "memory": floor},
                )
            )  # fmt: skip
        found.append(
            OpResult(
                f"layers.{layer}.attn.norm",
                rank,
                80_000,
                30_000,
                50_000,
                "latency",
                4,
                10**6,
                10**7,
            )
        )
    found.append(OpResult("head", rank, 540_000, 430_000, 110_000, "compute", 4, 3 * 10**11, 10**8))
    found.append(OpResult(NASTY, rank, 124_000, 0, 124_000, "unmodelled", 4))
    found.append(
        OpResult(
            "allreduce", rank, 1_240_028, 240_000, 1_000_028, "communication", 24, 0, 3_145_728
        )
    )
    return found


def groups(rank: int) -> list[Group]:
    """Rows by layer that sum to the wall of the rank."""
    rows = []
    left = times(_STEP[rank], NUM_STEPS)
    for layer in range(NUM_LAYERS):
        share = {leaf: spent // 4 for leaf, spent in left.items()}
        rows.append(Group(f"layers.{layer}", rank, sum(share.values()), share, 40))
    rest = {leaf: spent - sum(row.leaves[leaf] for row in rows) for leaf, spent in left.items()}
    return [*rows, Group("(unattributed)", rank, sum(rest.values()), rest, 7)]


def windows() -> list[Window]:
    """Equal decode steps, end to end."""
    wall = sum(_STEP[0].values())
    return [
        Window(
            f"step {12 + i} decode", 10**9 + i * wall, 10**9 + (i + 1) * wall,
            [split(rank, leaves) for rank, leaves in _STEP.items()],
        )
        for i in range(NUM_STEPS)
    ]  # fmt: skip


def two_ranks() -> Report:
    """The example."""
    ranks = [split(r, times(leaves, NUM_STEPS), 40_000 * (1 - r)) for r, leaves in _STEP.items()]
    return Report(
        wall_ns=ranks[0].wall_ns,
        leaves=ranks[0].leaves,
        rollup=ranks[0].rollup,
        ranks=ranks,
        collectives=[
            collective(step, layer, part)
            for step in range(NUM_STEPS)
            for layer in range(NUM_LAYERS)
            for part in ("attn.out", "mlp.down")
        ],
        coverage=Coverage(0.97, 0.94, 1.0, 1.0, 0.99, 0.98),
        clock_alignment={
            "0": Alignment(0, 0.0, 0, True, 24),
            "1": Alignment(-12_345, 3.21, 410, True, 24),
        },
        dilation=1.021,
        warnings=["3 kernels start before their launch; their negative latency was counted as 0"],
        windows=windows(),
        by="layer",
        groups=[*groups(0), *groups(1)],
        ops=[*ops(0), *ops(1)],
        ceilings=CEILINGS,
        sources=["traces/rank0.trace.json.gz", "traces/rank1.trace.json.gz"],
    )


def one_rank(leaves: Mapping[str, int], **changes: object) -> Report:
    """A report of rank 0 alone with these leaves."""
    alone = split(0, leaves)
    report = Report(
        wall_ns=alone.wall_ns,
        leaves=alone.leaves,
        rollup=alone.rollup,
        ranks=[alone],
        collectives=[],
        coverage=Coverage(1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
        clock_alignment={},
        dilation=None,
        warnings=[],
    )
    return replace(report, **changes)  # pyright: ignore[reportArgumentType]
