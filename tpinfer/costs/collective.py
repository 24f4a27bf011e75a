"""Least time of a collective: one latency and the bytes over the bus bandwidth (alpha-beta,
Hockney 1994). One that has no bytes to send does not take place, and costs nothing."""

from tpinfer.config.ceilings import Ceilings


def collective_floor_s(bytes_sent: int, ceilings: Ceilings) -> float:
    """Seconds for a collective in which each rank must send `bytes_sent`, with no rank late."""
    if not bytes_sent:
        return 0.0
    return ceilings.collective_latency_s + bytes_sent / ceilings.collective_bytes_per_s
