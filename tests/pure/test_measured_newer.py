"""A newer probe replaces what it measured again and leaves the rest."""

from dataclasses import replace

import pytest

from tpinfer.config.errors import TopologyError
from tpinfer.config.measured import (
    CollectiveFit,
    DeviceMeasurement,
    GroupMeasurement,
    Measurement,
)

ALONE = DeviceMeasurement("box", ("0", "1"), 1, eager_floor_s=1e-6)
TWO = DeviceMeasurement("box", ("0", "1"), 2, eager_floor_s=2e-6)
RING = CollectiveFit("all_reduce", "shared_memory", False, 1e-5, 0, 1e9, 2e-5, 0, 2e9, 512, 1024, 0)
GLOO = replace(RING, by="gloo")
PAIR = (("box", "0"), ("box", "1"))


def measured(
    date: str, *devices: DeviceMeasurement, fits: tuple[CollectiveFit, ...] = ()
) -> Measurement:
    """A probe with one group where it has collectives."""
    groups = (GroupMeasurement(PAIR, fits),) if fits else ()
    return Measurement("box", date, devices=devices, groups=groups)


def test_what_was_measured_again_is_replaced_and_the_rest_stays() -> None:
    old = measured("2026-01-01T00:00:00Z", ALONE, TWO, fits=(RING, GLOO))
    faster = replace(TWO, eager_floor_s=1.5e-6)
    quicker = replace(RING, a_s=5e-6)
    found = old.with_newer(measured("2026-02-01T00:00:00Z", faster, fits=(quicker,)))
    assert found.date == "2026-02-01T00:00:00Z"
    assert found.devices == (ALONE, faster)
    assert found.groups == (GroupMeasurement(PAIR, (GLOO, quicker)),)
    assert found.device("box", "0", 1) == ALONE
    assert found.device("box", "0", 2) == faster


def test_a_probe_alone_keeps_the_groups_of_before() -> None:
    old = measured("2026-01-01T00:00:00Z", TWO, fits=(RING,))
    found = old.with_newer(measured("2026-02-01T00:00:00Z", ALONE))
    assert found.devices == (TWO, ALONE)
    assert found.groups == old.groups


def test_another_topology_is_refused() -> None:
    other = replace(measured("2026-02-01T00:00:00Z", ALONE), topology="elsewhere")
    with pytest.raises(TopologyError, match=r"topology elsewhere, but the file holds .* of box"):
        measured("2026-01-01T00:00:00Z", TWO).with_newer(other)
