"""How fast tpprof judges a large trace.

    python profiling/classify_speed.py [--rows N] [--rounds N]

Makes three traces of N device rows each, with the columns a reader would hand over, and classifies
each several times on one thread: this project's graph replays with their manifest, another engine's
replays with the model the user names, and kernels launched one by one for operators with shapes.
Prints the median and the slowest round of each. The target is 1 s for 1 M rows.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

import numpy as np
from tpprof.classify.classify import classify_trace
from tpprof.classify.manifest import model_manifest
from tpprof.classify.prices import CostSource
from tpprof.events import NONE, Device, Kind, Lane, Trace, no_collectives

from tpinfer.config.ceilings import Ceilings, MemoryLevel
from tpinfer.config.dtypes import DType
from tpinfer.config.model import ModelSpec
from tpinfer.costs.ledger import CostLedger
from tpinfer.sharding.partition import partition_model

TARGET_S = 1.0
TP, ROWS_A_STEP = 8, 16
SPEC = ModelSpec(
    architecture="LlamaForCausalLM", num_layers=32, hidden_size=4096, intermediate_size=14336,
    num_heads=32, num_kv_heads=8, head_dim=128, vocab_size=128256, max_position=131072,
    rms_norm_eps=1e-5, rope_theta=5e5, dtype=DType.BFLOAT16,
)  # fmt: skip
CEILINGS = Ceilings(
    memory=(MemoryLevel("L2", 50_000_000, 5e12), MemoryLevel("HBM", 80 << 30, 2.9e12)),
    flops_per_s={DType.BFLOAT16: 7.9e14, DType.FLOAT32: 5e13},
    kernel_floor_s=2e-6,
    collective_latency_s=8e-6,
    collective_bytes_per_s=3e11,
    origin="made up for a speed test",
)
GEMM = "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT"
NORM = "void vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>(c10::BFloat16*, float)"
REDUCE = "void vllm::cross_device_reduce_1stage<__nv_bfloat16, 8>(vllm::RankData*)"
LAYER = [
    NORM, GEMM, "void vllm::rotary_embedding_kernel<c10::BFloat16, true>(long const*)",
    "void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16, __nv_bfloat16>()",
    "void cutlass::device_kernel<flash::FlashAttnFwdSm90<>>()", GEMM, REDUCE, NORM, GEMM,
    "void vllm::act_and_mul_kernel<c10::BFloat16, &vllm::silu_kernel>()", GEMM, REDUCE,
]  # fmt: skip
STEP = [
    "void at::native::vectorized_gather_kernel<16, long>(char*, char*, long*)", REDUCE,
    *LAYER * SPEC.num_layers, NORM, GEMM, "ncclDevKernel_AllGather_RING_LL(args)",
    "void flashinfer::sampling::TopKTopPSamplingFromProbKernel<1024u>(float*)",
]  # fmt: skip
LANES = [Lane(False, 100, 100), Lane(True, NONE, 7, 0)]


def made_trace(strings: list[str], columns: dict[str, np.ndarray]) -> Trace:
    """Columns of rows in any order to a trace; links number the rows given."""
    order = np.lexsort((-columns["end_ns"], columns["start_ns"]))
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order))
    for link in ("launch", "op"):
        linked = columns[link] >= 0
        columns[link] = np.where(linked, place[columns[link]], NONE)
    dtypes = {"start_ns": np.int64, "end_ns": np.int64, "kind": np.int8}
    sorted_columns: dict[str, Any] = {
        name: column[order].astype(dtypes.get(name, np.int32)) for name, column in columns.items()
    }
    missing = np.full(len(order), NONE, np.int64)
    return Trace(
        rank=0, source="rank0.trace.json", recorder="kineto", strings=strings, lanes=LANES,
        node=missing, num_blocks=missing, num_bytes=missing, collectives=no_collectives(),
        devices={0: Device("GPU", 132)}, world_size=TP, **sorted_columns,
    )  # fmt: skip


def replays(num_rows: int, engine: str) -> Trace:
    """Decode steps that replay one graph each; contexts grow."""
    num_steps = -(-num_rows // len(STEP))
    strings = sorted({*STEP, "cudaGraphLaunch"})
    number = {text: index for index, text in enumerate(strings)}
    one = np.array([number[name] for name in STEP])
    period = 4000 * len(STEP) + 20_000
    begin = np.arange(num_steps) * period
    sums = [16_000 + ROWS_A_STEP * step for step in range(num_steps)]
    labels = [annotation(engine, step, sk) for step, sk in enumerate(sums)]
    kernel = (begin[:, None] + 10_000 + 4000 * np.arange(len(STEP))).ravel()
    count, rows = len(kernel), len(kernel) + 2 * num_steps
    calls = np.arange(count, count + num_steps)
    return made_trace(
        strings + labels,
        {
            "start_ns": np.concatenate((kernel, begin + 5000, begin)),
            "end_ns": np.concatenate((kernel + 3900, begin + 9000, begin + period - 100)),
            "kind": np.repeat(
                [Kind.KERNEL, Kind.LAUNCH, Kind.RANGE], [count, num_steps, num_steps]
            ),
            "name": np.concatenate((np.tile(one, num_steps),
                                    np.full(num_steps, number["cudaGraphLaunch"]),
                                    len(strings) + np.arange(num_steps))),
            "lane": np.repeat([1, 0], [count, 2 * num_steps]),
            "launch": np.concatenate((np.repeat(calls, len(STEP)), np.full(2 * num_steps, NONE))),
            "op": np.full(rows, NONE),
            "shapes": np.full(rows, NONE),
        },
    )  # fmt: skip


def annotation(engine: str, step: int, context: int) -> str:
    """A decode step's."""
    if engine == "vllm":
        tokens = f"sq{ROWS_A_STEP}sk{context}sqsq{ROWS_A_STEP}sqsk{context}"
        return (
            f"execute_{ROWS_A_STEP}_context_0(sq0sk0sqsq0sqsk0)_generation_{ROWS_A_STEP}({tokens})"
        )
    return (
        f"tpinfer.step id={step} phase=decode tokens={ROWS_A_STEP} rows={ROWS_A_STEP} full_rows=0 "
        f"sk={context} sqsk={context} sqsq={ROWS_A_STEP} sk_window={context} pairs_window={context}"
    )


def eager(num_rows: int) -> Trace:
    """Every kernel has its own call inside its own operator; 200 shapes and 200 kernel names."""
    kinds = 200
    shapes = [
        json.dumps([[[rows, 4096], [4096, 4096]], ["c10::BFloat16", "c10::BFloat16"]])
        for rows in range(1, kinds + 1)
    ]
    names = [f"{GEMM}_variant_{number}_{'x' * 100}" for number in range(kinds)]
    strings = [*names, *shapes, "aten::mm", "cudaLaunchKernel"]
    index = np.arange(num_rows)
    begin = 8000 * index
    missing = np.full(num_rows, NONE)
    return made_trace(
        strings,
        {
            "start_ns": np.concatenate((begin + 12_000, begin + 1000, begin)),
            "end_ns": np.concatenate((begin + 19_000, begin + 5000, begin + 6000)),
            "kind": np.repeat([Kind.KERNEL, Kind.LAUNCH, Kind.OP], num_rows),
            "name": np.concatenate((index % kinds, np.full(num_rows, 2 * kinds + 1),
                                    np.full(num_rows, 2 * kinds))),
            "lane": np.repeat([1, 0, 0], num_rows),
            "launch": np.concatenate((num_rows + index, missing, missing)),
            "op": np.concatenate((2 * num_rows + index, 2 * num_rows + index, missing)),
            "shapes": np.concatenate((missing, missing, kinds + index * 7 % kinds)),
        },
    )  # fmt: skip


def main() -> int:
    """Measure and print; 1 where a median misses the target, in proportion to the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="device rows of each trace")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    ledger = CostLedger(SPEC, partition_model(SPEC, TP), 0, SPEC.dtype, SPEC.dtype)
    cases = {
        "own replays, manifest": (
            replays(asked.rows, "tpinfer"),
            CostSource(model_manifest(ledger)),
        ),
        "foreign replays, --model": (replays(asked.rows, "vllm"), CostSource(spec=SPEC, tp=TP)),
        "eager, shapes": (eager(asked.rows), CostSource()),
    }
    is_slow = False
    for name, (trace, costs) in cases.items():
        took, busy = [], []
        for _ in range(asked.rounds):
            began, began_busy = time.perf_counter(), time.process_time()
            work = classify_trace(trace, CEILINGS, costs)
            took.append(time.perf_counter() - began)
            busy.append(time.process_time() - began_busy)
        priced = float((work.flops >= 0).mean())
        median = statistics.median(took)
        is_slow |= median > TARGET_S * asked.rows / 1e6
        print(
            f"{name}: {len(work)} device rows of {len(trace)}, {100 * priced:.0f} % priced: median "
            f"{median:.2f} s, CPU {statistics.median(busy):.2f} s, slowest {max(took):.2f} s"
        )
    return int(is_slow)


if __name__ == "__main__":
    sys.exit(main())
