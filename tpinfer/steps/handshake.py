"""How two ends of a TCP wire come to trust each other: versions first, then proofs of the shared
token, which itself never crosses.

    both at once      greeting  8 magic, 2 handshake version, 2 format version of the records
    rank 0 -> rank    challenge 32 random bytes
    rank -> rank 0    claim     4 rank, 4 world, 4 pid, 32 digest of the run's name,
                                32 random bytes, 32 proof
    rank 0 -> rank    answer    1 code, 32 proof

A proof is HMAC-SHA256, with the token's digest as key, over a label for the direction, both
greetings and everything random in the exchange, so that neither can be replayed or sent back. The
answer proves that rank 0 holds the token too. Frames behind the handshake are neither encrypted nor
signed: the hosts' network is trusted not to alter them.

Bytes in, bytes out; sockets and time-outs are in `steps.admission` and `steps.attach`.
"""

import hashlib
import hmac
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from tpinfer.config.errors import RankError
from tpinfer.steps.interface import check_format_version
from tpinfer.steps.plan import FORMAT_VERSION

HANDSHAKE_VERSION = 1
_MAGIC = b"tpinfer\n"
_GREETING = struct.Struct("<8sHH")
_CLAIM = struct.Struct("<III32s32s")
_NONCE_BYTES = _PROOF_BYTES = 32
GREETING_BYTES = _GREETING.size
CHALLENGE_BYTES = GREETING_BYTES + _NONCE_BYTES
"""All that rank 0 sends before it has heard a claim."""
CLAIM_BYTES = GREETING_BYTES + _CLAIM.size + _PROOF_BYTES
"""All that a rank sends before it has heard the answer."""
ANSWER_BYTES = 1 + _PROOF_BYTES

ACCEPTED, WRONG_TOKEN, OTHER_RUN, OTHER_WORLD, LOCAL_RANK, TAKEN = range(6)
_REFUSALS = {
    WRONG_TOKEN: "the tokens differ; export the same TPINFER_TOKEN on every host",
    OTHER_RUN: "it belongs to another run; give each run its own port (TPINFER_PLAN_PORT)",
    OTHER_WORLD: "it counts another number of ranks; start all hosts with the same number",
    LOCAL_RANK: (
        "rank 0 takes it for a rank of its own host; number ranks host by host (srun "
        "--distribution=block, mpirun --map-by slot)"
    ),
    TAKEN: "another process has taken its place; look for a second start of the same rank",
}


@dataclass(frozen=True, slots=True)
class WireRun:
    """What both ends of a wire have to agree on."""

    name: str
    """Of this wire; no other run and no other generation has it."""
    world: int
    token: bytes = field(repr=False)
    format_version: int = FORMAT_VERSION

    def greeting(self) -> bytes:
        """The first bytes of either end."""
        return _GREETING.pack(_MAGIC, HANDSHAKE_VERSION, self.format_version)

    def digest(self) -> bytes:
        """Stands for the name, whatever its length."""
        return hashlib.sha256(self.name.encode()).digest()

    def proof(self, label: bytes, *parts: bytes) -> bytes:
        """That this end has the token and has seen `parts`, which are of fixed lengths."""
        key = hashlib.sha256(self.token).digest()  # HMAC alone takes no notice of zeros at its end
        return hmac.digest(key, label + b"".join(parts), "sha256")


def check_greeting(greeting: bytes, run: WireRun, who: str) -> None:
    """Raise RankError unless the other end is of this program and these versions; the message
    names both."""
    magic, handshake, records = _GREETING.unpack(greeting)
    if magic != _MAGIC:
        raise RankError(f"{who} is no tpinfer rank; look for another program on that port")
    if handshake != HANDSHAKE_VERSION:
        raise RankError(
            f"{who} speaks handshake {handshake} and this rank {HANDSHAKE_VERSION}; "
            "install the same version of tpinfer on every host"
        )
    check_format_version(records, who, run.format_version)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What rank 0 says to a claim."""

    rank: int
    pid: int
    code: int
    answer: bytes

    @property
    def reason(self) -> str:
        """Why it was refused."""
        return _REFUSALS[self.code]


class Challenge:
    """Rank 0's side of one handshake."""

    def __init__(self, run: WireRun, who: str) -> None:
        self._run = run
        self._who = who
        self._nonce = os.urandom(_NONCE_BYTES)
        self._received = b""
        self._is_greeted = False
        self.opening = run.greeting() + self._nonce
        """To be sent at once."""

    def feed(self, received: bytes, place: Callable[[int], int]) -> Verdict | None:
        """Take bytes as they come; a verdict once the claim is complete.

        `place(rank)` says ACCEPTED, LOCAL_RANK or TAKEN. Raises RankError for who is no rank of
        these versions, or says more than a claim.
        """
        self._received += received
        if not self._is_greeted and len(self._received) >= GREETING_BYTES:
            check_greeting(self._received[:GREETING_BYTES], self._run, self._who)
            self._is_greeted = True
        if len(self._received) > CLAIM_BYTES:
            raise RankError(f"{self._who} sent more than a claim before it was answered")
        if len(self._received) < CLAIM_BYTES:
            return None
        return self._judge(place)

    def _judge(self, place: Callable[[int], int]) -> Verdict:
        run, received = self._run, self._received
        claim, proof = received[:-_PROOF_BYTES], received[-_PROOF_BYTES:]
        rank, world, pid, digest, _ = _CLAIM.unpack_from(claim, GREETING_BYTES)
        if not hmac.compare_digest(proof, run.proof(b"rank", self.opening, claim)):
            return Verdict(rank, pid, WRONG_TOKEN, bytes([WRONG_TOKEN]) + bytes(_PROOF_BYTES))
        if digest != run.digest():
            code = OTHER_RUN
        elif world != run.world:
            code = OTHER_WORLD
        else:
            code = place(rank)
        said = bytes([code])
        return Verdict(rank, pid, code, said + run.proof(b"rank 0", said, self.opening, claim))


class Claim:
    """A rank's side of one handshake."""

    def __init__(self, run: WireRun, rank: int, who: str) -> None:
        """`who` is rank 0 and its address, for messages."""
        self._run = run
        self._rank = rank
        self._who = who
        self._opening = self._claim = b""

    def reply(self, opening: bytes) -> bytes:
        """What to send behind the greeting, given the CHALLENGE_BYTES that rank 0 sent. Raises
        RankError when it is not rank 0 or of another version."""
        run = self._run
        check_greeting(opening[:GREETING_BYTES], run, self._who)
        fields = _CLAIM.pack(
            self._rank, run.world, os.getpid(), run.digest(), os.urandom(_NONCE_BYTES)
        )
        self._opening, self._claim = opening, run.greeting() + fields
        return fields + run.proof(b"rank", opening, self._claim)

    def check(self, answer: bytes) -> None:
        """Raise RankError unless rank 0 took this rank and proved that it holds the token."""
        said, proof = answer[:1], answer[1:]
        wanted = self._run.proof(b"rank 0", said, self._opening, self._claim)
        is_proven = hmac.compare_digest(proof, wanted)
        code = said[0] if is_proven else WRONG_TOKEN
        if code != ACCEPTED:
            reason = _REFUSALS.get(code, f"code {code}")
            raise RankError(f"{self._who} refused rank {self._rank}: {reason}")
