"""Collectives of real ranks: every backend that runs here gives the right sums, the same bits on
all ranks, ends when a rank does, and leaves nothing in /dev/shm.
"""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cpu.ranks import rank_values, run_ranks
from tpinfer.collectives import ring_segment
from tpinfer.collectives.build_ring import build_ring
from tpinfer.collectives.group import SingleGroup
from tpinfer.config.errors import ConfigError
from tpinfer.launching.sweep import sweep_stale
from tpinfer.numerics.native_library import find_compiler

CASES = "tests.cpu.collective_cases"
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C compiler on this machine")
RINGS = [pytest.param("native", marks=needs_compiler), "python"]


@needs_compiler
@pytest.mark.ranks
@pytest.mark.parametrize("size", [2, 3, 4])
def test_rings_add_in_rank_order_and_give_all_ranks_the_same_bits(size: int, run_name: str) -> None:
    backends = ["native", "python", "mixed"]
    found = rank_values(f"{CASES}:sums", size, run_name, {"backends": backends})
    assert [wrong for _, wrong in found] == [[]] * size
    assert len({bits for bits, _ in found}) == 1


@needs_compiler
@pytest.mark.ranks
@pytest.mark.parametrize("size", [2, 3, 4])
def test_rings_move_everything_where_it_belongs(size: int, run_name: str) -> None:
    backends = ["native", "python", "mixed"]
    assert rank_values(f"{CASES}:exchanges", size, run_name, {"backends": backends}) == [[]] * size


@pytest.mark.ranks
def test_gloo_agrees_and_listens_on_loopback_alone(run_name: str) -> None:
    found = rank_values(f"{CASES}:close_sums", 2, run_name, {"backend": "gloo"})
    assert [wrong for _, wrong in found] == [[], []]
    assert len({bits for bits, _ in found}) == 1
    assert rank_values(f"{CASES}:exchanges", 3, run_name, {"backends": ["gloo"]}) == [[]] * 3
    for addresses in rank_values(f"{CASES}:listening", 2, run_name, {"backend": "gloo"}):
        assert set(addresses) == {"0100007F"}


@pytest.mark.ranks
@pytest.mark.parametrize("backend", ["auto", "shared_memory"])
def test_shared_memory_is_what_ranks_of_one_host_get_and_it_listens_nowhere(
    backend: str, run_name: str
) -> None:
    assert rank_values(f"{CASES}:listening", 2, run_name, {"backend": backend}) == [[], []]


@pytest.mark.ranks
@pytest.mark.parametrize("backend", RINGS)
def test_a_rank_measures_how_long_it_waited_for_the_last(backend: str, run_name: str) -> None:
    early, late = rank_values(f"{CASES}:waits", 2, run_name, {"backend": backend})
    assert early[0] >= 30e6
    assert late[0] < 20e6
    assert 0 < early[1] < 20e6


@pytest.mark.ranks
@pytest.mark.parametrize("backend", RINGS)
@pytest.mark.parametrize(
    ("case", "timeout_s", "message", "at_most_s"),
    [
        ("killed", 20.0, "rank 1 has ended or left the group", 2.0),
        ("left", 20.0, "rank 1 has ended or left the group", 2.0),
        ("late", 0.3, "rank 1 did not arrive at a collective within 0.3 s", 2.0),
        ("aborts", 20.0, "rank 1 called off the group", 2.0),
        ("raises", 20.0, "rank 1 called off the group", 2.0),
    ],
)
def test_ranks_learn_at_once_who_failed(
    backend: str, case: str, timeout_s: float, message: str, at_most_s: float, run_name: str
) -> None:
    arguments = {"backend": backend, "case": case, "timeout_s": timeout_s}
    outcomes = run_ranks(f"{CASES}:outcome_of", 3, run_name, arguments)
    for rank in (0, 2):
        assert outcomes[rank].exit_status == 0, outcomes[rank].error
        told, seconds = outcomes[rank].value
        assert message in told
        assert seconds < at_most_s
    assert outcomes[1].exit_status == (-signal.SIGKILL if case == "killed" else 0)
    if case == "raises":
        assert outcomes[1].value[0] == "rank 1's own error"


@pytest.mark.ranks
def test_gloo_notices_a_killed_rank(run_name: str) -> None:
    arguments = {"backend": "gloo", "case": "killed", "timeout_s": 5.0}
    outcomes = run_ranks(f"{CASES}:outcome_of", 2, run_name, arguments)
    told, seconds = outcomes[0].value
    assert "gloo" in told
    assert seconds < 6.0


@pytest.mark.ranks
@pytest.mark.parametrize("backend", RINGS)
def test_an_interrupt_ends_a_wait_and_the_group(backend: str, run_name: str) -> None:
    waiting, other = rank_values(f"{CASES}:interrupted", 2, run_name, {"backend": backend})
    assert waiting[0] == "KeyboardInterrupt"
    assert waiting[2] < 0.5
    assert other[:2] == [
        "RankError",
        "rank 0 was interrupted in a collective; start all ranks again",
    ]


@needs_compiler
@pytest.mark.ranks
def test_opening_names_the_rank_that_does_not_come(run_name: str) -> None:
    first, second, _ = rank_values(f"{CASES}:joins_unless_last", 3, run_name, {"timeout_s": 0.4})
    assert "rank 2 did not come within 0.4 s" in first
    assert "rank 0" in second


@needs_compiler
@pytest.mark.ranks
def test_what_a_rank_killed_while_opening_leaves_is_swept(run_name: str) -> None:
    left: list[Path] = []
    for attempt in range(3):  # any other launcher on this machine may sweep before it is seen
        name = f"{run_name}-{attempt}"
        outcomes = run_ranks(f"{CASES}:killed_while_opening", 2, name)
        assert outcomes[0].exit_status == -signal.SIGALRM
        if left := list(Path("/dev/shm").glob(f"tpinfer-*{name}*")):
            break
    assert len(left) == 1
    sweep_stale()
    assert not any(path.exists() for path in left)


@needs_compiler
@pytest.mark.ranks
def test_wrong_calls_are_refused_before_they_confuse_the_others(run_name: str) -> None:
    for told in rank_values(f"{CASES}:refusals", 2, run_name):
        assert [line.partition(" ")[0] for line in told[:7]] == [
            "torch.bool",
            "a",
            "the",
            "peer=2",
            f"peer={told[4][5]}",
            "out_rows=[4,",
            "float8_e4m3fn",
        ]
        assert told[7] == "2.0"
        assert all("closed on this rank; open it again" in line for line in told[8:])


def test_one_rank_alone_needs_nobody() -> None:
    group = SingleGroup()
    t = torch.arange(6.0).view(2, 3)
    group.all_reduce(t)
    group.broadcast(t, 0)
    group.barrier()
    out = torch.empty(1, 2, 3)
    group.all_gather(out, t)
    part = torch.empty(2, 3)
    group.reduce_scatter(part, out)
    moved = torch.empty(2, 3)
    group.all_to_all_v(moved, t, [2], [2])
    for result in (out[0], part, moved):
        assert torch.equal(result, torch.arange(6.0).view(2, 3))
    assert group.last_wait_ns is None
    with pytest.raises(ValueError, match="peer=0 must be a rank"):
        group.send(t, 0)


def test_a_full_shm_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs("/dev/shm")
    fields: list[Any] = list(real)
    fields[4] = 1  # f_bavail
    monkeypatch.setattr(ring_segment.os, "statvfs", lambda _: os.statvfs_result(fields))
    with pytest.raises(ConfigError, match=r"MB free and the group needs .*--shm-size=64m"):
        ring_segment.open_segment("never-made", 0, 2, 1.0)


@pytest.mark.parametrize("size", [2, 3, 4, 8, 48, 64])
def test_layouts_stay_within_their_bound_and_do_not_overlap(size: int) -> None:
    layout = ring_segment.plan_layout(size)
    assert layout.total_bytes <= ring_segment.SEGMENT_BYTES
    assert layout.slot_bytes >= 16384
    assert layout.slot_bytes // size >= 256  # an all-to-all and a reduce-scatter still move
    assert layout.mail_bytes >= 64
    last_flag = layout.flag_word(size - 1) * 8 + 16 * 8
    assert last_flag <= layout.mail_flags_offset
    assert (layout.mail_words(size - 1, size - 1)[1] + 16) * 8 <= layout.mail_offset
    assert layout.slot_offset(size - 1, 1) + layout.slot_bytes == layout.total_bytes


def test_more_ranks_than_flags_are_refused() -> None:
    with pytest.raises(ConfigError, match="65 ranks"):
        ring_segment.plan_layout(65)


@needs_compiler
def test_the_ring_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, how = build_ring()
    assert first is not None and first.is_relative_to(tmp_path)
    assert how.startswith("compiled now")
    assert build_ring() == (first, "compiled before")
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_without_a_compiler_the_reason_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    path, reason = build_ring()
    assert path is None
    assert "no C compiler found" in reason
