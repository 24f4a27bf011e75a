"""Damaged recordings: what is whole is read, what is lost is told, nothing else escapes."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tpprof.errors import TraceError
from tpprof.events import Trace
from tpprof.readers.kineto import read_kineto

from tests.pure.tpprof_recordings import (
    all_said,
    check_promises,
    decode_step,
    document,
    event,
    row_named,
    write,
)


def read(folder: Path, content: Any, packed: bool = False, **options: Any) -> Trace:
    trace = read_kineto(write(folder / "rank.json", content, packed), **options)
    check_promises(trace)
    return trace


def read_events(folder: Path, *events: dict[str, Any], **beside: Any) -> Trace:
    return read(folder, document(events, **beside))


def test_rows_that_were_never_filled(tmp_path: Path) -> None:
    far = 4458676522690.655
    trace = read_events(
        tmp_path,
        event("kernel", "good", far, 5.0),
        event("kernel", "empty", 0, 0),
        event("kernel", "stray", 0, 5.0),
        event("kernel", "backwards", far + 9, -3.5),
        event("kernel", "endless", far, 1e300),
        event("kernel", "timeless", None, 1.0),
        event("kernel", "lengthless", far, None),
    )
    names = [row["name"] for row in all_said(trace)]
    assert sorted(names) == ["backwards", "endless", "good", "lengthless"]
    assert row_named(trace, "backwards")["end"] == row_named(trace, "backwards")["start"]
    assert trace.num_lost == 6
    assert len(trace.warnings) == 3 and all("rank.json" in w for w in trace.warnings)


def test_a_recording_may_begin_at_zero(tmp_path: Path) -> None:
    trace = read_events(tmp_path, event("cpu_op", "a", 0, 0), event("kernel", "k", 0, 1))
    assert len(trace) == 2 and trace.num_lost == 0


@pytest.mark.parametrize("word", ["inf", "nan", "NaN", "Infinity", "-inf", "-Infinity"])
def test_numbers_that_json_does_not_have(tmp_path: Path, word: str) -> None:
    text = json.dumps(document(decode_step())).replace("4.5", word)
    assert f'"warps per SM": {word}' in text
    plain = read(tmp_path, document(decode_step()))
    mended = read(tmp_path, text)
    assert all_said(mended) == all_said(plain) and mended.warnings == ()


def test_such_words_inside_names_stay(tmp_path: Path) -> None:
    name = '": nan, or: inf} and [nan]'
    events = [event("cpu_op", name, 1, 1), event("cpu_op", "b", 3, 1, args={"x": "y"})]
    text = json.dumps(document(events)).replace('"x": "y"', '"x": nan')
    assert row_named(read(tmp_path, text), name)["kind"] == "OP"


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    raw = json.dumps(document([event("kernel", "a@b#c$", 1, 1), event("cpu_op", "d", 5, 1)]))
    broken = raw.encode().replace(b"@", b"\xff").replace(b"#", b"\n").replace(b"$", b"\\q")
    trace = read(tmp_path, broken)
    assert [row["name"] for row in all_said(trace)] == ["a\ufffdb c\\q", "d"]
    assert trace.warnings == ()


def test_one_broken_event_costs_itself_alone(tmp_path: Path) -> None:
    events = [event("cpu_op", f"op {i}", i, 1) for i in range(9)]
    text = json.dumps(document(events)).replace('"op 4"', '"op 4')
    trace = read(tmp_path, text)
    assert {f"op {i}" for i in (0, 1, 2, 3, 7, 8)} <= set(trace.strings)
    assert trace.num_lost >= 1 and trace.warnings


def test_every_truncation_is_told(tmp_path: Path) -> None:
    """And what comes out is a part of the whole."""
    raw = json.dumps(document(decode_step()[:5]), separators=(",", ":")).encode()
    whole = {(row["start"], row["end"], row["name"]) for row in all_said(read(tmp_path, raw))}
    begin = raw.index(b"[", raw.index(b'"traceEvents"')) + 1
    most = 0
    for size in range(len(raw)):
        if size < begin:
            with pytest.raises(TraceError, match=r"rank\.json"):
                read(tmp_path, raw[:size])
            continue
        trace = read(tmp_path, raw[:size], block_bytes=300 if size % 2 else 1 << 20)
        rows = {(row["start"], row["end"], row["name"]) for row in all_said(trace)}
        assert rows <= whole and trace.warnings and trace.num_lost
        assert len(rows) >= most, "one more byte costs no event"
        most = len(rows)
    assert most == 5


def test_a_truncated_archive_gives_what_is_whole(tmp_path: Path) -> None:
    events = [event("cpu_op", f"op {i} {hash(i * 77) % 9999}", i, 1) for i in range(2000)]
    path = write(tmp_path / "rank.json", document(events), packed=True)
    raw = path.read_bytes()
    for cut in (len(raw) // 2, len(raw) - 5):
        path.write_bytes(raw[:cut])
        trace = read_kineto(path)
        assert 500 < len(trace) <= 2000 and "gzip stream ends early" in trace.warnings[0]
    spoiled = bytearray(raw)
    spoiled[len(raw) // 2] ^= 0x55
    path.write_bytes(bytes(spoiled))
    trace = read_kineto(path)
    assert len(trace) > 500 and trace.warnings


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b"{}", "no array 'traceEvents'"),
        (b'{"traceEvents": {}}', "no array 'traceEvents'"),
        (b'{"a": "\\"traceEvents\\": ["}', "no array 'traceEvents'"),
        (b"\x1f\x8b", "is empty"),
        (b"PK\x03\x04", "byte 0 does not begin JSON"),
    ],
)
def test_what_is_no_trace(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(TraceError, match=says):
        read(tmp_path, content)


def test_no_events_is_a_warning(tmp_path: Path) -> None:
    trace = read_events(tmp_path)
    assert len(trace) == 0 and "no events" in trace.warnings[0]


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"gone\.json cannot be read: No such file"):
        read_kineto(tmp_path / "gone.json")


def test_random_damage_never_escapes(tmp_path: Path) -> None:
    raw = json.dumps(document(decode_step())).encode()
    random = Random(5)
    for _ in range(400):
        spoiled = bytearray(raw)
        for _ in range(random.choice((1, 1, 3))):
            spoiled[random.randrange(len(raw))] = random.choice(b'"{}[],:\\0-e\x00\xff ')
        try:
            read(tmp_path, bytes(spoiled), block_bytes=random.choice((200, 1 << 20)))
        except TraceError as error:
            assert "rank.json" in str(error)


def test_unknown_categories_are_told(tmp_path: Path) -> None:
    trace = read_events(tmp_path, event("mtia_workload", "a", 1, 1), event("cpu_op", "b", 1, 1))
    assert len(trace) == 1 and "mtia_workload (1)" in trace.warnings[0]


def test_a_recorder_that_stopped_early(tmp_path: Path) -> None:
    log = ["INFO: Record counts: Out-of-range = 4181, CUPTI stopped early? = 1"]
    trace = read_events(tmp_path, *decode_step(), INFO=log)
    assert trace.num_lost == 1 and "stopped before" in trace.warnings[0]
