"""The table of scenarios: one run for each thing that an analysis must get right."""

from tests.traces.scenario import Clock, Damage, Delay, Scenario

SECONDS = 1_000_000_000
STEADY = Scenario("steady")
FAR_CLOCKS = (
    Clock(),
    Clock(-3 * SECONDS + 12_345, 40),
    Clock(1_700_000_123, -85),
    Clock(250_017, 100),
)
"""Rank 0's is the reference. Seconds apart, drifting by up to 100 ppm."""

SCENARIOS = {
    one.name: one
    for one in (
        Scenario("alone", num_ranks=1),
        STEADY,
        Scenario("three ranks", num_ranks=3, seed=3),
        Scenario("four ranks", num_ranks=4, seed=4),
        Scenario("eight ranks", num_ranks=8, seed=8),
        Scenario("kernel late", num_ranks=4, delays=(Delay(2, 250_000, "kernel"),)),
        Scenario("host late", num_ranks=4, delays=(Delay(1, 400_000),), is_graph=True),
        Scenario("a little late", num_ranks=4, delays=(Delay(3, 20_000, "kernel"),), seed=5),
        Scenario("late once", num_ranks=3, delays=(Delay(1, 1_000_000, "kernel", 2, 0),)),
        Scenario("clock offset", num_ranks=4, clocks=tuple(Clock(c.offset_ns) for c in FAR_CLOCKS)),
        Scenario(
            "clock drift",
            num_ranks=4,
            num_steps=8,
            clocks=FAR_CLOCKS,
            delays=(Delay(3, 50_000, "kernel"),),
        ),
        Scenario("hidden", is_hidden=True),
        Scenario("hidden and late", 4, is_hidden=True, delays=(Delay(0, 600_000, "kernel"),)),
        Scenario("graph", num_ranks=2, num_steps=6, is_graph=True),
        Scenario("graph on eight ranks", num_ranks=8, num_steps=5, is_graph=True, seed=11),
        Scenario(
            "graph with drift",
            num_ranks=4,
            num_steps=8,
            is_graph=True,
            clocks=FAR_CLOCKS,
            delays=(Delay(1, 60_000, "kernel"),),
        ),
        Scenario("dependent launch", num_ranks=2, overlap_ns=1800),
        Scenario("host bound", num_ranks=2, operator_ns=90_000, launch_ns=9000, batch=1),
        Scenario("custom reduce", num_ranks=2, collective="custom"),
        Scenario("fused reduce", num_ranks=4, collective="fused", delays=(Delay(0, 90_000),)),
        Scenario("device late", num_ranks=2, late_start_ns=60_000),
        Scenario("event late", is_hidden=True, event_latency_ns=400_000),
        Scenario("queue gaps", num_ranks=2, queue_gap_ns=1000),
        Scenario("ragged exits", num_ranks=4, num_steps=8, exit_jitter_ns=300),
        Scenario("two groups", num_ranks=4, group_size=2, delays=(Delay(3, 80_000, "kernel"),)),
        Scenario("broadcast", num_ranks=3, has_broadcast=True, delays=(Delay(1, 70_000),)),
        Scenario("overlapped steps", num_ranks=2, num_steps=6, is_async=True),
        Scenario("overlapped graphs", 4, 8, is_async=True, is_graph=True, clocks=FAR_CLOCKS),
        Scenario("kernels before their launch", num_ranks=2, device_shift_ns=-9000),
        Scenario("long", num_ranks=2, num_steps=12, num_layers=6, is_graph=True, seed=21),
    )
}
"""By name. None of them has a spoilt recording."""

DAMAGED = {
    one.name: one
    for one in (
        Scenario(
            "replay lost kernels",
            num_steps=6,
            is_graph=True,
            damages=(Damage("lost", 1, 3, first=9, count=4),),
        ),
        Scenario(
            "replay lost its tail",
            num_steps=6,
            is_graph=True,
            damages=(Damage("lost", 0, 4, first=7, count=0),),
        ),
        Scenario(
            "replay lost a reduce",
            num_steps=6,
            is_graph=True,
            damages=(Damage("lost", 1, 2, first=5, count=1),),
        ),
        Scenario("zero time", num_steps=6, is_graph=True, damages=(Damage("zero", 0, 3, first=4),)),
        Scenario("eager zero time", num_steps=6, damages=(Damage("zero", 1, 4, first=8),)),
        Scenario("backwards", num_steps=6, damages=(Damage("backwards", 1, 2, first=2),)),
        Scenario("endless", num_steps=6, damages=(Damage("endless", 0, 3, first=6),)),
    )
}
"""Runs of which the recorder lost or spoilt rows of one step."""
