"""Time of one layer's decode attention over many rows on this CPU: plain torch row by row against
the compiled kernel.

    python profiling/attention_speed.py [--rows 32] [--threads 2] [--only native]

Prints the median and the least of some calls, what a call reads, and the rate of the least: where
others use the cores, the median is theirs. Keys are spread over a cache larger than the
processor's own, as the layers of a model are: each call reads another layer.
"""

import argparse
import random
import statistics
from collections.abc import Sequence
from time import perf_counter_ns

import torch

from tpinfer.attention.interface import AttentionCall, HeadLayout, SequenceSpan
from tpinfer.attention.native_decode import load_native_attention
from tpinfer.attention.paged_kv import BlockTable, PagedKV, key_range
from tpinfer.attention.reference import bind_attention
from tpinfer.config.dtypes import DType
from tpinfer.config.kv_cache import kv_vector_bytes
from tpinfer.numerics.torch_dtypes import to_torch
from tpinfer.sharding.kv_layout import KVLayout

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK, NUM_LAYERS = 16, 8, 128, 16, 4
CONTEXTS = {"16..144": (16, 144), "1..1024": (1, 1024)}
DTYPES = (DType.BFLOAT16, DType.FLOAT32, DType.INT8, DType.FLOAT8_E4M3)
CALLS = 24


def spans_of(contexts: Sequence[int], layout: KVLayout) -> list[SequenceSpan]:
    """One decode row per context, its blocks adjoining."""
    spans, used = [], 0
    for row, context in enumerate(contexts):
        count = -(-context // BLOCK)
        table = BlockTable(list(range(used, used + count)))
        used += count
        keys = key_range(table, 0, context, layout)
        spans.append(SequenceSpan(row, 1, context, keys, None))
    return spans


def times_us(
    attend: AttentionCall, kv: PagedKV, spans: list[SequenceSpan], dtype: DType
) -> list[float]:
    """Of calls of one layer each."""
    query = torch.randn(len(spans), NUM_HEADS, HEAD_DIM).to(to_torch(dtype))
    took = []
    for call in range(CALLS):
        layer = kv.layer(call % NUM_LAYERS)
        began = perf_counter_ns()
        attend(query, layer, spans)
        took.append(perf_counter_ns() - began)
    return [ns / 1e3 for ns in took[NUM_LAYERS:]]


def main() -> None:
    """Print one line a case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["torch", "native"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    native, reason = load_native_attention(args.threads, list(map(to_torch, DTYPES)))
    print(f"compiled kernel: {reason}; {args.rows} rows, {args.threads} threads")
    layout_heads = HeadLayout(NUM_HEADS, NUM_KV_HEADS, NUM_HEADS // NUM_KV_HEADS, 0)
    backends = {"torch": bind_attention}
    if native is not None:
        backends["native"] = native.bind_attention
    draw = random.Random(1)
    for name, (shortest, longest) in CONTEXTS.items():
        contexts = [draw.randint(shortest, longest) for _ in range(args.rows)]
        layout = KVLayout(BLOCK, sum(-(-context // BLOCK) for context in contexts))
        spans = spans_of(contexts, layout)
        for compute, stored in (
            (DType.BFLOAT16, DType.BFLOAT16),
            (DType.FLOAT32, DType.FLOAT32),
            (DType.BFLOAT16, DType.INT8),
            (DType.BFLOAT16, DType.FLOAT8_E4M3),
        ):
            kv = PagedKV(NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, layout, stored, torch.device("cpu"))
            filler = torch.randn(kv.values_L2KSD.shape).to(torch.bfloat16)
            kv.values_L2KSD.copy_(filler.clamp(-2, 2) * 20 if stored.num_bytes == 1 else filler)
            if kv.scales_L2KS is not None:
                kv.scales_L2KS.fill_(0.02)
            read = sum(contexts) * 2 * NUM_KV_HEADS * kv_vector_bytes(HEAD_DIM, stored)
            for backend, bind in backends.items():
                if args.only in (None, backend):
                    times = times_us(bind(layout_heads, HEAD_DIM, None), kv, spans, compute)
                    least = min(times)
                    print(
                        f"contexts {name:>7}  {compute.value:>8} over {stored.value:<13} "
                        f"{backend:<6} median {statistics.median(times):7.0f} least {least:7.0f} us"
                        f"  {read / 1e6:6.1f} MB  {read / least / 1e3:5.1f} GB/s"
                    )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
