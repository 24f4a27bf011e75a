"""How a rank of another host gets a connection to rank 0 on which both ends have proved
themselves; rank 0's part is `steps.admission`."""

import socket
import time

from tpinfer.config.errors import RankError
from tpinfer.steps.handshake import ANSWER_BYTES, CHALLENGE_BYTES, Claim, WireRun
from tpinfer.steps.sockets import connect, receive_exactly

_RETRY_S, _ATTEMPT_S = 0.05, 10.0


def rank_0_at(address: str, port: int) -> str:
    """Rank 0 as messages name it."""
    return f"rank 0 at {address} port {port}"


def attach(
    address: str, port: int, run: WireRun, rank: int, timeout_s: float | None
) -> socket.socket:
    """Connect, waiting up to `timeout_s` for rank 0 to listen.

    Raises RankError on time-out, and at once where rank 0 refuses this rank or cannot prove that it
    is rank 0.
    """
    who = rank_0_at(address, port)
    claim = Claim(run, rank, who)
    until_s = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        left_s = _ATTEMPT_S if until_s is None else until_s - time.monotonic()
        attempt_s = max(0.01, min(left_s, _ATTEMPT_S))
        try:
            return _shake_hands(address, port, claim, run.greeting(), attempt_s)
        except OSError as error:
            if until_s is not None and time.monotonic() > until_s:
                raise RankError(
                    f"{who} could not be reached within {timeout_s:g} s "
                    f"({error.strerror or error}); look at rank 0's own error, at MASTER_ADDR "
                    "and at firewalls between the hosts"
                ) from error
        time.sleep(_RETRY_S)


def _shake_hands(
    address: str, port: int, claim: Claim, greeting: bytes, timeout_s: float
) -> socket.socket:
    """Raises OSError where trying again may help, RankError where it cannot."""
    until_s = time.monotonic() + timeout_s
    connection = connect(address, port, timeout_s)
    try:
        connection.sendall(greeting)
        connection.sendall(claim.reply(receive_exactly(connection, CHALLENGE_BYTES, until_s)))
        claim.check(receive_exactly(connection, ANSWER_BYTES, until_s))
    except BaseException:
        connection.close()
        raise
    return connection
