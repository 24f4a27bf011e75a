"""Cases of `test_triton_layers`, one per process: python -m tests.cpu.triton_layers_program
CASE."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

from tests.cpu.triton_interpreter import interpret

CASE = sys.argv[1]
if CASE != "compiled":
    interpret()

import torch  # noqa: E402

from tpinfer.attention.paged_kv import LayerKV, PagedKV  # noqa: E402
from tpinfer.config.dtypes import DType  # noqa: E402
from tpinfer.decoding.load_triton import load_triton_passes  # noqa: E402
from tpinfer.decoding.triton_passes import TritonPasses, best_of_chunks  # noqa: E402
from tpinfer.decoding.vocab_passes import TorchPasses  # noqa: E402
from tpinfer.layers.layer_ops import TorchLayerOps  # noqa: E402
from tpinfer.layers.load_triton import load_triton_layers  # noqa: E402
from tpinfer.layers.product_tiles import MOST_ROWS, TILES  # noqa: E402
from tpinfer.layers.skinny import SkinnyMatMul  # noqa: E402
from tpinfer.layers.step_inputs import Activations  # noqa: E402
from tpinfer.layers.triton_norm import add_norm, gate_rows, norm_rows  # noqa: E402
from tpinfer.layers.triton_ops import TritonLayerOps  # noqa: E402
from tpinfer.layers.triton_rope import rotate_and_write  # noqa: E402
from tpinfer.numerics.row_quantize import dequantize_rows  # noqa: E402
from tpinfer.sharding.kv_layout import KVLayout  # noqa: E402

CPU = torch.device("cpu")
PLAIN, FUSED = TorchLayerOps({}), TritonLayerOps({})
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
"""Two roundings of the dtype, relative."""


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise where they differ by more than the dtype explains."""
    limit = TOLERANCE[expected.dtype]
    assert found.dtype is expected.dtype
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)


def norms() -> None:
    for dtype in TOLERANCE:
        for rows, width in ((1, 64), (4, 72), (17, 96), (2, 1000), (0, 64)):
            draw = torch.Generator().manual_seed(width)
            residual, delta = (torch.randn(rows, width, generator=draw).to(dtype) for _ in range(2))
            weight = torch.randn(width, generator=draw).to(dtype)
            step: Any = SimpleNamespace(logit_rows=torch.arange(rows - 1, -1, -2))
            for adds in (False, True):
                both = []
                for ops in (PLAIN, FUSED):
                    acts = Activations()
                    acts.residual, acts.delta = residual.clone(), delta.clone()
                    ops.bind_norm(weight, 1e-5, adds_delta=adds)(acts, step)
                    if ops is FUSED and rows == 1 and not adds:  # the product's to do
                        deferred = acts.deferred
                        assert deferred is not None and deferred[0] is weight
                        acts.hidden = add_norm(acts.residual, None, *deferred)
                    hidden = acts.hidden
                    ops.bind_final_norm(weight, 1e-5)(acts, step)
                    both.append((acts.residual, hidden, acts.hidden))
                if dtype is torch.bfloat16:  # which the interpreter cuts off
                    close(both[1][0], both[0][0])
                else:
                    assert torch.equal(both[0][0], both[1][0]), "the sum is rounded as torch's is"
                close(both[1][1], both[0][1])
                close(both[1][2], both[0][2])
            acts = Activations()
            acts.normed = True
            for ops in (PLAIN, FUSED):
                acts.normed = True
                ops.bind_norm(weight, 1e-5, adds_delta=True)(acts, step)
                assert not acts.normed and not hasattr(acts, "hidden")


def activation() -> None:
    for dtype in TOLERANCE:
        for rows, width in ((1, 8), (16, 129), (3, 1500), (0, 4)):
            draw = torch.Generator().manual_seed(width)
            both, nothing = [], cast("Any", None)
            gate_up = (4 * torch.randn(rows, 2 * width, generator=draw)).to(dtype)
            for ops in (PLAIN, FUSED):
                acts = Activations()
                acts.gate_up = gate_up.clone()
                ops.bind_activation()(acts, nothing)
                both.append(acts.gated)
            close(both[1], both[0])


def rope() -> None:
    shapes = ((1, 4, 2, 16), (5, 3, 1, 80), (2, 1, 2, 128))
    stored = {
        torch.float32: (DType.FLOAT32, DType.INT8, DType.FLOAT8_E4M3),
        torch.bfloat16: (DType.BFLOAT16, DType.INT8, DType.FLOAT8_E4M3),
        torch.float16: (DType.FLOAT16, DType.FLOAT32),
    }
    for dtype, kinds in stored.items():
        for kind in kinds:
            for has_norm in (False, True):
                for shape in shapes:
                    one_rope(dtype, kind, shape, has_norm=has_norm)


def one_rope(
    dtype: torch.dtype, kind: DType, shape: tuple[int, int, int, int], *, has_norm: bool
) -> None:
    """Both ways into caches of their own."""
    tokens, heads, kv_heads, dim = shape
    draw = torch.Generator().manual_seed(sum(shape))
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=draw).to(dtype)
    qkv[0, -dim:] = 0.0
    if kind.num_bytes == 1 and tokens > 1:
        qkv[1, -1] = float("inf")
    angles = torch.rand(tokens, 1, dim, generator=draw)
    slots = torch.randperm(64, generator=draw)[:tokens]
    step: Any = SimpleNamespace(cos=angles.cos().to(dtype), sin=angles.sin().to(dtype), slots=slots)
    weights = None
    if has_norm:
        drawn = torch.rand(2, dim, generator=draw).to(dtype)
        weights = drawn[0], drawn[1]
    both: list[tuple[torch.Tensor, LayerKV]] = []
    for ops in (PLAIN, FUSED):
        cache = PagedKV(1, kv_heads, dim, KVLayout(16, 4), kind, CPU)
        for tensor in cache.tensors():
            tensor.zero_()
        acts = Activations()
        acts.qkv = qkv.clone()
        ops.bind_rope(cache.layer(0), heads, kv_heads, weights, 1e-6)(acts, step)
        both.append((acts.qkv, cache.layer(0)))
    close(both[1][0], both[0][0])
    kept, found = (layer for _, layer in both)
    if kept.scales_2KS is None or found.scales_2KS is None:
        assert torch.equal(kept.values_2KSD == 0, found.values_2KSD == 0)
        assert torch.allclose(
            kept.values_2KSD.float(), found.values_2KSD.float(), TOLERANCE[dtype], TOLERANCE[dtype]
        )
        return
    # Values are not rotated, so that their bytes and scales are torch's own.
    nan = kept.scales_2KS.isnan()
    assert torch.equal(nan, found.scales_2KS.isnan())
    assert torch.equal(kept.scales_2KS[1][~nan[1]], found.scales_2KS[1][~nan[1]])
    assert torch.equal(kept.values_2KSD[1], found.values_2KSD[1])
    torch.testing.assert_close(
        kept.scales_2KS[0], found.scales_2KS[0], rtol=2 * TOLERANCE[dtype], atol=1e-7
    )
    wide = [
        dequantize_rows(layer.values_2KSD.view(layer.dtype), scales, torch.float32)
        for layer, scales in ((kept, kept.scales_2KS), (found, found.scales_2KS))
    ]
    step_size = kept.scales_2KS.nan_to_num().unsqueeze(-1) * (1 if kind is DType.INT8 else 32)
    limit = 1.01 * step_size + 4 * TOLERANCE[dtype] * wide[0].abs().nan_to_num()
    assert ((wide[0] - wide[1]).abs().nan_to_num() <= limit).all()


def passes() -> None:
    plain, own = TorchPasses(), TritonPasses()
    draw = torch.Generator().manual_seed(1)
    for num_rows, width in ((1, 1), (3, 331), (2, 4096), (4, 9001)):
        logits = torch.randn(num_rows, width + 3, generator=draw)[:, 2 : 2 + width]
        for value in (0.0, -0.0, float("inf"), float("-inf"), float("nan")):
            logits[num_rows - 1, width // 2] = value
            for rows in (range(num_rows), [0], [0, num_rows - 1]):
                found = own.best_keys(logits, sorted(set(rows)), 11)
                assert torch.equal(found, plain.best_keys(logits, sorted(set(rows)), 11))
        logits[0] = 2.5  # ties go to the lowest id
        assert torch.equal(
            own.best_keys(logits, range(num_rows), 0), plain.best_keys(logits, range(num_rows), 0)
        )
        assert own.best_keys(logits[:0], [], 0).shape == (0, 1)


def loading() -> None:
    """What holds the kernels against torch before they are used."""
    for dtype, kind in ((DType.FLOAT32, DType.FLOAT32), (DType.BFLOAT16, DType.INT8)):
        ops, why = load_triton_layers({}, CPU, dtype, kind)
        assert isinstance(ops, TritonLayerOps), why
        passes, why = load_triton_passes(CPU)
        assert isinstance(passes, TritonPasses), why


def decoder() -> None:
    """The likeliest tokens of whole models in float32, behind each part of a prompt."""
    from tests.cpu import thread_ranks
    from tests.cpu.tiny_models import write_checkpoint
    from tpinfer.config.huggingface import read_model_spec
    from tpinfer.sharding.partition import partition_model
    from tpinfer.steps.plan import SamplingRecord, SequenceRecord, StepPlan

    def greedy(directory: Path) -> list[int]:
        partition = partition_model(read_model_spec(directory), 1, None, "replicated")
        exchange = thread_ranks.ThreadExchange(1)
        program, rows = thread_ranks.build_rank(directory, partition, 0, DType.FLOAT32, exchange)
        prompt = 5, 9, 200, 31, 77, 300, 12, 45, 8
        rows.admit(SequenceRecord(0, prompt, len(prompt), 0, SamplingRecord(0.0)))
        found = []
        for step in range(6):
            blocks = ((0, *range(thread_ranks.NUM_BLOCKS)),) if step == 0 else ()
            plan = StepPlan(step, (0,), (4 if step == 0 else 1,), (1,), blocks)
            found.append(int(thread_ranks.run_step(program, rows, plan).tokens[0]))
        return found

    with torch.inference_mode():
        for name in BINDS:
            with TemporaryDirectory() as folder:
                directory = write_checkpoint(name, Path(folder))
                expected = greedy(directory)
                held = thread_ranks.TorchLayerOps, thread_ranks.TorchPasses
                plain = thread_ranks.plain_matmul
                thread_ranks.TorchLayerOps, thread_ranks.TorchPasses = TritonLayerOps, TritonPasses
                for bind in BINDS[name]:
                    bind = bind or plain
                    thread_ranks.plain_matmul = bind
                    found = greedy(directory)
                    assert found == expected, (name, bind, found, expected)
                thread_ranks.TorchLayerOps, thread_ranks.TorchPasses = held
                thread_ranks.plain_matmul = plain


def _own_row(weight: torch.Tensor, bias: torch.Tensor | None) -> SkinnyMatMul:
    """A product whose single row takes the ops around it along."""
    return SkinnyMatMul(weight, bias, (None, TILES[1], *[None] * (MOST_ROWS - 1)), False)


def _own_rows(weight: torch.Tensor, bias: torch.Tensor | None) -> SkinnyMatMul:
    """A product whose rows take their gate along."""
    return SkinnyMatMul(weight, bias, (None, *[TILES[1]] * MOST_ROWS), False)


BINDS = {
    "llama-mqa-bias": (_own_row,), "qwen3-norms": (None, _own_rows), "llama-nine-heads": (_own_row,)
}  # fmt: skip
"""Products that each model is tried with; None for torch's."""


def compiled() -> None:
    """For sm_90, without one."""
    for dtype in ("bf16", "fp16", "fp32"):
        of = f"*{dtype}"
        rows = dict.fromkeys(("residual_ptr", "delta_ptr", "weight_ptr", "hidden_ptr"), of)
        rows |= {"rows_ptr": "*i64", "eps": "fp32"}
        for leads in (False, True):
            flags = {"ADDS": True, "KEEPS": True, "GATHERS": True, "LEADS": leads, "BLOCK": 4096}
            normed = compile_for_gpu(norm_rows, rows, flags, 8)
            flags = {"LEADS": leads, "BLOCK": 1024}
            gated = compile_for_gpu(gate_rows, {"gate_up_ptr": of, "gated_ptr": of}, flags, 4)
            for ptx in (normed, gated):
                assert ("griddepcontrol.launch_dependents" in ptx) == leads
                assert "griddepcontrol.wait" not in ptx, "launched when all is over in front of it"
        names = ("qkv_ptr", "cos_ptr", "sin_ptr", "q_norm_ptr", "k_norm_ptr")
        pointers = dict.fromkeys(names, of) | {"slots_ptr": "*i64", "eps": "fp32"}
        for kept in (dtype, "i8", "u8"):
            flags = {"HAS_NORM": True, "QUANTIZES": kept != dtype, "IS_INT8": kept == "i8",
                     "LARGEST": 127.0, "BLOCK": 64}  # fmt: skip
            held = {"values_ptr": f"*{kept}", "scales_ptr": "*fp32"}
            compile_for_gpu(rotate_and_write, pointers | held, flags, 1)
    flags = {"NAN": (1 << 63) - 1, "NONE": -(1 << 63), "BLOCK": 4096}
    compile_for_gpu(best_of_chunks, {"logits_ptr": "*fp32", "found_ptr": "*i64"}, flags, 4)


def compile_for_gpu(kernel, typed: dict[str, str], constants: dict, num_warps: int) -> str:
    """PTX of a kernel that has machine code; arguments that are not `typed` are int32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        name: "constexpr" if name in constants else typed.get(name, "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constexprs=constants)
    target = GPUTarget("cuda", 90, 32)
    made = triton.compile(source, target=target, options={"num_warps": num_warps})
    assert made.asm["cubin"], "no machine code"
    return made.asm["ptx"]


if __name__ == "__main__":
    globals()[CASE]()
    print(f"{CASE} agrees")
