"""Roles of kernels from their order: sequences of engines, and those that must not be read."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tpprof.classify.classify import classify_trace
from tpprof.classify.prices import CostSource
from tpprof.classify.roles import Roles, assign_roles
from tpprof.classify.rules import judge
from tpprof.readers.read import read_traces

from tests.traces.scenario import CEILINGS
from tpinfer.config.dtypes import DType
from tpinfer.config.model import ModelSpec

TRACES = Path(__file__).resolve().parents[2].parent / "shared" / "traces"
KERNELS = {
    "embed": "void at::native::vectorized_gather_kernel<16, long>(char*)",
    "norm": "void vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>(c10::BFloat16*)",
    "gemm": "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT",
    "split": "void cublasLt::splitKreduce_kernel<32, 16, int, float>()",
    "rope": "void vllm::rotary_embedding_kernel<c10::BFloat16, true>(long const*)",
    "kv": "void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16>()",
    "attn": "void cutlass::device_kernel<flash::FlashAttnFwdSm90<>>()",
    "attn2": "void flashinfer::BatchDecodeWithPagedKVCacheKernel<2u, 8u>()",
    "merge": "void cutlass::device_kernel<flash::FlashAttnFwdCombine<>>()",
    "plan": "flash::prepare_varlen_num_blocks_kernel(int, int)",
    "reduce": "void vllm::cross_device_reduce_1stage<__nv_bfloat16, 2>(vllm::RankData*)",
    "fused": "void aiter::allreduce_fusion_kernel_1stage<__hip_bfloat16, 8>()",
    "act": "void vllm::act_and_mul_kernel<c10::BFloat16, &vllm::silu_kernel>()",
    "add": "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>()",
    "quant": "void vllm::scaled_fp8_quant_kernel_strided<c10::BFloat16>()",
    "scatter": "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
    "gather": "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
    "sample": "void flashinfer::sampling::TopKTopPSamplingFromProbKernel<1024u>(float*)",
    "moe": "fused_moe_kernel",
    "normed": "one_row_normed",
    "added": "one_row_added",
    "gated": "one_row_gated",
    "odd": "some_kernel_nobody_knows",
}
PLAIN = "norm gemm rope kv attn gemm norm gemm act gemm"


def read(kernels: Sequence[str], num_layers: int) -> Roles:
    names = [KERNELS[kernel] for kernel in kernels]
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return assign_roles([numbers[name] for name in names], judge(names), num_layers)


def model(layer: str, num_layers: int = 4, before: str = "embed", behind: str = "norm gemm") -> str:
    return " ".join([before, *[layer] * num_layers, behind]).strip()


def of_layer(found: Roles, kernels: Sequence[str], layer: int) -> list[tuple[str, str]]:
    """(kernel, op within the layer) of one layer, in order."""
    return [
        (kernel, key.removeprefix(f"layers.{layer}."))
        for kernel, key, where in zip(kernels, found.keys, found.layers, strict=True)
        if where == layer
    ]


LAYERS = {
    "one rank": (
        PLAIN,
        "attn.norm attn.qkv attn.rope attn.rope attn.core attn.out mlp.norm mlp.gate_up mlp.act "
        "mlp.down",
    ),
    "reduces": (
        "norm gemm rope kv attn gemm reduce norm gemm act gemm reduce",
        "attn.norm attn.qkv attn.rope attn.rope attn.core attn.out attn.reduce mlp.norm "
        "mlp.gate_up mlp.act mlp.down mlp.reduce",
    ),
    "split products": (
        "norm gemm split rope kv attn merge gemm split norm gemm split act gemm split",
        "attn.norm attn.qkv attn.qkv attn.rope attn.rope attn.core attn.core attn.out attn.out "
        "mlp.norm mlp.gate_up mlp.gate_up mlp.act mlp.down mlp.down",
    ),
    "separate q, k and v with their biases": (
        "norm gemm add gemm add gemm add rope kv attn gemm norm gemm gemm act add gemm",
        "attn.norm attn.qkv attn.rope attn.qkv attn.rope attn.qkv attn.rope attn.rope attn.rope "
        "attn.core attn.out mlp.norm mlp.gate_up mlp.gate_up mlp.act mlp.act mlp.down",
    ),
    "QK norm": (
        "norm gemm norm norm rope kv attn gemm norm gemm act gemm",
        "attn.norm attn.qkv attn.rope attn.rope attn.rope attn.rope attn.core attn.out mlp.norm "
        "mlp.gate_up mlp.act mlp.down",
    ),
    "quantized products": (
        "norm quant gemm rope kv attn quant gemm norm quant gemm act quant gemm",
        "attn.norm . attn.qkv attn.rope attn.rope attn.core . attn.out mlp.norm . mlp.gate_up "
        "mlp.act . mlp.down",
    ),
    "plan in each layer": (
        "norm gemm rope kv plan attn gemm norm gemm act gemm",
        "attn.norm attn.qkv attn.rope attn.rope attn.rope attn.core attn.out mlp.norm mlp.gate_up "
        "mlp.act mlp.down",
    ),
    "reduce-scatter and all-gather": (
        "norm gemm rope kv attn gemm scatter norm gather gemm act gemm scatter",
        "attn.norm attn.qkv attn.rope attn.rope attn.core attn.out attn.reduce mlp.norm "
        "attn.reduce mlp.gate_up mlp.act mlp.down mlp.reduce",
    ),
    "activation inside a product": (
        "norm gemm rope kv attn gemm norm gemm gemm",
        "attn.norm attn.qkv attn.rope attn.rope attn.core attn.out mlp.norm mlp.gate_up mlp.down",
    ),
    "norms, additions and gates inside own products": (
        "normed rope attn added gated added",
        "attn.qkv attn.rope attn.core attn.out mlp.gate_up mlp.down",
    ),
    "gate_up by another": (
        "normed rope attn added norm gemm act added",
        "attn.qkv attn.rope attn.core attn.out mlp.norm mlp.gate_up mlp.act mlp.down",
    ),
    "out and down by another": (
        "normed rope attn gemm norm gated gemm",
        "attn.qkv attn.rope attn.core attn.out mlp.norm mlp.gate_up mlp.down",
    ),
    "qkv by another": (
        "norm gemm rope attn added gated added",
        "attn.norm attn.qkv attn.rope attn.core attn.out mlp.gate_up mlp.down",
    ),
    "gates inside products of one of several ranks": (
        "norm gemm rope attn gemm reduce norm gated gemm reduce",
        "attn.norm attn.qkv attn.rope attn.core attn.out attn.reduce mlp.norm mlp.gate_up "
        "mlp.down mlp.reduce",
    ),
    "unknown kernels": (
        "norm gemm odd attn gemm odd norm gemm act gemm",
        "attn.norm attn.qkv attn.rope attn.core attn.out . mlp.norm mlp.gate_up mlp.act mlp.down",
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_every_kernel_of_a_layer(name: str, num_layers: int) -> None:
    layer, ops = LAYERS[name]
    kernels = model(layer, num_layers).split()
    found = read(kernels, num_layers)
    assert found.reason == ""
    expected = [(k, op.strip(".")) for k, op in zip(layer.split(), ops.split(), strict=True)]
    first = 0 if num_layers > 1 or "q, k" not in name else 1
    for number in range(first, num_layers):
        assert of_layer(found, kernels, number) == expected, number
    assert (found.keys[0], found.layers[0]) == ("embed", -1)
    assert (found.keys[-2:], found.layers[-2:]) == (["final_norm", "head"], [-1, -1])


def test_reduces_fused_with_the_norm_behind_them() -> None:
    """The first layer's norm stands alone, or is fused to the reduce of the embedding."""
    layer = "gemm rope kv attn gemm fused gemm act gemm fused"
    for before, keys in (("embed norm", ["embed", "layers.0.attn.norm"]),
                         ("embed fused", ["embed", "embed.reduce"])):  # fmt: skip
        kernels = model(layer, 3, before, "gemm gather sample").split()
        found = read(kernels, 3)
        assert found.reason == "" and found.num_reduces == 3
        assert found.keys[:2] == keys
        ops = [op for _, op in of_layer(found, kernels, 1)]
        assert " ".join(ops) == (
            "attn.qkv attn.rope attn.rope attn.core attn.out attn.reduce mlp.gate_up mlp.act "
            "mlp.down mlp.reduce"
        )
        assert found.keys[-3:] == ["head", "head.gather", "sample"]


def test_what_comes_before_and_behind_the_layers() -> None:
    """Left-overs of the step before, metadata, and a sampler."""
    kernels = model(
        PLAIN, 3, "sample gemm odd plan add embed reduce", "norm add gemm add sample odd"
    )
    found = read(kernels.split(), 3)
    assert found.keys[:8] == ["", "", "", "", "", "embed", "embed.reduce", "layers.0.attn.norm"]
    assert found.layers[:8] == [-1] * 7 + [0]
    assert found.keys[-6:] == ["final_norm", "", "head", "sample", "sample", ""]
    assert found.layers[-6:] == [-1] * 6


@pytest.mark.parametrize("every", [2, 3, 6])
def test_layers_that_alternate(every: int) -> None:
    full = PLAIN.replace("attn", "attn2 merge")
    layers = [full if i % every == every - 1 else PLAIN for i in range(12)]
    kernels = " ".join(["embed", *layers, "norm gemm"]).split()
    found = read(kernels, 12)
    assert found.reason == ""
    counts = Counter(key.split(".", 2)[2] for key in found.keys if key.startswith("layers."))
    assert counts["attn.qkv"] == counts["mlp.down"] == counts["attn.norm"] == 12
    assert counts["attn.core"] == 12 + 12 // every


UNLIKE = ("add", "odd", "quant", "sample", "embed", "kv", "rope")
REFUSED = {
    "a layer too many": (model(PLAIN, 5), 4, "5 attention calls were found and the model has 4"),
    "half a step": (model(PLAIN, 2), 4, "2 attention calls were found"),
    "nothing": ("", 4, "0 attention calls"),
    "no attention": (model("norm gemm act gemm", 4), 4, "0 attention calls"),
    "no layers asked for": (model(PLAIN, 2), 0, "2 attention calls"),
    "experts": (model(PLAIN.replace("act gemm", "moe"), 4), 4, "expert layers"),
    "layers unlike each other": (
        " ".join([*(f"{PLAIN}{f' {odd}' * 12}" for odd in UNLIKE), "norm gemm"]),
        len(UNLIKE),
        "do not repeat",
    ),
    "no norms": (model(PLAIN.replace("norm ", ""), 4), 4, "was recognised in"),
    "no products": (model("norm rope attn gemm norm act", 4), 4, "was recognised in 0 of 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_the_reason(name: str) -> None:
    kernels, num_layers, reason = REFUSED[name]
    found = read(kernels.split(), num_layers)
    assert reason in found.reason
    assert found.keys == [] and found.layers == []


@given(st.lists(st.sampled_from(sorted(KERNELS)), max_size=60), st.integers(0, 6))
def test_any_sequence_is_read_or_refused(kernels: list[str], num_layers: int) -> None:
    found = read(kernels, num_layers)
    if found.reason:
        assert not found.keys
    else:
        assert len(found.keys) == len(found.layers) == len(kernels)
        assert set(found.layers) <= {-1, *range(num_layers)}


@given(st.data(), st.sampled_from(sorted(LAYERS)), st.integers(3, 8))
def test_a_stray_kernel_does_not_shift_the_others(
    draw: st.DataObject, name: str, num_layers: int
) -> None:
    layer, _ = LAYERS[name]
    kernels = model(layer, num_layers).split()
    place = draw.draw(st.integers(1, len(kernels) - 1))
    before = read(kernels, num_layers)
    after = read([*kernels[:place], "odd", *kernels[place:]], num_layers)
    assert after.reason == ""
    assert after.keys[:place] + after.keys[place + 1 :] == before.keys
    assert after.layers[:place] + after.layers[place + 1 :] == before.layers


QWEN3_8B = ModelSpec(
    architecture="Qwen3ForCausalLM", num_layers=36, hidden_size=4096, intermediate_size=12288,
    num_heads=32, num_kv_heads=8, head_dim=128, vocab_size=151936, max_position=40960,
    rms_norm_eps=1e-6, rope_theta=1e6, dtype=DType.BFLOAT16, qk_norm=True,
)  # fmt: skip


@pytest.mark.skipif(not TRACES.is_dir(), reason="public traces are not here")
def test_a_recorded_replay_of_qwen3_8b() -> None:
    [trace] = read_traces([TRACES / "sglang_decode_mi300.json.gz"])
    work = classify_trace(trace, CEILINGS, CostSource(spec=QWEN3_8B))
    launches = trace.launch[work.row]
    in_graph = [launch >= 0 and "GraphLaunch" in trace.text(launch) for launch in launches.tolist()]
    assert sum(in_graph) == 544
    assert set(work.layer[in_graph].tolist()) == {-1, *range(36)}
    assert (work.layer[in_graph] >= 0).mean() >= 0.95
    assert (work.flops[in_graph] >= 0).all()
    keys = Counter(work.keys[key] for key in work.key[in_graph].tolist())
    for layer in (0, 17, 35):
        for op, count in [("attn.qkv", 1), ("attn.rope", 6), ("attn.core", 2), ("attn.out", 1),
                          ("mlp.gate_up", 1), ("mlp.act", 1), ("mlp.down", 1)]:  # fmt: skip
            assert keys[f"layers.{layer}.{op}"] == count
    # 32 rows, 32785 tokens of context: FLOPs by hand.
    by_op = {op: int(work.flops[work.key == work.keys.index(op)].sum()) for op in keys}
    assert by_op["layers.3.mlp.gate_up"] == 2 * 32 * 4096 * 2 * 12288
    assert by_op["layers.3.attn.core"] == 4 * 32785 * 32 * 128
    assert by_op["head"] == 2 * 32 * 4096 * 151936
    assert not any("were not read" in text for text in work.warnings)


@pytest.mark.skipif(not TRACES.is_dir(), reason="public traces are not here")
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (CostSource(spec=QWEN3_8B, tp=2), "collectives were found in 0 of 36 layers"),
        (
            CostSource(spec=replace(QWEN3_8B, num_layers=32)),
            "36 attention calls were found and the model has 32 layers",
        ),
    ],
)  # fmt: skip
def test_a_recorded_replay_of_another_model_is_refused(source: CostSource, reason: str) -> None:
    [trace] = read_traces([TRACES / "sglang_decode_mi300.json.gz"])
    work = classify_trace(trace, CEILINGS, source)
    [told] = [text for text in work.warnings if "were not read" in text]
    assert reason in told
    assert (work.layer >= 0).sum() == 0
