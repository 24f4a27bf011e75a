"""The passes of `vocab_passes` compiled from vocab_passes.c, for logits in a CPU's memory.

Set-up compiles them (`python -m tpinfer.decoding.native_passes`); a rank that finds no library
compiles it itself, which takes a second or two. A library whose masses differ from torch's by a bit
is not used: ranks would draw different tokens.
"""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tpinfer.decoding.masses import CHUNK, Scale
from tpinfer.decoding.vocab_passes import TorchPasses
from tpinfer.numerics.native_library import build_library, open_library

SOURCE = Path(__file__).with_name("vocab_passes.c")
_FLAGS = ("-fopenmp", "-ffp-contract=off", "-fno-trapping-math")
_POINTERS = (
    *("logits", "rows", "highest", "factor", "min_p"),
    *("cut_value", "cut_id", "places", "sums", "out"),
)
_NUMBERS = ("num_rows", "width", "row_stride", "first", "num_threads")


class _VocabRows(ctypes.Structure):
    """struct vocab_rows of vocab_passes.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
    )


class NativePasses:
    """The compiled passes, on `num_threads` threads."""

    def __init__(self, library: ctypes.CDLL, num_threads: int) -> None:
        self._num_threads = num_threads
        self._best_keys, self._sum_masses = library.best_keys, library.sum_masses
        self._list_masses, self._tokens_at = library.list_masses, library.tokens_at
        for function in (self._best_keys, self._sum_masses, self._list_masses, self._tokens_at):
            function.argtypes, function.restype = [ctypes.c_void_p], None

    def best_keys(self, logits_RV: torch.Tensor, rows: Sequence[int], first: int) -> torch.Tensor:
        """As `VocabPasses.best_keys`."""
        found = torch.empty((len(rows), 1), dtype=torch.int64)
        self._run(self._best_keys, logits_RV, rows, first, {"out": found})
        return found

    def local_sums(
        self, logits_RV: torch.Tensor, rows: Sequence[int], scale: Scale, first: int
    ) -> torch.Tensor:
        """As `VocabPasses.local_sums`."""
        num_chunks = -(-logits_RV.shape[1] // CHUNK)
        sums = torch.empty((len(rows), num_chunks), dtype=torch.int64)
        self._run(self._sum_masses, logits_RV, rows, first, _columns(scale) | {"sums": sums})
        return sums

    def row_masses(
        self, logits_RV: torch.Tensor, rows: Sequence[int], scale: Scale, first: int
    ) -> torch.Tensor:
        """As `VocabPasses.row_masses`."""
        found = torch.empty((len(rows), logits_RV.shape[1]), dtype=torch.int64)
        self._run(self._list_masses, logits_RV, rows, first, _columns(scale) | {"out": found})
        return found

    def tokens_at(
        self,
        logits_RV: torch.Tensor,
        rows: Sequence[int],
        scale: Scale,
        sums_nN: torch.Tensor,
        places: torch.Tensor,
        first: int,
    ) -> torch.Tensor:
        """As `VocabPasses.tokens_at`."""
        found = torch.empty(len(rows), dtype=torch.int64)
        held = _columns(scale) | {"sums": sums_nN, "places": places, "out": found}
        self._run(self._tokens_at, logits_RV, rows, first, held)
        return found

    def _run(
        self,
        function: Callable[[int], None],
        logits_RV: torch.Tensor,
        rows: Sequence[int],
        first: int,
        held: dict[str, torch.Tensor],
    ) -> None:
        """Call `function` with `held`, tensors by the name of their pointer."""
        if logits_RV.stride(1) != 1 or logits_RV.dtype != torch.float32:
            raise ValueError(
                f"logits are {logits_RV.dtype} with strides {logits_RV.stride()}; the passes read "
                "float32 rows whose columns adjoin: call contiguous()"
            )
        # Held until the call returns: an address holds nothing.
        held = held | {"rows": torch.tensor(rows, dtype=torch.int64)}
        held = {name: tensor.contiguous() for name, tensor in held.items()}
        call = _VocabRows(
            logits=logits_RV.data_ptr(),
            num_rows=len(rows),
            width=logits_RV.shape[1],
            row_stride=logits_RV.stride(0),
            first=first,
            num_threads=self._num_threads,
            **{name: tensor.data_ptr() for name, tensor in held.items()},
        )
        function(ctypes.addressof(call))


def _columns(scale: Scale) -> dict[str, torch.Tensor]:
    found = {"highest": scale.highest, "factor": scale.factor, "min_p": scale.min_p}
    if scale.cut_value is not None and scale.cut_id is not None:
        found |= {"cut_value": scale.cut_value, "cut_id": scale.cut_id}
    return found


def load_native_passes(num_threads: int) -> tuple[NativePasses | None, str]:
    """(the passes, where they came from), or (None, why they cannot be had)."""
    library, reason = open_library(SOURCE, _FLAGS, _VocabRows, "vocab_rows_struct_bytes")
    if library is None:
        return None, reason
    passes = NativePasses(library, num_threads)
    if not _agrees(passes):
        return (
            None,
            "what was compiled rounds otherwise than torch; compile with -ffp-contract=off",
        )
    return passes, reason


def _agrees(passes: NativePasses) -> bool:
    """Whether masses are torch's to the bit, over all that have any."""
    logits = torch.linspace(-31.0, 0.0, 4001).unsqueeze(0)
    one = torch.ones(1, 1)
    scale = Scale(0 * one, one, 0 * one, 0.0)
    of = logits, [0], scale, 0
    return torch.equal(passes.row_masses(*of), TorchPasses().row_masses(*of))


if __name__ == "__main__":
    built, said = build_library(SOURCE, _FLAGS)
    print(f"native passes over logits: {built or 'not built, plain torch is used'} ({said})")
