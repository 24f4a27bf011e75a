"""Two reports side by side: exact growth, limits that fail or hold, noise between windows."""

from dataclasses import replace

import pytest
from tpprof.report.diff_text import render_difference
from tpprof.report.diffing import KEYS, Change, compare, growth_text, parse_limit
from tpprof.results import Report, Window

from tests.pure.tpprof_reports import one_rank, split, two_ranks
from tpinfer.config.errors import ConfigError
from tpinfer.costs.leaves import LEAVES, ROLLUP


def steps(walls: list[int]) -> Report:
    """A report of host time in windows of these walls."""
    cut = [Window(f"step {i} decode", 0, w, [split(0, {"host": w})]) for i, w in enumerate(walls)]
    return one_rank({"host": sum(walls)}, windows=cut)


def grown(report: Report, leaf: str, by_ns: int) -> Report:
    return one_rank({**report.leaves, leaf: report.leaves.get(leaf, 0) + by_ns})


def test_a_report_does_not_differ_from_itself() -> None:
    limits = [parse_limit(f"{key}:+0%") for key in KEYS]
    found = compare(two_ranks(), two_ranks(), limits)
    assert found.failures == []
    assert found.warnings == []
    assert all(change.grown_ns == 0 for change in [found.wall, *found.words, *found.ops])


def test_words_and_leaves_grow_by_what_was_added() -> None:
    before = one_rank({"compute": 100, "comm_wait": 50, "host": 20})
    found = compare(before, grown(before, "comm_wait", 25))
    assert {c.key: c.grown_ns for c in found.words if c.grown_ns} == {"communication": 25}
    assert {c.key: c.grown_ns for c in found.leaves if c.grown_ns} == {"comm_wait": 25}
    assert found.wall.grown_ns == 25


@pytest.mark.parametrize(
    ("limit", "fails"),
    [
        ("communication:+5%", True),
        ("communication:+50%", False),
        ("communication:+49.9%", True),
        ("comm_wait:+24ns", True),
        ("comm_wait:+25ns", False),
        ("comm_wait:+1us", False),
        ("wall:+14%", True),
        ("wall:20%", False),
        ("compute:-5%", True),
        ("queue:+5%", False),
        ("graph_gap:+5%", False),
    ],
)
def test_limits(limit: str, fails: bool) -> None:
    before = one_rank({"compute": 100, "comm_wait": 50, "host": 20})
    found = compare(before, grown(before, "comm_wait", 25), [parse_limit(limit)])
    assert bool(found.failures) == fails
    assert all(limit.partition(":")[2] in text for text in found.failures)


def test_time_that_was_not_there_before_passes_any_percentage() -> None:
    before = one_rank({"compute": 100})
    found = compare(before, grown(before, "comm_wait", 1), [parse_limit("communication:+900%")])
    assert len(found.failures) == 1
    assert "new" in found.failures[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("communication", "is no limit"),
        ("communication:5", "is no limit"),
        ("communication:+5 %", "is no limit"),
        ("network:+5%", "'network'"),
        ("", "is no limit"),
    ],
)
def test_what_is_no_limit_is_an_error(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_limit(text)


def test_every_word_and_leaf_may_be_limited() -> None:
    assert set(KEYS) == {"wall", *ROLLUP, *LEAVES}


def test_runs_of_different_length_are_compared_per_window() -> None:
    found = compare(steps([100] * 4), steps([100] * 8))
    assert (found.wall.before_ns, found.wall.after_ns) == (100, 100)
    assert found.num_windows == (4, 8)
    assert "4 windows in A and 8 in B" in render_difference(found, ("a", "b"))


def test_growth_within_what_windows_differ_by_is_noise() -> None:
    calm, noisy = [100, 101, 99, 100, 100], [90, 130, 85, 125, 90]
    assert compare(steps(calm), steps([one + 10 for one in calm])).wall.is_noise is False
    found = compare(steps(calm), steps(noisy), [parse_limit("wall:+1%")])
    assert found.wall.is_noise
    assert "windows of one run differ as much" in found.failures[0]
    assert compare(steps(calm[:4]), steps(noisy)).wall.noise_ns is None


def test_what_is_hard_to_compare_is_said() -> None:
    found = compare(replace(two_ranks(), windows=[], method="counters"), two_ranks())
    text = "\n".join(found.warnings)
    assert "counters" in text
    assert "whole walls" in text
    other = compare(two_ranks(), replace(one_rank({"host": 3}), windows=two_ranks().windows))
    assert "use scale" in other.warnings[0]


def test_ops_that_changed_most_come_first() -> None:
    slower = [replace(op, time_ns=op.time_ns + 1000 * (op.key == "head")) for op in two_ranks().ops]
    found = compare(two_ranks(), replace(two_ranks(), ops=slower))
    assert (found.ops[0].key, found.ops[0].grown_ns) == ("head", 250)


def test_text_keeps_to_100_columns_and_names_failures() -> None:
    before = one_rank({"compute": 10**12, "comm_wait": 5 * 10**11})
    found = compare(before, grown(before, "comm_wait", 10**11), [parse_limit("wall:+1%")])
    text = render_difference(found, ("x" * 300, "b\x1b"))
    assert max(map(len, text.splitlines())) <= 100
    assert "FAILED: wall went from" in text


def test_growth_in_words() -> None:
    assert growth_text(Change("x", 0, 0)) == "-"
    assert growth_text(Change("x", 0, 5)) == "new"
    assert growth_text(Change("x", 200, 190)) == "-5.0%"
