"""Cases of `test_triton_attention`, one per process: python -m tests.cpu.triton_attention_program
CASE [DEVICE]. On a GPU the compiler runs them, else Triton's interpreter."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tests.cpu.triton_interpreter import interpret

CASE, PLACE = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "cpu"
if CASE != "compiled" and PLACE == "cpu":
    interpret()

import torch  # noqa: E402

from tpinfer.attention.interface import HeadLayout, SequenceSpan, StepSpans  # noqa: E402
from tpinfer.attention.load_triton import load_triton_attention  # noqa: E402
from tpinfer.attention.paged_kv import BlockTable, LayerKV, PagedKV, key_range  # noqa: E402
from tpinfer.attention.reference import ReferenceAttention  # noqa: E402
from tpinfer.attention.triton_attention import TritonAttention, prefill_rows  # noqa: E402
from tpinfer.config.dtypes import DType  # noqa: E402
from tpinfer.layers.attention import merge_parts  # noqa: E402
from tpinfer.numerics.torch_dtypes import to_torch  # noqa: E402
from tpinfer.sharding.kv_layout import KVLayout  # noqa: E402
from tpinfer.worker.paged_rows import PagedRows  # noqa: E402

DEVICE = torch.device(PLACE)
BLOCK, NUM_BLOCKS, LONGEST = 16, 90, 700
WHOLE = HeadLayout(8, 2, 4, 0)
SHARED_BYTES = 232448
"""Shared memory that a block may have on sm_90: 227 KiB (CUDA C++ Programming Guide, compute
capabilities)."""
TOLERANCE = {DType.FLOAT32: 2e-5, DType.BFLOAT16: 2e-2, DType.FLOAT16: 3e-3}


@dataclass(frozen=True)
class Step:
    """Queries, a cache and where its keys lie."""

    query: torch.Tensor
    cache: LayerKV
    spans: StepSpans
    layout: KVLayout


def make_step(
    sizes: Sequence[tuple[int, int]], heads: HeadLayout = WHOLE, head_dim: int = 64,
    dtype: DType = DType.FLOAT32, kv_dtype: DType | None = None, window: int | None = None,
    layout: KVLayout | None = None,
) -> Step:  # fmt: skip
    """sizes: (query tokens, context) of each sequence. Blocks are scattered."""
    torch.manual_seed(sum(map(sum, sizes)))
    layout = layout or KVLayout(BLOCK, NUM_BLOCKS)
    group = layout.group_size
    kv = PagedKV(1, heads.num_kv_heads, head_dim, layout, kv_dtype or dtype, DEVICE)
    for tensor in kv.tensors():
        tensor.zero_()
    cache, compute = kv.layer(0), to_torch(dtype)
    free = torch.randperm(NUM_BLOCKS // group).tolist()
    rows = PagedRows(len(sizes) + 3, LONGEST, layout, DEVICE)
    spans: list[SequenceSpan] = []
    first = 0
    for place, (num_tokens, context) in enumerate(sizes):
        count = -(-context // BLOCK)
        blocks = [free.pop() * group + j % group for j in range(count)]
        table, row = BlockTable(blocks), place + 2
        rows.append(row, 0, blocks)
        # The same keys on every rank that shares them: each writes those of its blocks.
        generator = torch.Generator().manual_seed(place)
        fresh = torch.randn(context, 2, heads.num_kv_heads, head_dim, generator=generator)
        slots = torch.tensor(table.slots(0, context, layout), device=DEVICE)
        cache.write(slots.long(), fresh.to(DEVICE, compute))
        low = max(0, context - num_tokens - (window or 0) + 1)
        spans.append(
            SequenceSpan(
                first, num_tokens, context, key_range(table, 0, context, layout),
                None if window is None else key_range(table, low, context, layout),
            )
        )  # fmt: skip
        first += num_tokens
    starts = [*(span.first_token for span in spans), first]
    columns = rows.columns(
        [place + 2 for place in range(len(sizes))], starts, [span.context_len for span in spans]
    )
    placed = [torch.tensor(column, dtype=torch.int64, device=DEVICE) for column in columns]
    rows.place_sequences(placed[:3])
    rows.place_tables(*placed[3:])
    paged = rows.spans(len(sizes), max(n for n, _ in sizes), max(c for _, c in sizes))
    # As qkv lies: other columns between the tokens' queries.
    generator = torch.Generator().manual_seed(99)
    wide = torch.randn(first, (heads.num_heads + 2) * head_dim, generator=generator).to(
        DEVICE, compute
    )
    query = wide[:, : heads.num_heads * head_dim].unflatten(1, (heads.num_heads, head_dim))
    return Step(query, cache, StepSpans(spans, paged), layout)


def agree(
    step: Step, heads: HeadLayout, window: int | None, tolerance: float, *,
    batch_invariant: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The kernel's output, having been compared with plain torch."""
    head_dim = step.cache.head_dim
    backend = TritonAttention(step.layout, DEVICE, batch_invariant=batch_invariant)
    found = backend.bind_attention(heads, head_dim, window)(step.query, step.cache, step.spans)
    plain = ReferenceAttention().bind_attention(heads, head_dim, window)
    exact = plain(step.query.float(), step.cache, step.spans)
    torch.testing.assert_close(found.float(), exact, atol=tolerance, rtol=tolerance)
    return found


def decode() -> None:
    sizes = [(1, 1), (1, 15), (1, 16), (1, 17), (1, 300), (1, 65)]
    for dtype, tolerance in TOLERANCE.items():
        agree(make_step(sizes, dtype=dtype), WHOLE, None, tolerance)
    for head_dim in (80, 96, 128, 256):
        agree(make_step(sizes[3:], head_dim=head_dim), WHOLE, None, 2e-5)
    agree(make_step([(1, 600)]), WHOLE, None, 2e-5)
    agree(make_step([(3, 100), (1, 7), (8, 8)]), WHOLE, None, 2e-5)
    several = make_step(sizes)
    whole = agree(several, WHOLE, None, 2e-5, batch_invariant=True)
    for place, span in enumerate(several.spans.sequences):
        paged = several.spans.paged
        assert paged is not None
        alone = replace(
            paged, rows_S=paged.rows_S[place : place + 1],
            first_tokens_S1=torch.tensor([0, 1], dtype=torch.int32, device=DEVICE),
            context_lens_S=paged.context_lens_S[place : place + 1], num_sequences=1,
            max_context_len=span.context_len,
        )  # fmt: skip
        backend = TritonAttention(several.layout, DEVICE, batch_invariant=True)
        query = several.query[place : place + 1]
        one = backend.bind_attention(WHOLE, 64, None)(query, several.cache, StepSpans((), alone))
        assert torch.equal(one, whole[place : place + 1]), "its company changed its bits"


def prefill() -> None:
    for dtype, tolerance in TOLERANCE.items():
        agree(make_step([(33, 33), (9, 150)], dtype=dtype), WHOLE, None, tolerance)
    agree(make_step([(130, 130), (20, 21), (64, 64)]), WHOLE, None, 2e-5)
    agree(make_step([(40, 50)], head_dim=256), WHOLE, None, 2e-5)
    agree(make_step([(40, 100)], HeadLayout(3, 1, 3, 0), 128), HeadLayout(3, 1, 3, 0), None, 2e-5)


def mixed() -> None:
    sizes = [(1, 40), (17, 60), (1, 1), (8, 90), (70, 70), (1, 129)]
    agree(make_step(sizes), WHOLE, None, 2e-5)


def uneven() -> None:
    for heads in (HeadLayout(5, 2, 3, 0), HeadLayout(4, 2, 3, 2), HeadLayout(1, 1, 4, 2)):
        agree(make_step([(1, 50), (12, 30), (1, 3)], heads), heads, None, 2e-5)


def window() -> None:
    for size in (5, 16, 33):
        step = make_step([(1, 200), (1, 4), (20, 90), (40, 40)], window=size)
        agree(step, WHOLE, size, 2e-5)
    agree(make_step([(1, 200), (1, 20)], window=33), WHOLE, 33, 2e-5)


def eight_bits() -> None:
    sizes = [(1, 100), (1, 16), (20, 50)]
    for stored in (DType.INT8, DType.FLOAT8_E4M3):
        agree(make_step(sizes, kv_dtype=stored), WHOLE, None, 3e-5)
        agree(make_step(sizes, dtype=DType.BFLOAT16, kv_dtype=stored), WHOLE, None, 2e-2)


def parts() -> None:
    heads = HeadLayout(8, 1, 8, 0)
    for size in (2, 3):
        sizes = [(1, 5), (1, 16), (1, 170), (30, 60), (1, 33)]
        found, reference = [], []
        for place in range(size):
            layout = KVLayout(BLOCK, NUM_BLOCKS, size, place)
            step = make_step(sizes, heads, layout=layout)
            for backend, results in (
                (TritonAttention(layout, DEVICE), found), (ReferenceAttention(), reference)
            ):  # fmt: skip
                call = backend.bind_partial_attention(heads, 64, None)
                out, lse = call(step.query, step.cache, step.spans)
                results.append(torch.cat((out, lse.unsqueeze(-1)), -1))
        for mine, other in zip(found, reference, strict=True):
            torch.testing.assert_close(mine, other, atol=2e-5, rtol=2e-5)
            assert (mine[0, :, -1] == float("-inf")).all() == (
                other[0, :, -1] == float("-inf")
            ).all()
        whole = agree(make_step(sizes, heads), heads, None, 2e-5)
        torch.testing.assert_close(merge_parts(torch.stack(found)), whole, atol=2e-5, rtol=2e-5)


def padding() -> None:
    step = make_step([(1, 40), (1, 9)])
    paged = step.spans.paged
    assert paged is not None
    alone = agree(step, WHOLE, None, 2e-5)
    padded = replace(
        paged, num_sequences=4,
        rows_S=torch.tensor([2, 3, 0, 0], dtype=torch.int32, device=DEVICE),
        first_tokens_S1=torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32, device=DEVICE),
        context_lens_S=torch.tensor([40, 9, 0, 0], dtype=torch.int32, device=DEVICE),
    )  # fmt: skip
    query = torch.cat((step.query, torch.full((2, 8, 64), float("nan"), device=DEVICE)))
    call = TritonAttention(step.layout, DEVICE).bind_attention(WHOLE, 64, None)
    found = call(query, step.cache, StepSpans((), padded))
    torch.testing.assert_close(found[:2], alone, atol=1e-6, rtol=1e-6)
    assert not found[2:].any(), "padding attends to nothing"
    empty = replace(paged, num_sequences=0)
    assert call(query[:0], step.cache, StepSpans((), empty)).shape == (0, 8, 64)


def replayed() -> None:
    """The counters of split sequences are back at 0 behind every launch, whatever the lengths."""
    step = make_step([(1, 600)])
    backend = TritonAttention(step.layout, DEVICE)
    call = backend.bind_attention(WHOLE, 64, None)
    first = call(step.query, step.cache, step.spans)
    paged = step.spans.paged
    assert paged is not None
    for context in (600, 100, 1, 600):
        paged.context_lens_S[0] = context
        found = call(step.query, step.cache, step.spans)
        assert torch.equal(found, first) == (context == 600)


def loading() -> None:
    """A kernel is used where it computes what plain torch does, and only there."""
    layout, dtypes = KVLayout(BLOCK, 0), (DType.FLOAT32, DType.FLOAT32)
    found, why = load_triton_attention(layout, DEVICE, *dtypes, batch_invariant=True)
    assert isinstance(found, TritonAttention), why
    assert "do not depend on their batch" in why
    run = TritonAttention._run
    try:
        TritonAttention._run = lambda self, bound, *_: bound.out.zero_()  # pyright: ignore
        assert "off by" in load_triton_attention(layout, DEVICE, *dtypes, batch_invariant=False)[1]
        TritonAttention._run = lambda self, *_: 1 / 0  # pyright: ignore
        found, why = load_triton_attention(layout, DEVICE, *dtypes, batch_invariant=False)
        assert found is None
        assert "does not run here: division by zero" in why
    finally:
        TritonAttention._run = run


def compiled() -> None:
    """For sm_90, without one: what the interpreter forgives the compiler does not."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tpinfer.attention.triton_paged import paged_attention

    names = paged_attention.arg_names
    widest = prefill_rows(256, torch.float32) // 4, prefill_rows(256, torch.bfloat16) // 4
    for dtype, stored, tokens, splits, lse, head_dim in (
        ("bf16", "bf16", 1, 8, False, 128), ("fp16", "fp16", 32, 1, True, 128),
        ("fp32", "fp32", 2, 4, True, 128), ("bf16", "i8", 1, 8, False, 128),
        ("bf16", "u8", 1, 1, False, 128), ("fp32", "fp32", widest[0], 1, False, 256),
        ("bf16", "bf16", widest[1], 1, False, 256),
    ):  # fmt: skip
        pointers = {
            **dict.fromkeys(("query_THD", "out_THD"), f"*{dtype}"), "values_2KSD": f"*{stored}",
            **dict.fromkeys(("lse_TH", "scales_2KS", "partial_out", "partial_lse"), "*fp32"),
            **dict.fromkeys(
                ("tables_RB", "rows_S", "first_tokens_S1", "context_lens_S", "arrived"), "*i32"
            ),
        }  # fmt: skip
        constants = {
            "GROUP": 1, "PLACE": 0, "BLOCK": 16, "D": head_dim, "G": 4, "TOKENS": tokens,
            "M": max(16, tokens * 4), "N": 64, "D_PADDED": head_dim, "NUM_SPLITS": splits,
            "MERGED": min(splits, 4),
            "STORED": {"i8": 1, "u8": 2}.get(stored, 0), "SLIDES": lse, "HAS_LSE": lse,
            "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        }  # fmt: skip
        signature = {
            name: "constexpr" if name in constants
            else pointers.get(name, "fp32" if name == "scale_log2" else "i32")
            for name in names
        }  # fmt: skip
        source = ASTSource(paged_attention, signature, constexprs=constants)
        stages = 2 if dtype == "fp32" else 3
        options = {"num_warps": 8 if tokens > 2 else 4, "num_stages": stages}
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert made.asm["cubin"], "no machine code"
        assert made.metadata.shared <= SHARED_BYTES, f"{dtype}, {head_dim}: does not fit"


if __name__ == "__main__":
    globals()[CASE]()
    print(f"{CASE} agrees")
