"""Formulas of ops over a step's sums: those a tpinfer recording brings along, with the ceilings of
the rank it ran on, or those of the ledger of a model.

A formula is linear in a step's sums (tokens, rows, sk, ...), which the step's annotation carries.
All ops of all steps are priced by one matrix product.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, isfinite
from pathlib import Path

import msgspec
import numpy as np

from tpinfer.config.ceilings import Ceilings, MemoryLevel
from tpinfer.config.dtypes import DType
from tpinfer.costs.ledger import CostLedger
from tpinfer.costs.manifest import cost_manifest
from tpprof.errors import TraceError

COLLECTIVES = {"reduce": "allreduce", "gather": "allgather", "exchange": "alltoall"}
"""Kinds of op in which ranks wait for each other, and what they are called elsewhere."""
_COLUMNS = ("flops", "bytes_read", "bytes_written", "bytes_sent")
_TOUCHED_AGAIN = ("one", "sk", "sk_window")
"""Terms of what a step reads that the next step reads again: weights, and keys and values."""
_LAYER = re.compile(r"layers\.(\d{1,6})\.")
_MOST = 1 << 62


class _Op(msgspec.Struct):
    id: str
    kind: str
    flops: dict[str, float]
    bytes_read: dict[str, float]
    bytes_written: dict[str, float]
    bytes_sent: dict[str, float]
    ranks: tuple[int, int] | None = None


class _Formulas(msgspec.Struct):
    format_version: int
    tp: int
    compute_dtype: str
    terms: list[str]
    ops: list[_Op]


class _Level(msgspec.Struct):
    name: str
    capacity_bytes: int
    bytes_per_s: float


class _Ceilings(msgspec.Struct):
    memory: list[_Level]
    flops_per_s: dict[str, float]
    kernel_floor_s: float
    collective_latency_s: float
    collective_bytes_per_s: float | None
    origin: str
    compute_mhz: float | None = None


class _File(msgspec.Struct):
    manifest: _Formulas
    ceilings: _Ceilings | None = None


@dataclass(frozen=True)
class Manifest:
    """One rank's prices."""

    tp: int
    compute_dtype: DType
    terms: Sequence[str]
    place: Mapping[str, int]
    """Op id -> row of the tables below; the order is the program's."""
    kinds: Sequence[str]
    ranks: Sequence[tuple[int, int] | None]
    """(first, last) of the ranks that meet in an op, where those are not all."""
    factors: np.ndarray
    """float64 [4, ops, terms]: FLOPs, bytes read, written, sent."""
    ceilings: Ceilings | None

    def prices(self, sums: Sequence[Mapping[str, int]]) -> tuple[np.ndarray, ...]:
        """(FLOPs, bytes moved, bytes sent), each int64 [steps, ops], for the sums of each step;
        -1 for an op that needs a sum its step does not tell."""
        terms, told = self._terms(sums)
        exact = np.rint(np.einsum("cot,st->cso", self.factors, terms))
        flops, read, written, sent = np.clip(exact, 0, _MOST // 2).astype(np.int64)
        needed = (self.factors != 0).any(0)
        is_priced = ~((~told).astype(np.int64) @ needed.T.astype(np.int64)).astype(bool)
        columns = flops, read + written, sent
        return tuple(np.where(is_priced, column, -1) for column in columns)

    def _terms(self, sums: Sequence[Mapping[str, int]]) -> tuple[np.ndarray, np.ndarray]:
        """(float64, bool whether told), each [steps, terms]."""
        values = np.array(
            [[1 if term == "one" else step.get(term, -1) for term in self.terms] for step in sums],
            np.float64,
        ).reshape(len(sums), len(self.terms))
        return np.maximum(values, 0), values >= 0

    def working_sets(self, sums: Sequence[Mapping[str, int]]) -> np.ndarray:
        """int64 [steps]: bytes a step touches and the next touches again; -1 where it does not
        tell its contexts."""
        again = np.array([term in _TOUCHED_AGAIN for term in self.terms], bool)
        per_term = self.factors[1].sum(0) * again
        terms, told = self._terms(sums)
        is_known = (told | (per_term == 0)).all(1)
        sizes = np.clip(np.rint(terms @ per_term), 0, _MOST).astype(np.int64)
        return np.where(is_known, sizes, -1)

    @cached_property
    def num_layers(self) -> int:
        """Layers that its ids speak of."""
        found = [_LAYER.match(op) for op in self.place]
        return 1 + max((int(one.group(1)) for one in found if one), default=-1)


def beside(source: str, rank: int) -> Path | None:
    """The manifest that lies beside a trace of ours, where there is one."""
    path = Path(source).parent / f"rank{rank}.manifest.json"
    return path if path.is_file() else None


def read_manifest(path: Path) -> Manifest:
    """Raises TraceError for a file that is no manifest, or of a newer format."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_File)
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}; record the run again") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TraceError(f"{path} is no cost manifest ({error}); record the run again") from None
    return _manifest(found.manifest, found.ceilings, str(path))


def model_manifest(ledger: CostLedger) -> Manifest:
    """The formulas of a ledger."""
    formulas = msgspec.convert(cost_manifest(ledger), _Formulas)
    return _manifest(formulas, None, "the model's ledger")


def _manifest(formulas: _Formulas, ceilings: _Ceilings | None, file: str) -> Manifest:
    if formulas.format_version != 1:
        raise TraceError(
            f"{file} has format {formulas.format_version} and this tpprof reads 1; update it"
        )
    ids = [op.id for op in formulas.ops]
    for what, texts in (("op", ids), ("term", formulas.terms)):
        twice = [text for text, count in Counter(texts).items() if count > 1]
        if twice:
            raise TraceError(f"{file} names the {what} {twice[0]!r} twice; record the run again")
    if formulas.tp < 1:
        raise TraceError(f"{file} speaks of {formulas.tp} ranks; record the run again")
    for op in formulas.ops:
        if op.ranks and not 0 <= op.ranks[0] < op.ranks[1] < formulas.tp:
            raise TraceError(
                f"{file}: op {op.id} speaks of ranks {op.ranks[0]} to {op.ranks[1]} of "
                f"{formulas.tp}; record the run again"
            )
    return Manifest(
        tp=formulas.tp,
        compute_dtype=_dtype(formulas.compute_dtype, file),
        terms=tuple(formulas.terms),
        place={op: row for row, op in enumerate(ids)},
        kinds=tuple(op.kind for op in formulas.ops),
        ranks=tuple(op.ranks for op in formulas.ops),
        factors=_factors(formulas, file),
        ceilings=_ceilings(ceilings, file) if ceilings else None,
    )


def _factors(formulas: _Formulas, file: str) -> np.ndarray:
    column = {term: i for i, term in enumerate(formulas.terms)}
    factors = np.zeros((len(_COLUMNS), len(formulas.ops), len(formulas.terms)))
    for row, op in enumerate(formulas.ops):
        for which, name in enumerate(_COLUMNS):
            for term, factor in getattr(op, name).items():
                if term not in column:
                    raise TraceError(f"{file}: op {op.id} has the unknown term {term!r}")
                factors[which, row, column[term]] = factor
    if (np.abs(factors) > _MOST).any():
        raise TraceError(f"{file} has a factor beyond 2**62; record the run again")
    return factors


def _ceilings(found: _Ceilings, file: str) -> Ceilings:
    wire = inf if found.collective_bytes_per_s is None else found.collective_bytes_per_s
    rates = [level.bytes_per_s for level in found.memory] + [*found.flops_per_s.values(), wire]
    floors = found.kernel_floor_s, found.collective_latency_s
    is_sound = found.memory and found.flops_per_s and all(rate > 0 for rate in rates)
    if not is_sound or not all(isfinite(floor) and floor >= 0 for floor in floors):
        raise TraceError(
            f"{file}: its ceilings need a memory level, an arithmetic rate, positive rates and "
            "times of zero or more; record the run again, or pass --topology FILE"
        )
    return Ceilings(
        memory=tuple(MemoryLevel(m.name, m.capacity_bytes, m.bytes_per_s) for m in found.memory),
        flops_per_s={_dtype(name, file): rate for name, rate in found.flops_per_s.items()},
        kernel_floor_s=found.kernel_floor_s,
        collective_latency_s=found.collective_latency_s,
        collective_bytes_per_s=wire,
        origin=found.origin,
        compute_mhz=found.compute_mhz,
    )


def _dtype(name: str, file: str) -> DType:
    try:
        return DType(name)
    except ValueError:
        raise TraceError(f"{file}: dtype {name!r} is not known; update tpprof") from None
