"""The collective that was measured to be quickest at the size a decode step sums."""

from dataclasses import replace

from tpinfer.config.measured import CollectiveFit, GroupMeasurement, Measurement
from tpinfer.config.topology import Topology
from tpinfer.config.topology_reader import load_topology, with_measurement
from tpinfer.costs.choices import quickest_collective

PAIR = (("laptop", "0"), ("laptop", "1"))
RING = CollectiveFit(
    "all_reduce", "shared_memory", False, 9e-6, 0, 5e9, 2e-5, 0, 8e9, 512, 1 << 23, 0.1
)
DIRECT = replace(RING, by="deepspeed", a_s=4e-6, b1_bytes_per_s=1e9, c_s=4e-6, b2_bytes_per_s=1e9)


def laptop(*fits: CollectiveFit) -> Topology:
    """Two ranks whose all-reduces were timed."""
    found = Measurement(
        "cpu-laptop", "2026-11-25T19:00:00Z", groups=(GroupMeasurement(PAIR, fits),)
    )
    return with_measurement(load_topology("cpu-laptop"), found)


def test_the_size_of_the_message_decides() -> None:
    small = quickest_collective(laptop(RING, DIRECT), 2, 2048)
    assert small == (
        "deepspeed",
        "6.0 us for a sum of 2.05 kB, 9.4 by shared_memory; measured 2026-11-25",
    )
    large = quickest_collective(laptop(RING, DIRECT), 2, 1 << 20)
    assert large is not None
    assert large[0] == "shared_memory"


def test_half_the_rate_moves_the_choice() -> None:
    size = 20_000
    assert (quickest_collective(laptop(RING, DIRECT), 2, size) or "")[0] == "shared_memory"
    slow = replace(RING, b1_bytes_per_s=RING.b1_bytes_per_s / 8, c_s=1e-4)
    assert (quickest_collective(laptop(slow, DIRECT), 2, size) or "")[0] == "deepspeed"


def test_nothing_is_said_where_there_is_nothing_to_compare() -> None:
    assert quickest_collective(load_topology("cpu-laptop"), 2, 2048) is None
    assert quickest_collective(laptop(RING), 2, 2048) is None
    assert quickest_collective(laptop(RING, DIRECT), 1, 2048) is None
    # Three ranks were never timed.
    assert quickest_collective(laptop(RING, DIRECT), 3, 2048) is None
