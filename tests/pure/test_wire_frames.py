"""Frames and the handshake as bytes: any cut of a stream gives the same frames, and no bytes but
the right ones get a rank in.
"""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpinfer.config.errors import RankError
from tpinfer.steps.frames import HEADER_BYTES, FrameStream, frame
from tpinfer.steps.handshake import (
    ACCEPTED,
    ANSWER_BYTES,
    CHALLENGE_BYTES,
    CLAIM_BYTES,
    GREETING_BYTES,
    WRONG_TOKEN,
    Challenge,
    Claim,
    Verdict,
    WireRun,
)

RUN = WireRun("run-g0-plans", 4, b"a token of enough bytes")
LIMITS = {1: 300, 2: 0}
FRAMES = st.lists(st.tuples(st.just(1), st.binary(max_size=300)) | st.just((2, b"")), max_size=12)


def cut(text: bytes, cuts: list[int]) -> list[bytes]:
    """`text` in pieces that end at `cuts`, wherever those lie."""
    places = sorted({0, len(text), *(place % (len(text) + 1) for place in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


def taken(stream: FrameStream) -> list[tuple[int, bytes]]:
    found = []
    while (one := stream.take()) is not None:
        found.append(one)
    return found


@given(FRAMES, st.lists(st.integers(0, 10_000), max_size=40))
def test_any_cut_gives_the_same_frames(frames: list[tuple[int, bytes]], cuts: list[int]) -> None:
    stream, found = FrameStream(LIMITS, "rank 0"), []
    for piece in cut(b"".join(frame(*one) for one in frames), cuts):
        stream.feed(piece)
        found += taken(stream)
    assert found == frames
    assert stream.take() is None


@given(st.binary(max_size=600))
def test_noise_is_frames_within_the_limits_or_an_error(noise: bytes) -> None:
    stream = FrameStream(LIMITS, "rank 0")
    stream.feed(noise)
    try:
        found = taken(stream)
    except RankError as error:
        assert "none of this wire's" in str(error)
        return
    assert all(len(payload) <= LIMITS[kind] for kind, payload in found)


@pytest.mark.parametrize("header", [b"\x01\xff\xff\xff\xff", b"\x02\x01\0\0\0", b"\x07\0\0\0\0"])
def test_a_length_or_kind_that_cannot_be_is_refused_before_its_payload(header: bytes) -> None:
    assert len(header) == HEADER_BYTES
    stream = FrameStream(LIMITS, "rank 0 at x")
    stream.feed(header)
    with pytest.raises(RankError, match="rank 0 at x sent a frame of kind"):
        stream.take()


def talk(ours: WireRun, theirs: WireRun, cuts: list[int]) -> tuple[Verdict, str]:
    """Rank 0's verdict, and what the rank makes of it; the claim arrives in pieces."""
    challenge, claim = Challenge(ours, "the process at x"), Claim(theirs, 2, "rank 0")
    assert len(challenge.opening) == CHALLENGE_BYTES
    said = theirs.greeting() + claim.reply(challenge.opening)
    assert len(said) == CLAIM_BYTES
    verdicts = [challenge.feed(piece, lambda rank: ACCEPTED) for piece in cut(said, cuts)]
    verdict = verdicts[-1]
    assert verdict is not None and verdicts[:-1] == [None] * (len(verdicts) - 1)
    assert len(verdict.answer) == ANSWER_BYTES
    try:
        claim.check(verdict.answer)
    except RankError as error:
        return verdict, str(error)
    return verdict, ""


@given(st.lists(st.integers(0, 1000), max_size=20))
def test_two_ends_with_one_token_agree_however_the_bytes_come(cuts: list[int]) -> None:
    verdict, told = talk(RUN, RUN, cuts)
    assert (verdict.rank, verdict.code, told) == (2, ACCEPTED, "")


@given(st.binary(min_size=1, max_size=40), st.lists(st.integers(0, 1000), max_size=5))
def test_any_other_token_is_refused(token: bytes, cuts: list[int]) -> None:
    verdict, told = talk(RUN, WireRun(RUN.name, RUN.world, RUN.token + token), cuts)
    assert verdict.code == WRONG_TOKEN and "tokens differ" in told
    assert RUN.token not in verdict.answer


@given(st.binary(max_size=CLAIM_BYTES + 20), st.lists(st.integers(0, 1000), max_size=5))
def test_noise_never_gets_in(noise: bytes, cuts: list[int]) -> None:
    challenge = Challenge(RUN, "the process at x")
    for start in (b"", RUN.greeting()):
        challenge = Challenge(RUN, "the process at x")
        try:
            verdicts = [
                challenge.feed(one, lambda rank: ACCEPTED) for one in cut(start + noise, cuts)
            ]
        except RankError:
            continue
        assert all(one is None or one.code == WRONG_TOKEN for one in verdicts)


@given(st.integers(0, CLAIM_BYTES - GREETING_BYTES - 1), st.integers(1, 255))
def test_one_changed_byte_of_a_claim_is_enough(place: int, change: int) -> None:
    challenge, claim = Challenge(RUN, "the process at x"), Claim(RUN, 2, "rank 0")
    said = bytearray(claim.reply(challenge.opening))
    said[place] ^= change
    verdict = challenge.feed(RUN.greeting() + bytes(said), lambda rank: ACCEPTED)
    assert verdict is not None and verdict.code == WRONG_TOKEN


@given(st.integers(0, ANSWER_BYTES - 1), st.integers(1, 255))
def test_one_changed_byte_of_an_answer_is_enough(place: int, change: int) -> None:
    challenge, claim = Challenge(RUN, "the process at x"), Claim(RUN, 2, "rank 0")
    said = RUN.greeting() + claim.reply(challenge.opening)
    verdict = challenge.feed(said, lambda rank: ACCEPTED)
    assert verdict is not None
    answer = bytearray(verdict.answer)
    answer[place] ^= change
    with pytest.raises(RankError, match="refused rank 2: the tokens differ"):
        claim.check(bytes(answer))


@pytest.mark.parametrize("greeting", [b"SSH-2.0-Open", b"\x16\x03\x01" + bytes(9)])
def test_another_program_is_told_from_another_version(greeting: bytes) -> None:
    claim = Claim(RUN, 2, "rank 0 at x")
    with pytest.raises(RankError, match="rank 0 at x is no tpinfer rank"):
        claim.reply(greeting + bytes(32))
    later = WireRun(RUN.name, RUN.world, RUN.token, format_version=7)
    with pytest.raises(RankError, match="format 7 and this rank reads format 2"):
        claim.reply(later.greeting() + bytes(32))
    older = bytearray(RUN.greeting())
    older[8] = 9
    with pytest.raises(RankError, match="speaks handshake 9 and this rank 1"):
        claim.reply(bytes(older) + bytes(32))


def test_a_rank_that_speaks_before_its_turn_is_turned_away() -> None:
    challenge, claim = Challenge(RUN, "the process at x"), Claim(RUN, 2, "rank 0")
    said = RUN.greeting() + claim.reply(challenge.opening)
    with pytest.raises(RankError, match="more than a claim"):
        challenge.feed(said + b"x", lambda rank: ACCEPTED)


def test_secrets_are_not_shown() -> None:
    assert "enough bytes" not in repr(RUN)
