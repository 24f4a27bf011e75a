"""TCP ports for ranks that meet at one."""

import random
import socket
from itertools import count, islice
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_START = random.SystemRandom().randrange(1 << 12)
_STEPS = count()


def free_port() -> int:
    """A loopback port that is free, as is the next one, where step plans go. The kernel gives
    neither to a connection of its own choice in the time between asking and listening."""
    own = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32_768
    first, last = 20_000, max(own, 30_000)
    pairs = (last - first) // 2
    for step in islice(_STEPS, pairs):
        port = first + 2 * ((_START + step) % pairs)
        if _is_free(port) and _is_free(port + 1):
            return port
    raise AssertionError(f"no two free ports together in {first}..{last}; end what listens")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
