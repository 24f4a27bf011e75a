"""Which backend sums messages of which size: by what was measured, or by what the file's links say,
and moved by a link of another rate."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpinfer.config.measured import CollectiveFit, GroupMeasurement, Measurement
from tpinfer.config.topology import Topology
from tpinfer.config.topology_reader import load_topology, parse_topology, with_measurement
from tpinfer.costs.collective_sizes import (
    LEAST_GAIN,
    LEAST_GAIN_S,
    CollectiveCurves,
    SizedCollective,
    collective_by_size,
    collective_curves,
)

PAIR = (("laptop", "0"), ("laptop", "1"))
RING = CollectiveFit(
    "all_reduce", "shared_memory", False, 9e-6, 0, 5e9, 2e-5, 0, 8e9, 512, 1 << 23, 0.1
)
DIRECT = replace(RING, by="deepspeed", a_s=4e-6, b1_bytes_per_s=1e9, c_s=4e-6, b2_bytes_per_s=1e9)
LINKS = """
version: 1
name: two-paths
hosts:
  box:
    cpu: {sku: cpu-avx2, cores: 8, mem: 16GB, mem_bw: 40GB/s}
    ranks: 2
    links:
      - {kind: SHM, ids: 0..1, bw: 4GB/s, latency: 4us, per_peer: 1us, attainable: 0.5}
      - {kind: GLOO, ids: 0..1, bw: 16GB/s, latency: 80us, per_peer: 10us, attainable: 0.5}
"""


def laptop(*fits: CollectiveFit) -> Topology:
    """Two ranks whose all-reduces were timed."""
    found = Measurement(
        "cpu-laptop", "2026-11-25T19:00:00Z", groups=(GroupMeasurement(PAIR, fits),)
    )
    return with_measurement(load_topology("cpu-laptop"), found)


def chosen(topology: Topology, row: int = 2048, step: int = 4 << 20) -> SizedCollective:
    curves = collective_curves(topology, 2, row, step)
    assert curves is not None
    found = collective_by_size(curves, curves.names())
    assert found is not None
    return found


def test_the_size_of_the_message_decides() -> None:
    found = chosen(laptop(RING, DIRECT))
    assert (found.small, found.large) == ("deepspeed", "shared_memory")
    # 4 us + S / 1 GB/s = 9 us + S / 5 GB/s, and a pair sends S.
    assert found.from_bytes == pytest.approx(6250, rel=0.01)
    assert "2.05 kB 6.0 against 9.4 us by shared_memory" in found.reason
    assert "measured 2026-11-25" in found.reason
    assert chosen(laptop(RING, DIRECT), 1024, 2048).large is None


def test_of_two_fits_of_one_backend_the_quicker_counts() -> None:
    in_graph = replace(DIRECT, graph=True, a_s=DIRECT.a_s / 2, c_s=DIRECT.c_s / 2)
    for fits in ((RING, DIRECT, in_graph), (in_graph, RING, DIRECT)):
        curves = collective_curves(laptop(*fits), 2, 2048, 4 << 20)
        assert curves is not None
        assert curves.fits == (in_graph, RING)


def test_links_of_the_file_count_where_nothing_was_measured() -> None:
    topology = parse_topology(LINKS, "two.yaml")
    found = chosen(topology)
    assert (found.small, found.large) == ("shared_memory", "gloo")
    # 5 us + S / 2 GB/s = 90 us + S / 8 GB/s
    assert found.from_bytes == pytest.approx(85e-6 / (1 / 2e9 - 1 / 8e9), rel=0.01)
    assert "links of two.yaml" in found.reason


def test_half_the_rate_of_a_link_moves_the_crossover() -> None:
    whole = chosen(parse_topology(LINKS, "two.yaml")).from_bytes
    expected = 85e-6 / (1 / 1e9 - 1 / 8e9)
    edited = parse_topology(LINKS.replace("bw: 4GB/s", "bw: 2GB/s"), "two.yaml")
    given_here = parse_topology(LINKS, "two.yaml", None, ["hosts.box.links.0.bw=2GB/s"])
    for changed in (edited, given_here):
        assert chosen(changed).from_bytes == pytest.approx(expected, rel=0.01)
    assert expected < 0.45 * whole
    slow_gloo = parse_topology(LINKS.replace("bw: 16GB/s", "bw: 3GB/s"), "two.yaml")
    assert chosen(slow_gloo).large is None, "the other one is quicker at every size"


def test_nothing_is_said_where_there_is_nothing_to_compare() -> None:
    assert collective_curves(load_topology("cpu-laptop"), 2, 2048, 4096) is None
    assert collective_curves(laptop(RING), 2, 2048, 4096) is None
    assert collective_curves(laptop(RING, DIRECT), 1, 2048, 4096) is None
    # Three ranks were never timed.
    assert collective_curves(laptop(RING, DIRECT), 3, 2048, 4096) is None


FITS = st.builds(
    lambda a, b1, c, b2: replace(RING, a_s=a, b1_bytes_per_s=b1, c_s=c, b2_bytes_per_s=b2),
    st.floats(1e-6, 1e-3), st.floats(1e7, 1e11), st.floats(1e-6, 1e-3), st.floats(1e7, 1e11),
)  # fmt: skip


@given(st.lists(FITS, min_size=2, max_size=3), st.integers(64, 8192), st.integers(8192, 1 << 24))
def test_the_ends_are_served_by_what_is_quickest_there(
    fits: list[CollectiveFit], row: int, step: int
) -> None:
    names = ("deepspeed", "gloo", "shared_memory")
    named = tuple(replace(fit, by=name) for fit, name in zip(fits, names, strict=False))
    curves = CollectiveCurves(2, row, step, named, "made up")
    found = collective_by_size(curves, curves.names())
    assert found is not None
    best = [min(curves.seconds(name, size) for name in curves.names()) for size in (row, step)]
    taken = curves.seconds(found.small, row), curves.seconds(found.large or found.small, step)
    lost = [mine - least for mine, least in zip(taken, best, strict=True)]
    if found.large is None:  # one end may lose what is not worth a second backend, not both
        assert min(lost) == 0
        assert lost[0] <= max(LEAST_GAIN_S, LEAST_GAIN * taken[0])
    else:
        assert lost == [0, 0]
        assert row < found.from_bytes <= step
        assert curves.seconds(found.large, found.from_bytes) < curves.seconds(
            found.small, found.from_bytes
        )
