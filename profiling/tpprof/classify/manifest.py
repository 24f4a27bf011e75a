"""The cost manifest that a tpinfer recording brings along: per op its formulas, and the ceilings of
the rank it ran on.

A formula is linear in a step's sums (tokens, rows, sk, ...), which the step's annotation carries.
All ops of all steps are priced by one matrix product.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from tpinfer.config.ceilings import Ceilings, MemoryLevel
from tpinfer.config.dtypes import DType
from tpprof.errors import TraceError

COLLECTIVES = {"reduce": "allreduce", "gather": "allgather"}
"""Kinds of op in which ranks wait for each other, and what they are called elsewhere."""
_COLUMNS = ("flops", "bytes_read", "bytes_written", "bytes_sent")


class _Op(msgspec.Struct):
    id: str
    kind: str
    flops: dict[str, float]
    bytes_read: dict[str, float]
    bytes_written: dict[str, float]
    bytes_sent: dict[str, float]


class _Formulas(msgspec.Struct):
    format_version: int
    tp: int
    compute_dtype: str
    terms: list[str]
    weight_bytes: int
    kv_bytes_per_token: int
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
    collective_bytes_per_s: float
    origin: str


class _File(msgspec.Struct):
    manifest: _Formulas
    ceilings: _Ceilings | None = None


@dataclass(frozen=True)
class Manifest:
    """One rank's prices."""

    tp: int
    compute_dtype: DType
    weight_bytes: int
    kv_bytes_per_token: int
    terms: Sequence[str]
    place: Mapping[str, int]
    """Op id -> row of the tables below; the order is the program's."""
    kinds: Sequence[str]
    factors: np.ndarray
    """float64 [4, ops, terms]: FLOPs, bytes read, written, sent."""
    ceilings: Ceilings | None

    def prices(self, sums: Sequence[Mapping[str, int]]) -> tuple[np.ndarray, ...]:
        """(FLOPs, bytes moved, bytes sent), each int64 [steps, ops], for the sums of each step;
        -1 in the row of a step that does not carry them all."""
        terms = np.zeros((len(sums), len(self.terms)))
        is_whole = np.ones(len(sums), bool)
        for i, values in enumerate(sums):
            is_whole[i] = all(term == "one" or term in values for term in self.terms)
            terms[i] = [1 if term == "one" else values.get(term, 0) for term in self.terms]
        flops, read, written, sent = np.rint(np.einsum("cot,st->cso", self.factors, terms)).astype(
            np.int64
        )
        columns = flops, read + written, sent
        return tuple(np.where(is_whole[:, None], column, -1) for column in columns)

    def working_set_bytes(self, sums: Mapping[str, int]) -> int:
        """Bytes a step touches and the next touches again."""
        return self.weight_bytes + sums.get("sk", 0) * self.kv_bytes_per_token


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
    except msgspec.MsgspecError as error:
        raise TraceError(f"{path} is no cost manifest ({error}); record the run again") from None
    formulas = found.manifest
    if formulas.format_version != 1:
        raise TraceError(
            f"{path} has format {formulas.format_version} and this tpprof reads 1; update it"
        )
    column = {term: i for i, term in enumerate(formulas.terms)}
    factors = np.zeros((len(_COLUMNS), len(formulas.ops), len(formulas.terms)))
    for row, op in enumerate(formulas.ops):
        for which, name in enumerate(_COLUMNS):
            for term, factor in getattr(op, name).items():
                if term not in column:
                    raise TraceError(f"{path}: op {op.id} has the unknown term {term!r}")
                factors[which, row, column[term]] = factor
    return Manifest(
        tp=formulas.tp,
        compute_dtype=_dtype(formulas.compute_dtype, path),
        weight_bytes=formulas.weight_bytes,
        kv_bytes_per_token=formulas.kv_bytes_per_token,
        terms=tuple(formulas.terms),
        place={op.id: row for row, op in enumerate(formulas.ops)},
        kinds=tuple(op.kind for op in formulas.ops),
        factors=factors,
        ceilings=_ceilings(found.ceilings, path) if found.ceilings else None,
    )


def _ceilings(found: _Ceilings, path: Path) -> Ceilings:
    return Ceilings(
        memory=tuple(MemoryLevel(m.name, m.capacity_bytes, m.bytes_per_s) for m in found.memory),
        flops_per_s={_dtype(name, path): rate for name, rate in found.flops_per_s.items()},
        kernel_floor_s=found.kernel_floor_s,
        collective_latency_s=found.collective_latency_s,
        collective_bytes_per_s=found.collective_bytes_per_s,
        origin=found.origin,
    )


def _dtype(name: str, path: Path) -> DType:
    try:
        return DType(name)
    except ValueError:
        raise TraceError(f"{path}: dtype {name!r} is not known; update tpprof") from None
