"""How recorders spell what a simulated run did, for each engine whose traces are imitated."""

from tests.traces.kernels import DeviceWork
from tests.traces.scenario import Scenario
from tests.traces.simulate import HostRange

ENGINES = ("vllm", "sglang", "tpinfer")

_FLASH = (
    "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<"
    "flash::CollectiveMainloopFwdSm90<2, cute::tuple<cute::C<1>>, cute::bfloat16_t>>>>"
    "(flash::FlashAttnFwdSm90<>::Params)"
)
_NCCL = "ncclDevKernel_{}(ncclDevKernelArgsStorage<4096ul>)"
_CUSTOM_REDUCE = (
    "void vllm::cross_device_reduce_1stage<__nv_bfloat16, 2>(vllm::RankData*, vllm::RankSignals, "
    "vllm::Signal*, __nv_bfloat16*, int, int)"
)
_FUSED_REDUCE = (
    "void flashinfer::trtllm_allreduce_fusion::allreduce_fusion_kernel_oneshot_lamport<"
    "(flashinfer::trtllm_allreduce_fusion::AllReduceFusionPattern)1, __nv_bfloat16, 2>"
    "(flashinfer::trtllm_allreduce_fusion::AllReduceFusionParams<__nv_bfloat16>)"
)
_SHARED_BY_ALL = {
    "qkv": "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT",
    "out": "nvjet_tst_64x128_64x8_2x1_v_bz_TNN",
    "shared": "nvjet_tst_128x128_64x6_1x2_h_bz_TNN",
    "gate_up": "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNN",
    "down": "nvjet_tst_64x256_64x6_2x1_v_bz_splitK_TNN",
    "router": "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_cublas",
    "thin": "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn>",
    "head": "nvjet_tst_128x256_64x4_2x1_v_bz_TNT",
    "all_reduce": _NCCL.format("AllReduce_Sum_bf16_RING_LL"),
    "all_gather": _NCCL.format("AllGather_RING_LL"),
    "broadcast": _NCCL.format("Broadcast_RING_LL"),
    "custom_all_reduce": _CUSTOM_REDUCE,
    "fused_all_reduce": _FUSED_REDUCE,
    "h2d": "Memcpy HtoD (Pinned -> Device)",
    "d2h": "Memcpy DtoH (Device -> Pinned)",
}
_OF_ENGINE = {
    "vllm": {
        "norm": "void vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>(c10::BFloat16*, float)",
        "attention": _FLASH,
        "act": "void vllm::act_and_mul_kernel<c10::BFloat16, &vllm::silu_kernel>(c10::BFloat16*)",
        "sample": "_topk_topp_sample_kernel",
    },
    "sglang": {
        "norm": "void flashinfer::norm::FusedAddRMSNormKernel<8u, __nv_bfloat16>(__nv_bfloat16*)",
        "attention": "void flashinfer::BatchDecodeWithPagedKVCacheKernel<2u, 8u, 16u, 1u, 8u>()",
        "act": "void flashinfer::activation::act_and_mul_kernel<__nv_bfloat16, &silu>()",
        "sample": "void flashinfer::sampling::TopKTopPSamplingFromProbKernel<1024u>(float*)",
    },
    "tpinfer": {
        "norm": "_add_rms_norm_kernel",
        "attention": "_paged_decode_kernel",
        "act": "_silu_mul_kernel",
        "sample": "_sample_kernel",
    },
}
_OPERATORS = {"norm": "rms_norm", "attention": "unified_attention", "act": "silu_and_mul"}


def kernel_name(engine: str, work: DeviceWork) -> str:
    """What the recorder calls a device row."""
    return _SHARED_BY_ALL.get(work.role) or _OF_ENGINE[engine][work.role]


def operator_name(engine: str, work: DeviceWork) -> str:
    """The innermost operator that launches a row."""
    if work.product:
        return "aten::mm"
    if work.role in ("all_reduce", "all_gather", "broadcast"):
        return "record_param_comms"
    space = {"vllm": "_C", "sglang": "sgl_kernel", "tpinfer": "tpinfer_ops"}[engine]
    return f"{space}::{_OPERATORS.get(work.role, work.role)}"


def call_name(kind: str) -> str:
    """The runtime function behind a call."""
    return {
        "launch": "cudaLaunchKernel",
        "graph": "cudaGraphLaunch",
        "copy": "cudaMemcpyAsync",
        "record": "cudaEventRecord",
        "wait": "cudaStreamWaitEvent",
        "synchronize": "cudaStreamSynchronize",
    }[kind]


def step_name(engine: str, scenario: Scenario, step: HostRange, is_detailed: bool = False) -> str:
    """The engine's annotation of a step."""
    number, phase, text = step.label.split()
    tokens, is_prefill = int(text), phase == "prefill"
    rows = 1 if is_prefill else tokens
    context = scenario.prompt_tokens * rows + (0 if is_prefill else int(number) * rows)
    pairs = context * (tokens if is_prefill else 1)
    squares = tokens * tokens if is_prefill else rows
    if engine == "sglang":
        return f"step[EXTEND bs=1 toks={tokens}]" if is_prefill else f"step[DECODE bs={rows}]"
    if engine == "tpinfer":
        return (
            f"tpinfer.step id={number} phase={phase} tokens={tokens} rows={rows} full_rows=0 "
            f"sk={context} sqsk={pairs} sqsq={squares} sk_window={context} pairs_window={pairs}"
        )
    full, none = (rows, tokens), (0, 0)
    first, second = (full, none) if is_prefill else (none, full)
    if not is_detailed:
        return f"execute_context_{first[0]}({first[1]})_generation_{second[0]}({second[1]})"
    sums, zeros = f"sq{tokens}sk{context}sqsq{squares}sqsk{pairs}", "sq0sk0sqsq0sqsk0"
    first_sums, second_sums = (sums, zeros) if is_prefill else (zeros, sums)
    return (
        f"execute_{tokens}_context_{first[0]}({first_sums})_generation_{second[0]}({second_sums})"
    )


def range_name(engine: str, one: HostRange) -> str:
    """Our own ranges other than steps; empty where the engine has no such range."""
    if engine != "tpinfer":
        return ""
    return {"host": f"tpinfer.host {one.label}", "op": f"tpinfer.op {one.label}"}.get(one.kind, "")


def moment_name(engine: str, kind: str, index: int) -> str:
    """A mark of the one request; empty where the engine has none."""
    if engine != "tpinfer":
        return ""
    suffix = f" index={index}" if kind == "token" else ""
    return f"tpinfer.{kind} request=0{suffix}"
