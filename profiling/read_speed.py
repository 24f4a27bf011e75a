"""How fast tpprof reads a large recording, and how much memory that takes.

    python profiling/read_speed.py [--events N] [--folder DIR]

Writes one run's events three times - as Kineto's JSON, the same gzipped, and as an export of Nsight
Systems - and reads each in a process of its own, on one core. `json.load` and a typed msgspec
decode of the whole file stand beside it: they parse alone and build no columns.
"""

import argparse
import gzip
import json
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
ROUND_NS = 25_000
"""One round: two operators, a launch, its two arrows, a kernel, a Python frame."""
EVENTS_PER_ROUND = 7
NUM_NAMES = 200
KERNEL = (
    "void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<c10::BFloat16, "
    "c10::BFloat16, c10::BFloat16, at::native::binary_internal::MulFunctor<float> >, "
    "std::array<char*, 3ul> >(int, at::native::variant{})"
)
HEADER = """{
  "schemaVersion": 1,
  "deviceProperties": [
    {"id": 0, "name": "NVIDIA H100", "totalGlobalMem": 85045542912, "numSms": 132}
  ],
  "distributedInfo": {"backend": "nccl", "rank": 0, "world_size": 1},
  "displayTimeUnit": "ms",
  "baseTimeNanoseconds": 1711964646000000000,
  "traceEvents": [
"""
ROUND = """  {{
    "ph": "X", "cat": "cpu_op", "name": "aten::mul", "pid": 2910249, "tid": 2910249,
    "ts": {op}, "dur": 9.000,
    "args": {{
      "External id": {id},"Record function id": 0, "Concrete Inputs": ["", ""], "Input type": \
["c10::BFloat16", "c10::BFloat16"], "Input Strides": [[4096, 1], [4096, 1]], "Input Dims": \
[[{rows}, 4096], [4096, 4096]], "Ev Idx": {id}
    }}
  }},
  {{
    "ph": "X", "cat": "cpu_op", "name": "aten::empty", "pid": 2910249, "tid": 2910249,
    "ts": {inner}, "dur": 0.800,
    "args": {{
      "External id": {id}1,"Record function id": 0, "Concrete Inputs": ["[4096]", "15"], "Input \
type": ["ScalarList", "Scalar"], "Input Strides": [[], []], "Input Dims": [[], []], "Ev Idx": {id}
    }}
  }},
  {{
    "ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": 2910249, "tid": 2910249,
    "ts": {call}, "dur": 4.000,
    "args": {{
      "External id": {id}, "cbid": 211, "correlation": {id}
    }}
  }},
  {{
    "ph": "s", "id": {id}, "pid": 2910249, "tid": 2910249, "ts": {call},
    "cat": "ac2g", "name": "ac2g"
  }},
  {{
    "ph": "f", "id": {id}, "pid": 0, "tid": 7, "ts": {kernel},
    "cat": "ac2g", "name": "ac2g", "bp": "e"
  }},
  {{
    "ph": "X", "cat": "kernel", "name": "{name}", "pid": 0, "tid": 7,
    "ts": {kernel}, "dur": 6.123,
    "args": {{
      "External id": {id},
      "queued": 0, "device": 0, "context": 1,
      "stream": 7, "correlation": {id},
      "registers per thread": 40,
      "shared memory": 400,
      "blocks per SM": 4.740741,
      "warps per SM": 75.851852,
      "grid": [{blocks}, 1, 1],
      "block": [512, 1, 1],
      "est. achieved occupancy %": 75
    }}
  }},
  {{
    "ph": "X", "cat": "python_function", "name": "vllm/v1/worker/gpu_model_runner.py({line}): \
execute_model", "pid": 2910249, "tid": 2910249,
    "ts": {frame}, "dur": 9.500,
    "args": {{
      "Python parent id": {id}, "Python id": {id}1, "Ev Idx": {id}
    }}
  }}"""


def rounds(num_events: int) -> Iterator[str]:
    """Text of the events, a round at a time."""
    for number in range(num_events // EVENTS_PER_ROUND):
        start_ns = 4_458_676_416_431_397 + number * ROUND_NS

        def at(offset_ns: int, start_ns: int = start_ns) -> str:
            return f"{(start_ns + offset_ns) // 1000}.{(start_ns + offset_ns) % 1000:03d}"

        yield ROUND.format(
            id=number + 1, rows=number % 64 + 1, line=number % 3000, blocks=number % 999 + 1,
            name=KERNEL.format(number % NUM_NAMES), op=at(10), inner=at(400), call=at(1500),
            kernel=at(9000), frame=at(0),
        )  # fmt: skip


def write_kineto(path: Path, num_events: int) -> None:
    """One rank's JSON as Kineto lays it out."""
    with path.open("w") as file:
        file.write(HEADER)
        source = rounds(num_events)
        file.write(next(source))
        while piece := list(islice(source, 1000)):
            file.write(",\n" + ",\n".join(piece))
        file.write('\n  ],\n  "traceName": "big.json"\n}\n')


def write_nsight(path: Path, num_events: int) -> None:
    """As many rows in the tables that Nsight exports: ranges, calls, kernels."""
    count = num_events // 3
    process = (1 << 48) | (4321 << 24)
    starts = range(10**9, 10**9 + count * ROUND_NS, ROUND_NS)
    with closing(sqlite3.connect(path)) as database:
        database.executescript(
            """
            PRAGMA journal_mode = OFF;
            CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
            CREATE TABLE TARGET_INFO_SESSION_START_TIME (utcEpochNs INTEGER);
            CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER,
                text TEXT, globalTid INTEGER, textId INTEGER, domainId INTEGER);
            CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER, end INTEGER,
                globalTid INTEGER, correlationId INTEGER, nameId INTEGER);
            CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER, end INTEGER,
                deviceId INTEGER, streamId INTEGER, correlationId INTEGER, globalPid INTEGER,
                demangledName INTEGER, shortName INTEGER, gridX INTEGER, gridY INTEGER,
                gridZ INTEGER, graphNodeId INTEGER);
            INSERT INTO TARGET_INFO_SESSION_START_TIME VALUES (1711964646000000000);
            INSERT INTO StringIds VALUES (1, 'cudaLaunchKernel_v7000');
            """
        )
        names = [(number + 2, KERNEL.format(number)) for number in range(NUM_NAMES)]
        database.executemany("INSERT INTO StringIds VALUES (?, ?)", names)
        database.executemany(
            "INSERT INTO NVTX_EVENTS VALUES (?, ?, 59, ?, ?, NULL, 0)",
            (
                (at, at + 9000, f"aten::mul, op_id = {number}", process + 4321)
                for number, at in enumerate(starts)
            ),
        )
        database.executemany(
            "INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, ?, ?, 1)",
            ((at + 1500, at + 5500, process + 4321, number) for number, at in enumerate(starts)),
        )
        database.executemany(
            "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, 0, 7, ?, ?, ?, ?, 9, 1, 1, NULL)",
            (
                (at + 9000, at + 15123, number, process, number % NUM_NAMES + 2, 2)
                for number, at in enumerate(starts)
            ),
        )
        database.commit()


OURS = "from tpprof.readers.read import read_traces; rows = sum(map(len, read_traces([{path!r}])))"
PEERS = {
    "json.load": "import json; rows = len(json.load(open({path!r}, 'rb'))['traceEvents'])",
    "msgspec, whole file": "from tpprof.readers.kineto_json import Event; "
    "whole = msgspec.defstruct('Whole', [('traceEvents', list[Event])]); "
    "rows = len(msgspec.json.decode(open({path!r}, 'rb').read(), type=whole).traceEvents)",
}
MEASURE = """
import resource, sys, time
sys.path[:0] = [{repository!r}, {repository!r} + "/profiling"]
import numpy, msgspec
wall, cpu = time.perf_counter(), time.process_time()
{code}
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print(rows, wall, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def measure(name: str, code: str, path: Path, times: int) -> dict[str, float | str]:
    """Median wall and CPU seconds and peak bytes of reading a file in a fresh process."""
    script = MEASURE.format(repository=str(REPOSITORY), code=code.format(path=str(path)))
    found = []
    for _ in range(times):
        run = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True,
            preexec_fn=on_one_core,
        )  # fmt: skip
        found.append([float(word) for word in run.stdout.split()])
    rows, wall, cpu, peak = (statistics.median(column) for column in zip(*found, strict=True))
    line = {
        "file": path.name, "bytes": path.stat().st_size, "reader": name, "rows": rows,
        "wall_s": round(wall, 2), "cpu_s": round(cpu, 2), "peak_mb": round(peak / 1e6),
    }  # fmt: skip
    print(json.dumps(line), flush=True)
    return line


def on_one_core() -> None:
    """Keep the process on the last core it may use."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def main() -> int:
    """Write, measure, print; the files are removed unless --folder names where to keep them."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--events", type=int, default=1_000_000, help="events of the JSON file")
    parser.add_argument("--times", type=int, default=3, help="readings of each file")
    parser.add_argument("--folder", type=Path, help="where to write, and keep, the files")
    parser.add_argument("--no-peers", action="store_true", help="only what tpprof does")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        plain, packed = folder / "big.trace.json", folder / "big.trace.json.gz"
        export = folder / "big.sqlite"
        export.unlink(missing_ok=True)
        write_kineto(plain, args.events)
        with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=4) as target:
            shutil.copyfileobj(source, target, 1 << 22)
        write_nsight(export, args.events)
        for path in (plain, packed, export):
            measure("tpprof", OURS, path, args.times)
        for name, code in {} if args.no_peers else PEERS.items():
            measure(name, code, plain, 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
