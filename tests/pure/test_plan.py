"""What crosses to the ranks: the bytes are golden, damage is noticed."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pure.golden import check_golden
from tpinfer.steps.plan import (
    FORMAT_VERSION,
    Command,
    Message,
    SamplingRecord,
    SequenceRecord,
    StepPlan,
    decode,
    encode,
)

SAMPLING = SamplingRecord(
    temperature=0.5,
    top_k=40,
    top_p=0.9,
    min_p=0.125,
    seed=1 << 62,
    index=1,
    repetition_penalty=1.5,
    frequency_penalty=-0.25,
    presence_penalty=0.75,
    logit_bias=((3, -1.5), (70000, 2.0)),
    allowed_token_ids=(1, 2, 300),
    banned_token_ids=(4,),
    min_tokens=6,
    stop_token_ids=(151645,),
    num_logprobs=5,
    num_prompt_logprobs=0,
)
WHOLE = {
    "SequenceRecord": SequenceRecord(
        row=3, token_ids=(1, 2, 70000), num_prompt_tokens=2, num_computed=16, sampling=SAMPLING
    ),
    "StepPlan": StepPlan(
        step_id=5,
        rows=(0, 2),
        num_tokens=(7, 1),
        num_samples=(0, 1),
        new_blocks=((0, 3, 4),),
        dropped_blocks=((2, 1),),
        released_rows=(1,),
        copies=((8, 9),),
        to_host=((300, 2),),
        from_host=((5, 70000),),
    ),
    "Command": Command(name="profile_write", text="traces/größer"),
}
"""Each record with every field set, none to its default."""


def structs() -> list[type[msgspec.Struct]]:
    return [SamplingRecord, SequenceRecord, StepPlan, Command]


@pytest.mark.parametrize("struct", structs())
def test_the_whole_records_set_every_field(struct: type[msgspec.Struct]) -> None:
    found = SAMPLING if struct is SamplingRecord else WHOLE[struct.__name__]
    for field in msgspec.structs.fields(struct):
        assert getattr(found, field.name) != field.default, field.name


def test_bytes_and_fields_change_only_with_the_version(tmp_path: Path) -> None:
    """The golden's name carries the version: whoever changes a record raises FORMAT_VERSION in
    `steps.plan`, adds the new golden and deletes the old one."""
    lines = []
    for struct in structs():
        lines.append(f"{struct.__name__} tag={struct.__struct_config__.tag}\n")
        for field in msgspec.structs.fields(struct):
            default = "" if field.default is msgspec.NODEFAULT else f" = {field.default!r}"
            kind = field.type.__name__ if isinstance(field.type, type) else field.type
            lines.append(f"  {field.name}: {kind}{default}\n")
    for name, message in WHOLE.items():
        lines.append(f"{name} bytes {encode(message).hex()}\n")
    check_golden(f"plan_format_{FORMAT_VERSION}.txt", "".join(lines), tmp_path)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_records_come_back_as_they_were(name: str) -> None:
    assert decode(encode(WHOLE[name])) == WHOLE[name]


def test_parts_are_in_step_order() -> None:
    plan = WHOLE["StepPlan"]
    assert isinstance(plan, StepPlan)
    assert list(plan.parts()) == [(0, 7, 0), (2, 1, 1)]


@given(st.from_type(SequenceRecord) | st.from_type(StepPlan) | st.from_type(Command))
def test_any_record_comes_back_as_it_was(message: Message) -> None:
    try:
        payload = encode(message)
    except (OverflowError, UnicodeEncodeError):
        return  # ints beyond 64 bits and lone surrogates have no bytes
    assert decode(payload) == message


def test_deltas_stay_small() -> None:
    plan = StepPlan(10**6, tuple(range(256)), (1,) * 256, (1,) * 256)
    assert len(encode(plan)) < 256 * 4 + 64


@pytest.mark.parametrize("payload", [b"", b"\x90", b"\x93\x09\x01\x02", encode(Command("x"))[:-1]])
def test_damage_is_an_error(payload: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode(payload)


@given(st.sampled_from(sorted(WHOLE)), st.binary(max_size=64), st.integers(0, 400))
def test_random_damage_is_an_error_or_a_record(name: str, noise: bytes, place: int) -> None:
    """Never anything else, such as a crash or a half-decoded record."""
    payload = encode(WHOLE[name])
    damaged = payload[: place % (len(payload) + 1)] + noise
    try:
        found = decode(damaged)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    assert isinstance(found, SequenceRecord | StepPlan | Command)
