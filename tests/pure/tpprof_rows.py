"""Traces for the classifier's tests, row by row, with what a reader would know of each row."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tpprof.events import NONE, Collectives, Device, Kind, Lane, Trace

THREAD = Lane(is_device=False, pid=100, tid=100)
WORKER = Lane(is_device=False, pid=100, tid=101)
STREAM = Lane(is_device=True, pid=NONE, tid=7, device=0)
GPU = Device("GPU", num_sms=100)


@dataclass
class Row:
    """One event."""

    kind: Kind
    name: str
    start_ns: int
    end_ns: int
    lane: Lane
    launch: "Row | None" = None
    op: "Row | None" = None
    num_blocks: int = NONE
    num_bytes: int = NONE
    shapes: str = ""
    told: tuple[str, int, str, int, int] | None = None
    """(collective, bytes, group, size, sequence), as the recorder tells them."""


@dataclass
class Rows:
    """What one rank recorded. `now_ns` moves on with each kernel."""

    rows: list[Row] = field(default_factory=list)
    now_ns: int = 1000

    def add(self, kind: Kind, name: str, start: int, end: int, lane: Lane, **more: Any) -> Row:
        """Any row."""
        self.rows.append(Row(kind, name, start, end, lane, **more))
        return self.rows[-1]

    def op(
        self, name: str, start: int, end: int, inputs: Sequence = (), lane: Lane = THREAD
    ) -> Row:
        """A framework operator, with inputs of (dims, dtype)."""
        shapes = [[dims for dims, _ in inputs], [dtype for _, dtype in inputs]]
        text = json.dumps(shapes) if inputs else ""
        return self.add(Kind.OP, name, start, end, lane, shapes=text)

    def range(self, name: str, start: int, end: int, lane: Lane = THREAD) -> Row:
        """An annotation."""
        return self.add(Kind.RANGE, name, start, end, lane)

    def launched(self, name: str, length: int, **more: Any) -> Row:
        """A kernel with its own call, 10 ns ahead of it; `op` may be given as (name, inputs)."""
        call = self.add(Kind.LAUNCH, "cudaLaunchKernel", self.now_ns, self.now_ns + 5, THREAD)
        if isinstance(more.get("op"), tuple):
            called, inputs = more["op"]
            more["op"] = self.op(called, self.now_ns - 2, self.now_ns + 7, inputs)
        more.setdefault("kind", Kind.KERNEL)
        start = self.now_ns + 10
        self.now_ns = start + length + 10
        kind = more.pop("kind")
        return self.add(kind, name, start, start + length, STREAM, launch=call, **more)

    def replay(self, names: Sequence[str], length: int = 1000) -> list[Row]:
        """Kernels of one graph launch."""
        call = self.add(Kind.LAUNCH, "cudaGraphLaunch", self.now_ns, self.now_ns + 5, THREAD)
        found = []
        for name in names:
            start = self.now_ns + 10
            self.now_ns = start + length
            found.append(self.add(Kind.KERNEL, name, start, self.now_ns, STREAM, launch=call))
        self.now_ns += 10
        return found

    def trace(self, **facts: Any) -> Trace:
        """Sorted columns, as a reader makes them."""
        rows = sorted(self.rows, key=lambda row: (row.start_ns, -row.end_ns))
        place = {id(row): index for index, row in enumerate(rows)}
        told = [(i, row.told) for i, row in enumerate(rows) if row.told is not None]
        texts = [text for row in rows for text in (row.name, row.shapes)]
        texts += [text for _, one in told for text in (one[0], one[2])]
        strings = sorted({text for text in texts if text})
        number = {text: index for index, text in enumerate(strings)} | {"": NONE}
        lanes = sorted({row.lane for row in rows}, key=lambda one: (one.is_device, one.tid))

        def column(dtype: type, values: Sequence[int]) -> np.ndarray:
            return np.array(values, dtype).reshape(len(values))

        def place_of(row: Row | None) -> int:
            return NONE if row is None else place[id(row)]

        return Trace(
            rank=facts.pop("rank", 0),
            source="rank0.trace.json",
            recorder="kineto",
            strings=strings,
            lanes=lanes,
            start_ns=column(np.int64, [row.start_ns for row in rows]),
            end_ns=column(np.int64, [row.end_ns for row in rows]),
            kind=column(np.int8, [int(row.kind) for row in rows]),
            name=column(np.int32, [number[row.name] for row in rows]),
            lane=column(np.int32, [lanes.index(row.lane) for row in rows]),
            launch=column(np.int32, [place_of(row.launch) for row in rows]),
            op=column(np.int32, [place_of(row.op) for row in rows]),
            node=np.full(len(rows), NONE, np.int64),
            num_blocks=column(np.int64, [row.num_blocks for row in rows]),
            num_bytes=column(np.int64, [row.num_bytes for row in rows]),
            shapes=column(np.int32, [number[row.shapes] for row in rows]),
            collectives=Collectives(
                row=column(np.int64, [i for i, _ in told]),
                op=column(np.int32, [number[one[0]] for _, one in told]),
                num_bytes=column(np.int64, [one[1] for _, one in told]),
                group=column(np.int32, [number[one[2]] for _, one in told]),
                group_size=column(np.int32, [one[3] for _, one in told]),
                sequence=column(np.int64, [one[4] for _, one in told]),
            ),
            devices=facts.pop("devices", {0: GPU}),
            **facts,
        )
