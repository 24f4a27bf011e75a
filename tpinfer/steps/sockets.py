"""Sockets as the step-plan wire needs them: bound to one address, without Nagle's delay, and told
by the kernel when the other host is gone."""

import contextlib
import ipaddress
import socket
import time
from typing import Any

from tpinfer.config.errors import ConfigError

SEND_BUFFER_BYTES = 1 << 20
"""What the kernel takes for a reader that is behind, as much as the ring of shared memory holds."""
_IDLE_S, _INTERVAL_S, _NUM_PROBES = 5, 2, 3
_UNANSWERED_MS = 1000 * (_IDLE_S + _INTERVAL_S * _NUM_PROBES)
"""A host that vanished without a word is noticed after this long, idle or not."""


def listen(address: str, port: int) -> socket.socket:
    """A listening socket on `address` alone, not blocking. Raises ConfigError naming the remedy."""
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"MASTER_ADDR={address}: unknown on rank 0's host ({error}); use its name or address"
        ) from error
    failure: OSError | None = None
    for family, kind, protocol, _, place in found:
        if _is_loopback(place[0]) and not _means_loopback(address):
            continue
        try:
            return _listen_on(socket.socket(family, kind, protocol), place)
        except OSError as error:
            failure = error
    if failure is None:
        raise ConfigError(
            f"MASTER_ADDR={address} is the loopback {found[0][4][0]} on rank 0's own host (look at "
            "its /etc/hosts), where no other host can reach it; give its address in their network"
        )
    raise ConfigError(
        f"rank 0 cannot listen on {address} port {port} ({failure.strerror}); MASTER_ADDR must be "
        "an address of its host, and TPINFER_PLAN_PORT a free port"
    ) from failure


def _is_loopback(host: object) -> bool:
    try:
        return ipaddress.ip_address(str(host).partition("%")[0]).is_loopback
    except ValueError:
        return False


def _means_loopback(address: str) -> bool:
    """Whether whoever wrote the address must have meant this host alone."""
    return _is_loopback(address) or "localhost" in address.lower()


def _listen_on(listener: socket.socket, place: Any) -> socket.socket:
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Inherited by what it accepts; set later, the window would have been agreed on already.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.bind(place)
        listener.listen(128)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def tune(connection: socket.socket) -> None:
    """Send small frames at once; have the kernel end a connection whose other host is silent."""
    tcp = socket.IPPROTO_TCP
    connection.setsockopt(tcp, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(tcp, socket.TCP_KEEPIDLE, _IDLE_S)
    connection.setsockopt(tcp, socket.TCP_KEEPINTVL, _INTERVAL_S)
    connection.setsockopt(tcp, socket.TCP_KEEPCNT, _NUM_PROBES)
    connection.setsockopt(tcp, socket.TCP_USER_TIMEOUT, _UNANSWERED_MS)


def connect(address: str, port: int, timeout_s: float) -> socket.socket:
    """A connection to rank 0, tuned. Raises OSError."""
    connection = socket.create_connection((address, port), timeout_s)
    try:
        tune(connection)
        if connection.getsockname() == connection.getpeername():
            # Where nobody listens yet, a socket may be given that very port and meet itself.
            raise ConnectionRefusedError(0, "nobody listens there yet")
    except OSError:
        connection.close()
        raise
    return connection


def receive_exactly(connection: socket.socket, size: int, until_s: float) -> bytes:
    """`size` bytes, by a moment of the monotonic clock. Raises OSError when that has passed and at
    the end of the stream."""
    received = b""
    while len(received) < size:
        connection.settimeout(max(0.001, until_s - time.monotonic()))
        part = connection.recv(size - len(received))
        if not part:
            raise ConnectionResetError(0, "it hung up")
        received += part
    return received


def end_sending(connection: socket.socket) -> None:
    """Tell the other end that nothing follows, if there still is one."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)


def shown(place: object) -> str:
    """Host and port of a socket's address, for messages."""
    return f"{place[0]} port {place[1]}" if isinstance(place, tuple) else str(place)
