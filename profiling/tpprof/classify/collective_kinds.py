"""Kinds of collective: which make all ranks wait for the last, and their bus bandwidth factor.

Names are compared without regard to case, `_` and what follows the kind (`allgatherbase`,
`reduce_scatter_tensor_coalesced`).
"""

_SYNCHRONISING = ("allreduce", "allgather", "reducescatter", "alltoall", "barrier")


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def synchronises(name: str) -> bool:
    """Whether no rank can leave before the last one came. Broadcast, reduce, gather, scatter, send
    and receive let some ranks go early."""
    return _plain(name).startswith(_SYNCHRONISING)


def busbw_factor(name: str, size: int) -> float:
    """Bus bandwidth over algorithm bandwidth for `size` ranks, as NCCL's tests define it
    (nccl-tests, doc/PERFORMANCE.md), with the larger of in and out as the message."""
    plain = _plain(name)
    if plain.startswith("allreduce"):
        return 2 * (size - 1) / size
    if plain.startswith(("allgather", "reducescatter", "alltoall", "gather", "scatter")):
        return (size - 1) / size
    return 1.0
