"""Hand-made traces for tpprof's tests: say what ran when, get the columns.

A `Recording` collects rows in any order; `trace()` sorts them as a reader does and `work()` gives
the verdicts that were said along with the rows, as the classifier would.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tpprof.classify.work import Work, WorkKind
from tpprof.events import NONE, Collectives, Device, Kind, Lane, Trace

from tpinfer.costs.leaves import LEAVES

THREAD = Lane(is_device=False, pid=100, tid=100)
STREAM = Lane(is_device=True, pid=NONE, tid=7, device=0)
COMM_STREAM = Lane(is_device=True, pid=NONE, tid=20, device=0)
COMM_KINDS = (WorkKind.COMM, WorkKind.FUSED_COMM)


@dataclass
class Row:
    """One event; `work` is set for kernels and copies."""

    kind: Kind
    name: str
    start_ns: int
    end_ns: int
    lane: Lane
    launch: "Row | None" = None
    node: int = NONE
    num_bytes: int = NONE
    work: dict[str, Any] | None = None


@dataclass
class Recording:
    """What one rank recorded."""

    rank: int = 0
    rows: list[Row] = field(default_factory=list)
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    world_size: int = NONE
    num_lost: int = 0
    is_cpu: bool = False
    source: str = ""

    def add(
        self, kind: Kind, name: str, start_ns: int, end_ns: int, lane: Lane, **more: Any
    ) -> Row:
        """Any row."""
        self.rows.append(Row(kind, name, start_ns, end_ns, lane, **more))
        return self.rows[-1]

    def kernel(
        self, name: str, start_ns: int, end_ns: int, lane: Lane = STREAM, **verdict: Any
    ) -> Row:
        """A kernel. `launch` and `node` go to the trace; the rest is its verdict: `kind`, `leaf`,
        `floor`, `key`, `layer`, `step`, `op`, `bytes`, `group`, `size`, `sequence`."""
        launch, node = verdict.pop("launch", None), verdict.pop("node", NONE)
        return self.add(
            Kind.KERNEL, name, start_ns, end_ns, lane, launch=launch, node=node, work=verdict
        )

    def comm(self, op: str, start_ns: int, end_ns: int, **verdict: Any) -> Row:
        """A collective's kernel, on the communication stream."""
        return self.kernel(
            f"ncclDevKernel_{op}",
            start_ns,
            end_ns,
            **{"lane": COMM_STREAM, "kind": WorkKind.COMM, "op": op, **verdict},
        )

    def copy(
        self, name: str, start_ns: int, end_ns: int, num_bytes: int = 8, **verdict: Any
    ) -> Row:
        """A copy on the stream of kernels."""
        launch = verdict.pop("launch", None)
        verdict = {"kind": WorkKind.COPY, "leaf": "copy", **verdict}
        return self.add(
            Kind.COPY, name, start_ns, end_ns, STREAM,
            launch=launch, num_bytes=num_bytes, work=verdict,
        )  # fmt: skip

    def call(self, start_ns: int, end_ns: int, name: str = "cudaLaunchKernel") -> Row:
        """A call of the runtime."""
        return self.add(Kind.LAUNCH, name, start_ns, end_ns, THREAD)

    def range(self, name: str, start_ns: int, end_ns: int) -> Row:
        """An annotation on the main thread."""
        return self.add(Kind.RANGE, name, start_ns, end_ns, THREAD)

    def step(self, number: int, start_ns: int, end_ns: int, phase: str = "decode") -> Row:
        """This project's own annotation."""
        return self.range(f"tpinfer.step id={number} phase={phase} tokens=1", start_ns, end_ns)

    def build(self) -> tuple[Trace, Work]:
        """Columns, and the verdict on every kernel, copy and operator that has one."""
        ordered = sorted(self.rows, key=lambda row: (row.start_ns, -row.end_ns))
        place = {id(row): index for index, row in enumerate(ordered)}
        strings = list(dict.fromkeys(row.name for row in ordered))
        lanes = list(dict.fromkeys(row.lane for row in ordered))
        trace = Trace(
            rank=self.rank,
            source=self.source or f"rank{self.rank}.trace.json",
            recorder="kineto",
            strings=strings,
            lanes=lanes,
            start_ns=_long(row.start_ns for row in ordered),
            end_ns=_long(row.end_ns for row in ordered),
            kind=np.array([int(row.kind) for row in ordered], np.int8),
            name=_int(strings.index(row.name) for row in ordered),
            lane=_int(lanes.index(row.lane) for row in ordered),
            launch=_int(place[id(row.launch)] if row.launch else NONE for row in ordered),
            op=_int(NONE for _ in ordered),
            node=_long(row.node for row in ordered),
            num_blocks=_long(NONE for _ in ordered),
            num_bytes=_long(row.num_bytes for row in ordered),
            shapes=_int(NONE for _ in ordered),
            collectives=self._collectives(ordered, strings),
            devices={0: Device("test")},
            groups=self.groups,
            world_size=self.world_size,
            num_lost=self.num_lost,
        )
        return trace, self._work(ordered, lanes)

    def _collectives(self, ordered: list[Row], strings: list[str]) -> Collectives:
        rows = [
            i for i, row in enumerate(ordered) if row.work and row.work.get("kind") in COMM_KINDS
        ]
        verdicts = [ordered[i].work or {} for i in rows]
        for verdict in verdicts:
            for key in ("op", "group"):
                if verdict.get(key) is not None and verdict[key] not in strings:
                    strings.append(verdict[key])
        text = [[strings.index(v[k]) if v.get(k) is not None else NONE for k in ("op", "group")]
                for v in verdicts]  # fmt: skip
        return Collectives(
            row=_long(rows),
            op=_int(op for op, _ in text),
            num_bytes=_long(v.get("bytes", NONE) for v in verdicts),
            group=_int(group for _, group in text),
            group_size=_int(v.get("size", NONE) for v in verdicts),
            sequence=_long(v.get("sequence", NONE) for v in verdicts),
        )

    def _work(self, ordered: list[Row], lanes: list[Lane]) -> Work:
        entries = [(i, row, row.work) for i, row in enumerate(ordered) if row.work is not None]
        entries.sort(key=lambda e: (e[1].start_ns, lanes.index(e[1].lane), -e[1].end_ns))
        texts = [v.get(k) for _, _, v in entries for k in ("key", "op", "group")]
        keys = list(dict.fromkeys(text for text in texts if text is not None))

        def text(name: str) -> np.ndarray:
            found = [v.get(name) for _, _, v in entries]
            return _int(keys.index(t) if t is not None else NONE for t in found)

        def number(name: str, default: int) -> np.ndarray:
            return _long(v.get(name, default) for _, _, v in entries)

        kinds = [v.get("kind", WorkKind.COMPUTE) for _, _, v in entries]
        floor = number("floor", 0)
        return Work(
            row=_long(i for i, _, _ in entries),
            start_ns=_long(row.start_ns for _, row, _ in entries),
            end_ns=_long(row.end_ns for _, row, _ in entries),
            lane=_int(lanes.index(row.lane) for _, row, _ in entries),
            kind=np.array(kinds, np.int8),
            leaf=np.array(
                [
                    LEAVES.index(_leaf(kind, v))
                    for kind, (_, _, v) in zip(kinds, entries, strict=True)
                ],
                np.int8,
            ),
            balanced=np.zeros(len(entries), bool),
            floor_ns=floor,
            flops=number("flops", NONE),
            num_bytes=number("moved", NONE),
            key=text("key"),
            layer=_int(v.get("layer", NONE) for _, _, v in entries),
            step=number("step", NONE),
            keys=keys,
            comm_op=text("op"),
            comm_bytes=number("bytes", NONE),
            comm_group=text("group"),
            comm_size=_int(v.get("size", NONE) for _, _, v in entries),
            comm_sequence=number("sequence", NONE),
            ceilings_ns={"roof": floor},
            is_cpu=self.is_cpu,
        )


def _leaf(kind: int, verdict: dict[str, Any]) -> str:
    return verdict.get("leaf") or ("comm_unsplit" if kind in COMM_KINDS else "compute")


def _long(values: Any) -> np.ndarray:
    return np.array(list(values), np.int64)


def _int(values: Any) -> np.ndarray:
    return np.array(list(values), np.int32)
