"""What crosses to the ranks: the bytes are golden, damage is noticed."""

import msgspec
import pytest

from tpinfer.steps.plan import Command, SamplingRecord, SequenceRecord, StepPlan, decode, encode


def test_plan_round_trip_and_golden_bytes() -> None:
    plan = StepPlan(5, (0, 2), (7, 1), (0, 1), ((0, 3, 4),), ((2, 1),), (1,), ((8, 9),))
    payload = encode(plan)
    assert decode(payload) == plan
    assert payload.hex() == "9b0205920002920701920001919300030491920201910191920809" + "9090"
    assert list(plan.parts()) == [(0, 7, 0), (2, 1, 1)]


def test_record_and_command_round_trip() -> None:
    sampling = SamplingRecord(0.5, 40, 0.9, 0.0, 1 << 62, 1, logit_bias=((3, -1.5),))
    record = SequenceRecord(3, (1, 2, 70000), 2, 0, sampling)
    assert decode(encode(record)) == record
    assert decode(encode(Command("close"))) == Command("close")


def test_deltas_stay_small() -> None:
    plan = StepPlan(10**6, tuple(range(256)), (1,) * 256, (1,) * 256)
    assert len(encode(plan)) < 256 * 4 + 64


@pytest.mark.parametrize("payload", [b"", b"\x90", b"\x93\x09\x01\x02", encode(Command("x"))[:-1]])
def test_damage_is_an_error(payload: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode(payload)
