"""What recorders call collectives and dtypes, in one spelling and in bytes."""

from ..events import NONE

_BACKENDS = ("nccl:", "rccl:", "gloo:", "mpi:", "ucc:", "xccl:", "c10d::", "c10d_functional::")
_SPELLINGS = {
    "allreduce": ("all_reduce", "allreduce_coalesced", "all_reduce_coalesced", "allreduce_sparse"),
    "allgather": (
        "all_gather", "allgather_base", "allgather_coalesced", "all_gather_into_tensor",
        "allgather_into_tensor_coalesced", "all_gather_into_tensor_coalesced", "allgather_v",
    ),
    "reduce_scatter": (
        "reducescatter", "reduce_scatter_base", "reduce_scatter_tensor", "reduce_scatter_v",
        "reduce_scatter_tensor_coalesced",
    ),
    "alltoall": ("all_to_all", "alltoall_base", "all_to_all_single", "all_to_allv", "alltoallv"),
    "broadcast": ("broadcast_oop", "bcast"),
    "reduce": ("reduce_oop",),
}  # fmt: skip
_CANONICAL = {spelled: name for name, spellings in _SPELLINGS.items() for spelled in spellings}
NOT_COLLECTIVES = {"wait", "init", "end", "start_coalescing", "end_coalescing", ""}
"""What `record_param_comms` also names: bookkeeping that moves nothing."""
_DTYPE_BYTES = {
    "bool": 1, "byte": 1, "char": 1, "short": 2, "int": 4, "long": 8,
    "half": 2, "bfloat16": 2, "float": 4, "double": 8,
    "complexhalf": 4, "complexfloat": 8, "complexdouble": 16,
    "uint16": 2, "uint32": 4, "uint64": 8, "int8": 1, "int16": 2, "int32": 4, "int64": 8,
    "float16": 2, "float32": 4, "float64": 8, "uint8": 1, "qint8": 1, "quint8": 1, "qint32": 4,
}  # fmt: skip


def collective_name(spelled: str) -> str:
    """`_allgather_base`, `nccl:all_gather` -> `allgather`; one without a known spelling stays as it
    is, in lower case without backend and leading `_`.
    """
    name = spelled.strip().lower()
    for backend in _BACKENDS:
        name = name.removeprefix(backend)
    name = name.strip("_")
    return _CANONICAL.get(name, name)


def message_bytes(dtype: str | None, elements_in: int, elements_out: int) -> int:
    """Bytes of the larger of what goes in and what comes out; NONE where dtype or both are unknown.

    Args: a dtype as torch's ScalarType or numpy spells it; element counts, NONE where unknown.
    """
    name = (dtype or "").lower().removeprefix("c10::").removeprefix("torch.")
    size = 1 if name.startswith(("float8", "float4")) else _DTYPE_BYTES.get(name, 0)
    elements = max(elements_in, elements_out)
    return elements * size if size and elements >= 0 else NONE
