"""What crosses to the ranks: the bytes are golden, damage is noticed."""

import msgspec
import pytest

from tpinfer.steps.plan import Command, RowPlan, SequenceRecord, StepPlan, decode, encode


def test_plan_round_trip_and_golden_bytes() -> None:
    plan = StepPlan(5, (RowPlan(0, 7, (3, 4), 0, False), RowPlan(2, 1)), (1,))
    payload = encode(plan)
    assert decode(payload) == plan
    assert payload.hex() == "9402059295000792030400c2950201" + "9000c3" + "9101"


def test_record_and_command_round_trip() -> None:
    record = SequenceRecord(3, (1, 2, 70000), 0.5, 40, 0.9, 0.0, 1 << 62, 1)
    assert decode(encode(record)) == record
    assert decode(encode(Command("close"))) == Command("close")


def test_deltas_stay_small() -> None:
    plan = StepPlan(10**6, tuple(RowPlan(row, 1) for row in range(256)))
    assert len(encode(plan)) < 256 * 9


@pytest.mark.parametrize("payload", [b"", b"\x90", b"\x93\x09\x01\x02", encode(Command("x"))[:-1]])
def test_damage_is_an_error(payload: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode(payload)
