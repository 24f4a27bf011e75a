"""Reports of one finding as text, JSON and HTML: golden text, exact sums kept, nothing of a trace
gets out unescaped."""

import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tpprof.errors import TraceError
from tpprof.ranks.wait import EARLIER, HOST_LATE
from tpprof.report.advice import advise, while_doing
from tpprof.report.collective_sums import sum_collectives, waits_by_cause
from tpprof.report.html import render_html
from tpprof.report.html_svg import ticks
from tpprof.report.jsonform import decode_report, encode_report, read_report
from tpprof.report.op_sums import fold_layer, sum_ops
from tpprof.report.rates import memory_levels
from tpprof.report.scale import build_waterfalls
from tpprof.report.text import render_report
from tpprof.report.text_evidence import describe_ceilings
from tpprof.report.whatif import Answer, Removal
from tpprof.report.wording import (
    MEANINGS,
    WORD_OF,
    duration,
    kernel_label,
    milliseconds,
    percent,
    shorten,
)
from tpprof.results import Report, Window

from tests.pure.golden import check_golden
from tests.pure.tpprof_reports import (
    NASTY,
    collective,
    one_rank,
    split,
    two_ranks,
)
from tpinfer.costs.leaves import LEAVES, ROLLUP

STABLE = [
    "wall_ns", "leaves", "rollup", "ranks", "collectives", "coverage", "clock_alignment",
    "dilation", "warnings", "format_version",
]  # fmt: skip
"""Keys of the JSON that other programs read."""


def advised() -> Report:
    return replace(two_ranks(), advice=advise(two_ranks()))


def test_text_is_the_golden_one(tmp_path: Path) -> None:
    check_golden("tpprof-report.txt", render_report(advised()) + "\n", tmp_path)


def test_text_keeps_to_100_columns_whatever_names_are_like() -> None:
    long = "void cutlass::Kernel2<" + "x" * 300 + ">\x1b[31m\n"
    report = advised()
    report = replace(
        report,
        ops=[replace(op, key=long + op.key) for op in report.ops],
        groups=[replace(group, key=long + group.key) for group in report.groups],
        collectives=[replace(c, name=long, last_rank_was=long) for c in report.collectives],
        windows=[replace(w, label=long) for w in report.windows],
        sources=[long, long],
        warnings=[long],
        advice=[long],
        by=long,
    )
    text = render_report(report)
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text


def test_text_of_nothing_and_of_one_leaf() -> None:
    assert "0 ns of wall" in render_report(one_rank({}))
    assert "rank 0" in render_report(one_rank({"compute": 7}))


@pytest.mark.parametrize("by", ["rank", "step", "layer", "op", "kernel", "stream", "phase"])
def test_text_of_many_groups_shows_what_it_leaves_out(by: str) -> None:
    first = two_ranks().groups[0]
    groups = [replace(first, key=f"key {i}", wall_ns=first.wall_ns) for i in range(60)]
    text = render_report(replace(two_ranks(), by=by, groups=groups))
    assert "(20 smaller ones)" in text


def test_text_of_many_windows_shows_the_slowest() -> None:
    windows = [Window(f"step {i} decode", i, i + 1, [split(0, {"host": i + 1})]) for i in range(40)]
    text = render_report(replace(two_ranks(), windows=windows))
    assert "rank 0, slowest 12 of 40 windows" in text
    assert "step 39 decode" in text
    assert "step 27 decode" not in text


def test_text_of_many_ranks_and_collectives_of_unknown_size() -> None:
    many = replace(
        collective(0, 0, "x"), ranks=list(range(8)), wait_ns=[5] * 8, transfer_ns=[9] * 8,
        bytes=-1, busbw_gbps=None, last_rank=-1, method="estimated",
    )  # fmt: skip
    text = render_report(replace(two_ranks(), collectives=[many]))
    assert "(estimated)" in text
    assert "not told" in text
    assert "mean 0.000 ms" in text


def test_json_holds_the_stable_keys_and_comes_back() -> None:
    report = advised()
    encoded = encode_report(report)
    found = json.loads(encoded)
    assert list(found)[: len(STABLE)] == STABLE
    assert set(found["collectives"][0]) >= {
        "name", "bytes", "ranks", "wait_ns", "transfer_ns", "busbw_gbps", "last_rank",
    }  # fmt: skip
    assert set(found["clock_alignment"]["1"]) >= {
        "offset_ns", "drift_ppm", "residual_ns", "accepted",
    }  # fmt: skip
    assert set(found["rollup"]) == set(ROLLUP)
    assert decode_report(encoded, "x") == report


def test_json_ignores_keys_it_does_not_know() -> None:
    found = json.loads(encode_report(two_ranks())) | {"later": 1}
    assert decode_report(json.dumps(found).encode(), "x") == two_ranks()


def test_json_of_live_counters_is_read() -> None:
    """What lacks a trace's tables is a report all the same."""
    found = {
        "wall_ns": 10, "leaves": {"compute": 7, "host": 3}, "method": "counters",
        "ranks": [{"rank": 0, "wall_ns": 10, "leaves": {"compute": 7, "host": 3}, "caused": 1}],
        "warnings": ["w"],
    }  # fmt: skip
    report = decode_report(json.dumps(found).encode(), "x")
    assert report.rollup["host"] == 3
    assert report.ranks[0].rollup == report.rollup
    assert "coverage" not in render_report(report)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "not JSON"),
        (b"[1]", "no wall_ns"),
        (b'{"wall_ns": 1}', "no wall_ns and leaves"),
        (b'{"wall_ns": 1, "leaves": {"compute": "x"}}', "no report"),
        (b'{"wall_ns": 2, "leaves": {"compute": 1}}', "sum to 1 ns, its wall is 2 ns"),
        (b'{"wall_ns": 1, "leaves": {"unheard": 1}}', "rollup"),
        (b'{"wall_ns": 1, "leaves": {"host": 1}, "rollup": {"host": 0}}', "rollup"),
        (b'{"wall_ns": 1, "leaves": {"host": 1}, "format_version": 9}', "format_version 9"),
        (b'{"wall_ns": 1, "leaves": {"host": 1}, "format_version": "x"}', "no report"),
        (b'{"wall_ns": 1, "leaves": {"host": 1}, "ranks": [1]}', "no report"),
        (b'{"wall_ns": 1, "leaves": {"host": 1}, "ranks": [{}]}', "no report"),
    ],
)
def test_damaged_json_is_an_error(text: bytes, said: str) -> None:
    with pytest.raises(TraceError, match=re.escape(said)):
        decode_report(text, "some.json")


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read"):
        read_report(tmp_path / "absent.json")


@given(st.binary(max_size=200), st.integers(0, 4000))
def test_json_cut_or_changed_never_crashes(noise: bytes, where: int) -> None:
    encoded = encode_report(two_ranks())
    damaged = encoded[:where] + noise + encoded[where + len(noise) :]
    try:
        report = decode_report(damaged, "x")
    except TraceError:
        return
    assert sum(report.leaves.values()) == report.wall_ns


class _Page(HTMLParser):
    """Tags, what they load, and the text between them."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(page: str) -> _Page:
    parser = _Page()
    parser.feed(page)
    return parser


def test_html_loads_nothing_and_escapes_what_a_trace_says() -> None:
    report = advised()
    report = replace(
        report,
        sources=[NASTY], warnings=[NASTY], advice=[NASTY], by=NASTY,
        groups=[replace(group, key=NASTY + group.key) for group in report.groups],
        windows=[replace(window, label=NASTY) for window in report.windows],
        ranks=[replace(rank, host_parts={NASTY: rank.leaves["host"]}) for rank in report.ranks],
        collectives=[replace(c, name=NASTY, last_rank_was=NASTY) for c in report.collectives],
        ops=[replace(op, key=NASTY + op.key, bound=NASTY) for op in report.ops],
        ceilings={**report.ceilings, "origin": NASTY},
    )  # fmt: skip
    waterfalls = build_waterfalls({1: replace(one_rank({"host": 50}), ops=report.ops), 2: report})
    page = render_html(report, waterfalls=waterfalls)
    assert NASTY not in page
    found = parse(page)
    assert found.tags.count("script") == 1
    assert found.loads == []
    assert "http" not in re.sub(r'xmlns="http://www.w3.org/2000/svg"|http-equiv', "", page)
    assert "default-src 'none'" in page


def test_html_says_every_number_of_the_wall() -> None:
    report = advised()
    text = " ".join(parse(render_html(report)).text)
    for rank in report.ranks:
        for word, spent in rank.rollup.items():
            if spent:
                assert f"{milliseconds(spent)} ({percent(spent, rank.wall_ns)})" in text, word
    for leaf, spent in report.leaves.items():
        assert milliseconds(spent) in text, leaf
    for sentence in report.advice:
        assert sentence in text


@pytest.mark.parametrize("report", [one_rank({}), one_rank({"compute": 1}), two_ranks()])
def test_html_is_balanced(report: Report) -> None:
    page = render_html(report)
    for tag in ("section", "div", "svg", "table", "p", "ol", "details", "span"):
        assert len(re.findall(f"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag


def test_html_of_many_windows_and_groups_stays_small() -> None:
    report = two_ranks()
    windows = [replace(report.windows[0], label=f"step {i}", start_ns=i) for i in range(5000)]
    groups = [replace(report.groups[0], key=f"kernel {i}") for i in range(5000)]
    page = render_html(replace(report, windows=windows, groups=groups))
    assert len(page) < 2_000_000
    assert "Not drawn: 4760 smaller rows" in page
    page = render_html(replace(report, by="kernel", groups=groups))
    assert "Not drawn: 4960 smaller rows" in page


def test_steps_are_drawn_beside_another_question() -> None:
    whole = replace(two_ranks(), windows=[])
    assert "Window by window" not in render_html(whole)
    assert "Window by window" in render_html(whole, steps=two_ranks())


def test_what_ifs_are_drawn_with_their_gains() -> None:
    gains = [Removal("wait:1", NASTY, 4000, 6000), Removal("host", "no host time", 9000, 1000)]
    page = render_html(two_ranks(), answer=Answer(0, 10_000, 1, 12, gains))
    assert "If one cause were gone" in page
    assert NASTY not in page
    assert "0.006 ms (60%, 2.50x)" in page
    assert "If one cause" not in render_html(two_ranks(), answer=Answer(0, 10_000, 1, 12, []))


def test_advice_names_the_largest_losses_first_with_their_time() -> None:
    sentences = advise(two_ranks())
    assert "3.2 ms (16% of the wall)" in sentences[0]
    assert "schedule" in sentences[0]
    assert sentences[1].startswith("Rank 1 comes last")
    assert "2.81 ms" in sentences[1]
    assert len(sentences) == 5
    assert advise(one_rank({})) == []


def test_advice_asks_for_what_the_recording_lacks() -> None:
    report = one_rank({"unmodelled": 500, "comm_unsplit": 300, "unrecorded": 200})
    report = replace(report, coverage=replace(report.coverage, flop_model=0.1))
    text = "\n".join(advise(report))
    for remedy in ("--model config.json --tp N", "traces of all ranks", "record fewer steps"):
        assert remedy in text


def test_a_late_rank_is_described_as_it_was_found() -> None:
    assert "its host" in while_doing(HOST_LATE)
    assert while_doing(EARLIER + "allreduce") == "because it is still in allreduce"
    assert while_doing("layers.*.mlp") == "while it runs layers.*.mlp"


def test_collectives_of_a_kind_are_added_up_with_their_causes() -> None:
    sums = sum_collectives(two_ranks().collectives)
    assert [(one.count, one.wait_ns, one.transfer_ns) for one in sums] == [
        (24, (2_808_000, 8_000), (1_240_008, 1_240_008))
    ]
    rank, doing, share = sums[0].worst
    assert (rank, share) == (1, 1.0)
    assert doing == "layers.*.attn.out"
    assert sum(waits_by_cause(two_ranks(), 0).values()) == 2_808_000
    assert sums[0].busbw_gbps == pytest.approx(2.54)


def test_ops_of_all_layers_are_one_row() -> None:
    sums = sum_ops(two_ranks().ops, 1)
    assert sums[0].key == "layers.*.mlp.down"
    assert (sums[0].time_ns, sums[0].count) == (6_000_000, 12)
    assert sum(one.time_ns for one in sums) == sum(o.time_ns for o in two_ranks().ops if o.rank)
    assert fold_layer("model.layers.12.mlp") == "model.layers.*.mlp"
    assert fold_layer("sha256.12") == "sha256.12"


def test_every_leaf_has_a_meaning_and_a_word() -> None:
    assert set(MEANINGS) == set(LEAVES) == set(WORD_OF)
    assert max(map(len, MEANINGS.values())) <= 50


@pytest.mark.parametrize(
    ("spent_ns", "text"),
    [
        (0, "0 ns"),
        (999, "999 ns"),
        (1000, "1 us"),
        (12_345, "12.3 us"),
        (999_600, "1 ms"),
        (2_500_000_000, "2.5 s"),
        (-12_345, "-12.3 us"),
    ],
)
def test_durations(spent_ns: int, text: str) -> None:
    assert duration(spent_ns) == text


@given(st.text(max_size=80), st.integers(8, 60))
def test_shortened_text_fits(text: str, width: int) -> None:
    assert len(shorten(text, width)) <= width


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("void at::native::reduce<(int)512, f<(a)1>>(int, char*)", "reduce<(int)512, f<(a)1>>"),
        ("void (anonymous namespace)::fill(int)", "fill"),
        ("ncclDevKernel_AllReduce_RING_LL(ncclDevArgs*)", "ncclDevKernel_AllReduce_RING_LL"),
        ("aten::mm", "aten::mm"),
        ("(odd)", "(odd)"),
        ("half)", "half)"),
        ("", ""),
    ],
)  # fmt: skip
def test_kernel_names_lose_what_says_little(name: str, shown: str) -> None:
    assert kernel_label(name, 60) == shown


def test_idle_devices_and_lone_copies_get_advice() -> None:
    text = " ".join(
        advise(one_rank({"copy": 500, "dependency_wait": 300, "idle_unexplained": 200}))
    )
    for said in ("Copies and fills", "another stream", "does not say why"):
        assert said in text


def test_recording_that_changed_the_run_is_said_first_of_all_doubts() -> None:
    assert "2.33 times as long" in " ".join(advise(one_rank({"host": 9}, dilation=2.334)))


def test_what_a_lone_rank_lacks_is_not_claimed() -> None:
    text = render_report(
        replace(one_rank({"compute": 7}), clock_alignment={"0": two_ranks().clock_alignment["0"]})
    )
    assert "clock" not in text
    assert "of collectives" not in text


@given(st.floats(1e-6, 1e9))
def test_ticks_reach_the_highest(highest: float) -> None:
    found = ticks(highest)
    assert found[-1] >= highest * 0.999
    assert 2 <= len(found) <= 7


def test_the_example_adds_up() -> None:
    report = two_ranks()
    for rank in report.ranks:
        assert sum(rank.leaves.values()) == rank.wall_ns
    assert sum(g.wall_ns for g in report.groups if g.rank == 0) == report.wall_ns
    assert asdict(report)["rollup"] == report.ranks[0].rollup


@pytest.mark.parametrize(
    "ceilings",
    [
        {},
        {"memory": 5, "flops_per_s": [1], "kernel_floor_s": "x", "origin": 3},
        {"memory": [7, {}, {"bytes_per_s": "fast"}], "flops_per_s": {"float32": None}},
        {"memory": [{"bytes_per_s": float("inf")}], "collective_bytes_per_s": float("inf")},
        {"memory": [{"bytes_per_s": -1.0}], "flops_per_s": {"float32": True}},
    ],
)
def test_ceilings_of_any_shape_are_shown_or_left_out(ceilings: dict[str, object]) -> None:
    report = replace(two_ranks(), ceilings=ceilings)
    assert "inf" not in describe_ceilings(ceilings)
    assert "Roofline" in render_html(report)
    assert "rank 0 in detail" in render_report(report)


def test_levels_of_one_rate_are_one_line() -> None:
    levels = [{"name": name, "bytes_per_s": rate} for name, rate in (("L2", 9.0), ("L3", 9.0))]
    assert memory_levels({"memory": [*levels, {"name": "DRAM", "bytes_per_s": 2.0}]}) == {
        "L2, L3": 9.0,
        "DRAM": 2.0,
    }
