"""Which links a backend's collectives go over, and what a changed link makes of their times."""

from collections.abc import Sequence
from dataclasses import replace

from tpinfer.config.machine_parts import Link
from tpinfer.config.measured import CollectiveFit

LINK_KINDS = {"shared_memory": "SHM", "deepspeed": "SHM", "gloo": "GLOO"}
"""Backend -> kind of the link between ranks on the cores of one host."""


def scaled_fit(
    fit: CollectiveFit, before: Sequence[Link], after: Sequence[Link]
) -> CollectiveFit | None:
    """`fit`, measured over `before`, as it would be over `after`: its rates go with those of the
    slowest link, its least times with those of the latest. None where the links are of other kinds;
    as it was where they are the same, or the backend has none of its own."""
    if [link.kind for link in before] != [link.kind for link in after]:
        return None
    if tuple(before) == tuple(after):
        return fit
    rate = _slowest(after) / _slowest(before)
    later = max(one.latency_s for one in after) / max(one.latency_s for one in before)
    return replace(
        fit,
        a_s=fit.a_s * later,
        b_s=fit.b_s * later,
        b1_bytes_per_s=fit.b1_bytes_per_s * rate,
        c_s=fit.c_s * later,
        d_s=fit.d_s * later,
        b2_bytes_per_s=fit.b2_bytes_per_s * rate,
        points={},
    )


def link_fit(by: str, link: Link) -> CollectiveFit:
    """An all-reduce as the topology file describes the link of a backend."""
    latency, rate = link.latency_s, link.bytes_per_s * link.attainable
    return CollectiveFit(
        "all_reduce", by, False, latency, link.per_peer_s, rate, latency, link.per_peer_s, rate,
        0, 0, 0.0,
    )  # fmt: skip


def _slowest(links: Sequence[Link]) -> float:
    return min(link.bytes_per_s * link.attainable for link in links)
