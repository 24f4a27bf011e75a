"""Op ids for kernels that no annotation names, from their place in the order of a decoder's ops.

Kernels of this project's own graph replays that `by_nodes` could not read get the ids of the
manifest beside the trace; those of other engines the ids of the ledger of a model that the user
names. A stretch of kernels is one
step's, or, where nobody annotated steps, one graph launch's. Equal stretches are read once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tpprof.classify.entries import Entries, Texts, split_rows
from tpprof.classify.manifest import Manifest
from tpprof.classify.names import Names
from tpprof.classify.roles import Roles, assign_roles
from tpprof.classify.rules import Verdict
from tpprof.classify.work import WorkKind
from tpprof.events import NONE

LEAST_PLACED = 0.9
"""Share of the kernels of this project's graphs that should find an op."""
_FIRST_UNIT = 1 << 40
"""Units of stretches begin here; those of ranges are rows of the trace, the others negative."""
_MOST_OPS = 1 << 20


@dataclass
class Placed:
    """What was found."""

    layer: np.ndarray
    """int32 [n]: also of kernels that fit no op; -1 where not read."""
    warnings: list[str]


@dataclass(frozen=True)
class _Reading:
    op: np.ndarray
    """int32: number of the op id; -1 for none."""
    layer: np.ndarray
    reason: str


class _Reader:
    """Reads stretches of kernels, and remembers those it has seen."""

    def __init__(self, entries: Entries, names: Names, program: Manifest, tp: int) -> None:
        self._entries = entries
        self._names = names
        self._program = program
        self._tp = tp
        self._seen: dict[bytes, _Reading] = {}
        self._reasons: dict[str, int] = {}
        self.texts = Texts(entries.op_ids)

    def place(self, rows: np.ndarray, unit: int, layer: np.ndarray) -> None:
        """Fill op ids, units and layers of one stretch, rows in order of time."""
        entries = self._entries
        name, kind = self._names.index[rows], entries.kind[rows]
        seen = name.tobytes() + kind.tobytes()
        if seen not in self._seen:
            self._seen[seen] = self._read(name, kind)
        found = self._seen[seen]
        if found.reason:
            self._reasons[found.reason] = self._reasons.get(found.reason, 0) + 1
            return
        layer[rows] = found.layer
        fits = found.op >= 0
        entries.op_id[rows[fits]] = found.op[fits]
        entries.unit[rows[fits]] = _FIRST_UNIT + unit * _MOST_OPS + found.op[fits].astype(np.int64)

    def _read(self, name: np.ndarray, kind: np.ndarray) -> _Reading:
        verdicts = [
            _with_kind(self._names.verdicts[index], known)
            for index, known in zip(name.tolist(), kind.tolist(), strict=True)
        ]
        roles = assign_roles(name.tolist(), verdicts, self._program.num_layers)
        reason = roles.reason or self._group_mismatch(roles)
        if reason:
            return _Reading(np.empty(0, np.int32), np.empty(0, np.int32), reason)
        known = [key if key in self._program.place else "" for key in roles.keys]
        return _Reading(self.texts.numbers(known), np.array(roles.layers, np.int32), "")

    def _group_mismatch(self, roles: Roles) -> str:
        """A decoder on one rank has nobody to reduce with, and one on several cannot do without."""
        layers = self._program.num_layers
        if self._tp == 1 and roles.num_reduces > layers / 2:
            return "its layers hold collectives, which one rank has no use for; pass --tp N"
        if self._tp > 1 and roles.num_reduces < layers / 2:
            return (
                f"collectives were found in {roles.num_reduces} of {layers} layers, and tp="
                f"{self._tp} needs them in all; check --tp"
            )
        return ""

    def told(self, num_stretches: int, what: str) -> list[str]:
        """Why stretches were not read, counted."""
        return [f"{n} of {num_stretches} {what}: {why}" for why, n in self._reasons.items()]


def _with_kind(verdict: Verdict, kind: int) -> Verdict:
    """A recorder or a manifest may know better than the name."""
    if verdict.kind == kind:
        return verdict
    return Verdict(WorkKind(kind), verdict.op, verdict.role)


def place_in_graphs(
    entries: Entries, names: Names, manifest: Manifest, is_read: np.ndarray
) -> Placed:
    """Op ids of the manifest for kernels of this project's graph replays, in steps it annotated and
    of which nothing was read by nodes. is_read: bool [n], of those that were."""
    layer = np.full(len(entries), NONE, np.int32)
    rows = np.flatnonzero(entries.in_graph & (entries.op_id < 0) & (entries.step >= 0))
    rows = rows[entries.kind[rows] != WorkKind.COPY]
    rows = rows[~np.isin(entries.step[rows], entries.step[is_read])]
    if not len(rows):
        return Placed(layer, [])
    reader = _Reader(entries, names, manifest, manifest.tp)
    stretches = split_rows(rows, entries.step[rows])
    for mine in stretches:
        reader.place(mine, int(entries.step[mine[0]]), layer)
    entries.op_ids = reader.texts.texts
    told = reader.told(len(stretches), "steps with graph replays were not read as the manifest")
    placed = float((entries.op_id[rows] >= 0).mean())
    if placed < LEAST_PLACED:
        told.append(
            f"{100 * placed:.0f} % of the kernels in graph replays were placed in the manifest"
        )
    return Placed(layer, told)


def place_in_model(
    entries: Entries, names: Names, program: Manifest, sums: Sequence[Mapping[str, int]]
) -> Placed:
    """Op ids of a model's ledger for kernels of another engine."""
    layer = np.full(len(entries), NONE, np.int32)
    rows = np.flatnonzero((entries.kind != WorkKind.COPY) & (entries.op_id < 0))
    in_step, in_graph = entries.step[rows] >= 0, entries.in_graph[rows]
    reader = _Reader(entries, names, program, program.tp)
    stretches = split_rows(rows[in_step], entries.step[rows[in_step]])
    loose = rows[~in_step & in_graph]
    stretches += split_rows(loose, entries.launch[loose])
    for unit, mine in enumerate(stretches):
        reader.place(mine, unit, layer)
    entries.op_ids = reader.texts.texts
    told = reader.told(len(stretches), "steps were not read as the model")
    if not stretches:
        told.append(
            "--model needs steps to read: the recording has neither annotated steps nor graphs"
        )
    elif not sums:
        told.append(
            "no steps are annotated, so how many tokens they had is unknown: --model gives layers "
            "and ops, but no costs"
        )
    return Placed(layer, told)
