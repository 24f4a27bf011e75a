"""Stop texts in text that comes in pieces: found wherever the pieces end, never shown in part."""

from itertools import pairwise
from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpinfer.text.stop_strings import StopMatcher, StopStrings

LETTERS = st.text(alphabet="abé😀\u0301", max_size=30)
STOPS = st.lists(st.text(alphabet="abé😀\u0301", min_size=1, max_size=5), min_size=1, max_size=5)


def slow_end(text: str, stops: list[str]) -> tuple[int, str] | None:
    """(characters until the first stop text is complete, that stop text), by trying all."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


@given(LETTERS, STOPS, st.lists(st.integers(0, 30), max_size=6), st.booleans())
def test_pieces_do_not_matter(
    text: str, stops: list[str], cuts: list[int], include_stop: bool
) -> None:
    matcher = StopMatcher(StopStrings(stops), include_stop)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    shown, expected = "", slow_end(text, stops)
    for start, stop in pairwise(edges):
        shown += matcher.push(text[start:stop])
        so_far = slow_end(text[:stop], stops)
        assert (matcher.matched is not None) == (so_far is not None), "found at once"
        if so_far is None:
            # What is held back is the longest end that begins a stop text, and no more.
            held = text[len(shown) : stop]
            assert text[:stop] == shown + held
            ends = [text[place:stop] for place in range(stop + 1)]
            assert held == next(end for end in ends if any(s.startswith(end) for s in stops))
    shown += matcher.finish()
    if expected is None:
        assert (shown, matcher.matched) == (text, None)
    else:
        end, stop_text = expected
        assert matcher.matched == stop_text
        assert shown == text[: end if include_stop else end - len(stop_text)]
    if expected is not None:
        assert matcher.push("a") == ""


def test_the_longest_of_those_that_end_together() -> None:
    matcher = StopMatcher(StopStrings(["b", "ab", "xab"]))
    assert matcher.push("xa") == "" and matcher.push("b tail") == ""
    assert (matcher.matched, matcher.push("more"), matcher.finish()) == ("xab", "", "")


def test_a_shorter_stop_inside_a_longer_one_comes_first() -> None:
    matcher = StopMatcher(StopStrings(["abcd", "bc"]))
    assert matcher.push("abc") == "a" and matcher.matched == "bc"


def test_without_stops_everything_passes() -> None:
    matcher = StopMatcher(StopStrings([]))
    assert matcher.push("abc") == "abc" and matcher.finish() == ""


def test_an_empty_stop_text_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])


def test_time_grows_with_the_text_alone() -> None:
    """Texts that nearly match everywhere, one character a piece: no quadratic time."""
    stops = StopStrings(["a" * 1000 + str(i) for i in range(64)])
    matcher, count = StopMatcher(stops), 3000
    began = perf_counter()
    shown = "".join(matcher.push("a") for _ in range(count)) + matcher.finish()
    assert shown == "a" * count
    assert perf_counter() - began < 5, "a thousand times what it takes"
