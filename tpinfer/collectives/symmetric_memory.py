"""Memory of the GPUs of one host that every rank can read and write, through torch's symmetric
memory. Allocated and shared once, before any step is recorded. What runs over it is
`triton_one_shot` and torch's own ops.

torch calls this interface alpha: whatever it raises is a reason not to use it, not an error.
"""

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tpinfer.collectives.sum_routes import RouteName
from tpinfer.config.errors import RankError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import ProcessGroup, Store

_PAD_BYTES = 16
"""torch's ops work in words of up to 16 bytes, of which each rank adds its share."""


@dataclass(frozen=True, slots=True)
class SymmetricSegments:
    """One rank's view of the segments of all."""

    everyone: tuple[torch.Tensor, ...]
    """uint8 [segment bytes], each rank's as it is mapped here."""
    large: torch.Tensor
    """uint8 [bytes], this rank's, for torch's ops."""
    group_name: str
    """What torch's ops know the ranks by."""
    has_multicast: bool
    registered: "ProcessGroup"
    """Kept, as torch's table of names does not: its ops look the ranks up in it."""
    held: tuple[Any, ...]
    """What the memory and its mappings end with: `everyone` are views that keep neither."""

    def addresses(self) -> torch.Tensor:
        """int64 [P] on the device: where each rank's segment lies in this process."""
        found = [segment.data_ptr() for segment in self.everyone]
        return torch.tensor(found, dtype=torch.int64, device=self.large.device)


def allocate_segments(
    device: torch.device, segment_bytes: int, large_bytes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's segments (uint8), zeroed, for the own kernels and for torch's ops; nobody is met.
    Raises RankError."""
    try:
        import torch.distributed._symmetric_memory as symmetric_memory

        symmetric: Any = symmetric_memory
        own = symmetric.empty(segment_bytes, dtype=torch.uint8, device=device)
        large = symmetric.empty(large_bytes, dtype=torch.uint8, device=device)
        own.zero_()
    except Exception as error:  # alpha: also AttributeError and TypeError, where it has changed
        raise _cannot(error) from error
    return own, large


def share_segments(
    store: "Store", place: tuple[int, int], group_name: str, segments: tuple[torch.Tensor, ...]
) -> SymmetricSegments:
    """Map the segments of all ranks, once every rank has allocated. A collective call; place:
    (rank, size). Raises RankError."""
    try:
        import torch.distributed._symmetric_memory as symmetric_memory

        symmetric: Any = symmetric_memory
        size = place[1]
        registered = _register(group_name, store, place)
        handles = [symmetric.rendezvous(one, group_name) for one in segments]
        shape, large = tuple(segments[0].shape), segments[1]
        everyone = tuple(handles[0].get_buffer(r, shape, torch.uint8) for r in range(size))
        has_multicast = bool(handles[1].multicast_ptr)
    except Exception as error:  # as above
        raise _cannot(error) from error
    held = (*segments, *handles)
    return SymmetricSegments(everyone, large, group_name, has_multicast, registered, held)


def unregister_name(group_name: str) -> None:
    """Let torch forget the ranks that it knows by this name, if it does."""
    from torch._C import _distributed_c10d as c10d

    internal: Any = c10d
    with contextlib.suppress(Exception):  # alpha: it may refuse a name that it does not know
        internal._unregister_process_group(group_name)


def _register(group_name: str, store: "Store", place: tuple[int, int]) -> "ProcessGroup":
    """Tell torch who the ranks are: 2.11 finds them in its table of process groups by name, other
    versions by what `set_group_info` says. Only the store is ever used."""
    from torch._C import _distributed_c10d as c10d

    internal: Any = c10d
    group = internal.ProcessGroup(store, *place)
    group._set_group_name(group_name)
    internal._register_process_group(group_name, group)
    internal._SymmetricMemory.set_group_info(group_name, *place, store)
    return group


def _cannot(error: Exception) -> RankError:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return RankError(f"torch's symmetric memory cannot be opened here: {first[:100]}")


def sum_large(segments: SymmetricSegments, route: RouteName, t: torch.Tensor, size: int) -> None:
    """t <- the sum over ranks by torch's op: contiguous, bfloat16 or float32, no larger than
    `segments.large`. What is padded is garbage on every rank, and stays in the segment."""
    share = _PAD_BYTES * size
    padded = -(-t.nbytes // share) * share
    staged = segments.large[:padded].view(t.dtype)
    inside = staged[: t.numel()]
    inside.copy_(t.view(-1))
    ops: Any = torch.ops.symm_mem
    op = ops.multimem_all_reduce_ if route == "multimem" else ops.two_shot_all_reduce_
    op(staged, "sum", segments.group_name)
    t.view(-1).copy_(inside)
