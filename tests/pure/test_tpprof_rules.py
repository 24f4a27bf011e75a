"""Kernel names as recorders spell them, each with what it is."""

import ast
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tpprof.classify.rules import (
    ORDER,
    ROLES,
    Verdict,
    judge,
    parse_rules,
    read_rules,
    shipped_rules,
)
from tpprof.classify.work import WorkKind
from tpprof.errors import TraceError

_NCCL = "(ncclDevKernelArgsStorage<4096ul>)"
_FUSION = "flashinfer::trtllm_allreduce_fusion::"
COMM = {
    "allreduce": [
        f"ncclDevKernel_AllReduce_Sum_bf16_RING_LL{_NCCL}",
        f"ncclDevKernel_AllReduce_Sum_f16_TREE_LL128{_NCCL}",
        f"ncclDevKernel_AllReduce_Sum_bf16_NVLS_SIMPLE{_NCCL}",
        "ncclKernel_AllReduce_RING_LL_Sum_float(ncclDevComm*, unsigned long, ncclWork*)",
        "ncclSymkDevKernel_AllReduce_AGxLL_R_sum_bf16(ncclSymkDevWorkArgs4K)",
        "ncclSymkDevKernel_AllReduce_RSxLDMC_AGxSTMC_sum_bf16(ncclSymkDevWorkArgs4K)",
        "ncclSymDevKernel_AllReduce_RSxLD_AGxST_sum_f32(ncclSymDevArgs)",
        "void vllm::cross_device_reduce_1stage<__nv_bfloat16, 2>(vllm::RankData*, vllm::Signal*)",
        "void vllm::cross_device_reduce_2stage<__nv_bfloat16, 8>(vllm::RankData*, vllm::Signal*)",
        "void sglang::cross_device_reduce_1stage<__nv_bfloat16, 8>(sglang::RankData*)",
        "void aiter::cross_device_reduce_1stage_naive<__hip_bfloat16, 8>(aiter::RankData*)",
        "void aiter::reduce_scatter_cross_device_store<__hip_bfloat16, 4>(aiter::RankData*)",
        "void (anonymous namespace)::multimem_all_reduce_kernel<c10::BFloat16, 16>(c10::BFloat16*)",
        "void <unnamed>::multimem_all_reduce_kernel<c10::BFloat16, (int)16>(T1 *, unsigned long)",
        "void multimem_one_shot_all_reduce_kernel<float, 16>(float*, float*)",
        "void one_shot_all_reduce_kernel<c10::BFloat16, 16, 8, true>(c10::BFloat16**)",
        "one_shot_all_reduce_kernel_optimized",
        "void two_shot_all_reduce_kernel_inplace<c10::BFloat16, 16, 8>(c10::BFloat16**)",
        "void tensorrt_llm::kernels::oneShotAllReduceKernel<__nv_bfloat16, 8, true, true>()",
        "void tensorrt_llm::kernels::lowPrecisionTwoShotAllReduceKernel<half, 4>()",
        "void quickreduce::allreduce_prototype_twoshot<quickreduce::AllReduceTwoshot<half>>()",
        f"void {_FUSION}allreduce_fusion_kernel_oneshot_lamport<"
        f"({_FUSION}AllReduceFusionPattern)0, __nv_bfloat16, 8, false>()",
        "void allreduce7<__half, 8>(mscclpp::DeviceHandle<mscclpp::SmChannel>*)",
    ],
    "reduce_scatter": [
        f"ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL{_NCCL}",
        "ncclSymkDevKernel_ReduceScatter_LDMC_sum_bf16(ncclSymkDevWorkArgs4K)",
        "ncclKernel_ReduceScatter_RING_LL_Sum_half(ncclDevComm*, unsigned long, ncclWork*)",
    ],
    "allgather": [
        f"ncclDevKernel_AllGather_RING_LL{_NCCL}",
        "ncclSymkDevKernel_AllGather_STMC(ncclSymkDevWorkArgs4K)",
        "void multimem_all_gather_kernel<16>(char*, char*, unsigned long)",
    ],
    "alltoall": [
        "void deep_ep::internode_ll::dispatch<true, 3, 10, 7168>(void*, float*, int*)",
        "void deep_ep::internode_ll::combine<7168, 8, 10>(void*, void*)",
        "void deep_ep::intranode::notify_dispatch<8>(int const*, int*)",
        "void tensorrt_llm::kernels::moe_a2a::moeA2ADispatchKernel<8>()",
    ],
    "broadcast": [f"ncclDevKernel_Broadcast_RING_LL{_NCCL}"],
    "sendrecv": [f"ncclDevKernel_SendRecv{_NCCL}"],
    "reduce": [f"ncclDevKernel_Reduce_Sum_f32_RING_LL{_NCCL}"],
    "barrier": [
        "void c10d::symmetric_memory::barrier_kernel(unsigned int**, unsigned long, int, int)",
        "_ZN4c10d16symmetric_memoryL14barrier_kernelEPPjmiim",
    ],
    "other": [
        "ncclDevKernel_Generic_4(ncclDevKernelArgsStorage<4096ul>)",
        "void rcclGenericKernel<1, false>(ncclDevKernelArgsStorage<4096ul>)",
        "nvshmemi_transfer_rma_kernel",
    ],
}
FUSED = {
    "allreduce": [
        f"void {_FUSION}allreduce_fusion_kernel_oneshot_lamport<({_FUSION}AllReduceFusionPattern)1,"
        f" __nv_bfloat16, 8, false, false>({_FUSION}AllReduceFusionParams<__nv_bfloat16>)",
        f"void {_FUSION}allreduce_fusion_kernel_twoshot_sync<({_FUSION}AllReduceFusionPattern)3>()",
        "void aiter::allreduce_fusion_kernel_1stage<__hip_bfloat16, 8, 512>()",
        "void moefinalize_allreduce_fusion_kernel_oneshot_lamport<__nv_bfloat16, 8>()",
        "void moereduce_allreduce_fusion_kernel_oneshot_lamport<__nv_bfloat16, 8, true>()",
        "gemm_one_shot_all_reduce_kernel",
    ],
    "reduce_scatter": ["cutlass_gemm_reduce_scatter_sm90_bf16"],
}
COPIES = ["__amd_rocclr_copyBuffer", "__amd_rocclr_fillBufferAligned.kd"]
ROLE_NAMES = {
    "gemm": [
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT",
        "nvjet_sm100_tst_64x16_64x16_2x4_2cta_h_bz_splitK_TNT",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>()",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_cublas",
        "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_32x6_tn",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn>",
        "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::tuple<int>, "
        "cutlass::epilogue::thread::LinearCombinationSilu<half>>>()",
        "void cutlass::device_kernel<vllm::cutlass_3x_gemm_fp8_blockwise<float>>()",
        "Cijk_Alik_Bljk_BBS_BH_Bias_HA_S_SAV_UserArgs_MT64x32x256_MI16x16x1_SN_LDSB1",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4>()",
        "void wvSplitK_hf_sml_<__hip_bfloat16, 64, 4, 16, 8, 1, 4>(int, int)",
        "void deep_gemm::sm90_fp8_gemm_1d2d_impl<7168u, 4096u, 1u, (deep_gemm::GemmType)0>()",
        "void marlin::Marlin<(long)1125899906909960, 128, 16, 4>()",
        "_w8a8_block_fp8_matmul",
        "_w8a8_triton_block_scaled_mm",
        "ampere_hgemmHalf_128x64_nn",
        "triton_tem_fused_mm_3",
        "hgemm_bf16_32x64x64_S2TN_AS_SPK16_0",
        "void fused_a_gemm_kernel<1, 2112, 7168, 16>(__nv_bfloat16*)",
    ],
    "attention": [
        "void flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64, 128, 4>>()",
        "void flash::flash_fwd_splitkv_combine_kernel<Flash_fwd_kernel_traits<128, 64>>()",
        "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<>>>()",
        "void cutlass::device_kernel<flash::FlashAttnFwdCombine<cute::tuple<cute::C<8>>>>()",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>()",
        "void flashinfer::BatchDecodeWithPagedKVCacheKernel<2u, 8u, 16u, 1u, 8u>()",
        "void flashinfer::BatchPrefillWithPagedKVCacheKernel<flashinfer::KernelTraits<>>()",
        "void flashinfer::PersistentVariableLengthMergeStatesKernel<8u, 16u, 1u, 4u>()",
        "fmhaSm100fKernel_QkvBfloat16OBfloat16HQk576HV512PagedKvDenseP64VarSeqQ8Kv128",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_31_64x128x128",
        "kernel_unified_attention_3d",
        "reduce_segments",
        "_fwd_grouped_kernel_stage1",
        "_fwd_kernel_stage2",
        "_fwd_kernel",
        "attn_fwd",
        "void paged_attention_ll4mi_QKV_mfma16_kernel<0, __hip_bfloat16, 1, 128, 256>()",
        "void vllm::merge_attn_states_kernel<float, uint, 128>(float*)",
        "triton_tem_fused_flex_attention_0",
        "_paged_decode_kernel",
        "void tensorrt_llm::kernels::mmha::masked_multihead_attention_kernel<ushort, 128>()",
    ],
    "norm": [
        "void vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>(c10::BFloat16*, float)",
        "std::enable_if<true>::type vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>()",
        "void flashinfer::norm::FusedAddRMSNormKernel<8u, __nv_bfloat16>(__nv_bfloat16*)",
        "_ZN5aiter24add_rmsnorm_quant_kernelIDF16bDF16bLi256ELi16EEEvPT0_",
        "void aiter::local_device_load_rmsnorm<__hip_bfloat16, 512, 2>()",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>()",
        "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_2",
        "triton_per_fused__to_copy_add_mean_mul_pow_rsqrt_0",
        "void tensorrt_llm::kernels::generalRmsNorm<__nv_bfloat16>()",
        "_layer_norm_fwd_1pass_kernel",
    ],
    "rope": [
        "void vllm::rotary_embedding_kernel<c10::BFloat16, true>(long const*)",
        "void flashinfer::BatchQKApplyRotaryPosIdsCosSinCacheKernel<true, 128u>()",
        "void tensorrt_llm::kernels::fusedQKNormRopeKernel<128, true>()",
        "aiter::fuse_qk_rope_concat_and_cache_mla_per_head_kernel",
        "_triton_mrope_forward",
    ],
    "kv_write": [
        "void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16, __nv_bfloat16>()",
        "void (anonymous namespace)::store_kvcache<2048l, 4, false, long>(StoreKVCacheParams)",
        "void flashinfer::AppendPagedKVCacheKernel<128u, 4u>()",
        "set_kv_buffer_kernel",
    ],
    "activation": [
        "void vllm::act_and_mul_kernel<c10::BFloat16, &vllm::silu_kernel>(c10::BFloat16*)",
        "void flashinfer::activation::act_and_mul_kernel<__nv_bfloat16, &silu>()",
        "triton_poi_fused__to_copy_mul_silu_3",
        "triton_poi_fused_mul_rocm_unquantized_gemm_silu_slice_0",
        "_silu_mul_kernel",
        "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl()>()",
    ],
    "moe": [
        "fused_moe_kernel",
        "void vllm::moe::topkGating<8, 128, 4, 16, 32, int>()",
        "void moe::dev::finalize::finalizeKernelVecLoad<moe::dev::finalize::KernelParams<>>()",
        "bmm_Bfloat16_MxE2m1MxE4m3_Fp32_t128x16x256u2_s3_et128x16_swiGlu_dynBatch_sm100f",
        "_matmul_ogs_NNT_bf16xbf16xmxfp4_16x128x256x1_swiglu",
        "void deep_ep::layout::get_dispatch_layout<256, 32, 8>(long const*)",
        "void deep_gemm::sm100_fp8_gemm_1d1d_impl<4096u, (deep_gemm::GemmType)1>()",
        "void marlin_moe_wna16::Marlin<1125899906909960l, 562949953487106l>()",
    ],
    "quant": [
        "void vllm::scaled_fp8_quant_kernel_strided<c10::BFloat16, c10::Float8_e4m3fn>()",
        "_per_token_group_quant_8bit",
        "void tensorrt_llm::kernels::quantize_with_block_size<float, 32, true>()",
    ],
    "sample": [
        "void flashinfer::sampling::TopKTopPSamplingFromProbKernel<1024u>(float*)",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, "
        "at::native::ArgMaxOps<float>, unsigned int, long, 4, 4>>()",
        "_topk_topp_sample_kernel",
        "void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>()",
        "_sample_kernel",
    ],
    "embed": [
        "void at::native::vectorized_gather_kernel<16, long>(char*, char*, long*)",
        "void at::native::(anonymous namespace)::indexSelectLargeIndex<c10::BFloat16, long>()",
        "triton_poi_fused_embedding_0",
    ],
    "elementwise": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>()",
        "flash::prepare_varlen_num_blocks_kernel(int, int, int, int const*)",
        "create_flashinfer_kv_indices_triton",
        "triton_poi_fused_0",
    ],
}
FALSE_FRIENDS = {
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, MeanOps>>()": "elementwise",
    "void cub::DeviceReduceKernel<cub::DeviceReducePolicy<float>, float*>()": "elementwise",
    "void cub::DeviceReduceSingleTileKernel<float>()": "elementwise",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<float, 4>()": "elementwise",
    "void at::native::_scatter_gather_elementwise_kernel<128, 8>()": "elementwise",
    "triton_poi_fused__scaled_dot_product_flash_attention_view_3": "elementwise",
    "triton_poi_fused_constant_pad_nd_moe_forward_0": "elementwise",
    "triton_poi_fused_all_reduce_wait_tensor_1": "elementwise",
    "triton_red_fused_embedding_mean_mul_pow_rsqrt_0": "norm",
    "triton_poi_fused_addmm_view_4": "elementwise",
    "cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x64_64x3_tn_align8": "gemm",
    "void cudnn::cnn::reduce_wgrad_nchw_helper<float, float>()": "gemm",
    "void dot_kernel<float, 128, 0, cublasDotParams<>>()": "gemm",
    "void at::native::tensor_kernel_scan_innermost_dim<float, std::plus<float>>()": "",
    "void reduce_1Block_kernel<float, 128, 7>()": "",
    "my_broadcast_add": "",
    "": "",
}

OURS = {
    "best_of_chunks": Verdict(role="sample"),
    "few_rows": Verdict(role="gemm"),
    "few_rows_gated": Verdict(role="gated_gemm"),
    "gate_rows": Verdict(role="activation"),
    "gather_parts": Verdict(WorkKind.COMM, "allgather"),
    "norm_rows": Verdict(role="norm"),
    "one_row": Verdict(role="gemm"),
    "one_row_added": Verdict(role="added_gemm"),
    "one_row_gated": Verdict(role="gated_gemm"),
    "one_row_normed": Verdict(role="normed_gemm"),
    "paged_attention": Verdict(role="attention"),
    "rotate_and_write": Verdict(role="rope"),
    "sum_and_norm": Verdict(WorkKind.FUSED_COMM, "allreduce"),
    "sum_parts": Verdict(WorkKind.COMM, "allreduce"),
}
"""This project's own kernels: recorded steps name no ops, so their names have to tell."""


def _cases() -> list[tuple[str, Verdict]]:
    kinds = ((COMM, WorkKind.COMM), (FUSED, WorkKind.FUSED_COMM))
    found = [
        (name, Verdict(kind, op))
        for table, kind in kinds
        for op, names in table.items()
        for name in names
    ]
    found += [(n, Verdict(role=role)) for role, names in ROLE_NAMES.items() for n in names]
    found += [(name, Verdict(WorkKind.COPY)) for name in COPIES]
    return found + [(name, Verdict(role=role)) for name, role in FALSE_FRIENDS.items()]


@pytest.mark.parametrize(("name", "expected"), _cases(), ids=lambda one: str(one)[:40])
def test_a_name_gets_its_kind_op_and_role(name: str, expected: Verdict) -> None:
    assert judge([name]) == [expected]


def launched_kernels(tree: ast.Module) -> set[str]:
    """Functions under triton.jit that others do not call: those begin with an underscore."""
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        if any(ast.unparse(one).startswith("triton.jit") for one in node.decorator_list)
    }


def test_kernels_of_ours_have_a_role_each() -> None:
    """A new one needs a rule in rules/tpinfer.toml, or replays are not read."""
    package = Path(__file__).resolve().parents[2] / "tpinfer"
    trees = [ast.parse(path.read_text("utf-8")) for path in package.rglob("*triton*.py")]
    assert set().union(*map(launched_kernels, trees)) == set(OURS)
    assert {name: judge([name])[0] for name in OURS} == OURS


def test_every_role_and_collective_is_known_by_some_name() -> None:
    ours = {verdict.role for verdict in OURS.values() if verdict.role}
    assert set(ROLE_NAMES) | ours == set(ROLES)
    known = {(rule.verdict.kind, rule.verdict.op) for rule in shipped_rules() if rule.verdict.op}
    tested = {(WorkKind.COMM, op) for op in COMM} | {(WorkKind.FUSED_COMM, op) for op in FUSED}
    assert known - tested == {(WorkKind.FUSED_COMM, "allgather")}


def test_a_rule_needs_all_it_says_and_the_first_that_fits_counts() -> None:
    rules = read_rules(
        """
        [[rule]]
        begins = ["Ab"]
        contains = ["x", "y"]
        role = "norm"
        [[rule]]
        contains = ["AB"]
        role = "gemm"
        """,
        "made.toml",
    )
    names = ["void abY", "abz", "zaby", "nothing"]
    assert [one.role for one in judge(names, rules)] == ["norm", "gemm", "gemm", ""]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[[rule]\n", "no TOML"),
        ("rule = 3", "rules are tables"),
        ("rule = [1]", "rules are tables"),
        ("[[rule]]\nrole = 'norm'", "rule 1: needs"),
        ("[[rule]]\ncontains = []", "rule 1: needs"),
        ("[[rule]]\ncontains = ['a']\nlike = 1", "rule 1: needs"),
        ("[[rule]]\ncontains = 'abc'", "a list of texts"),
        ("[[rule]]\ncontains = ['']", "a list of texts"),
        ("[[rule]]\nbegins = [1]", "a list of texts"),
        ("[[rule]]\ncontains = ['a']\nkind = 'network'\nop = 'x'", "'network' must be"),
        ("[[rule]]\ncontains = ['a']\nkind = ['comm']\nop = 'x'", "must be comm"),
        ("[[rule]]\ncontains = ['a']\nkind = 'comm'", "must name the collective"),
        ("[[rule]]\ncontains = ['a']\nkind = 'copy'\nop = 'x'", "must name the collective"),
        ("[[rule]]\ncontains = ['a']\nop = 'allreduce'", "must name the collective"),
        ("[[rule]]\ncontains = ['a']\nkind = 'comm'\nop = 3", "must name the collective"),
        ("[[rule]]\ncontains = ['a']\nrole = 'mystery'", "'mystery' must be one of"),
        ("[[rule]]\ncontains = ['a']\nrole = 3", "must be one of"),
    ],
)
def test_a_malformed_file_is_named_with_its_rule(text: str, told: str) -> None:
    with pytest.raises(TraceError, match=told) as error:
        read_rules(text, "made.toml")
    assert "made.toml" in str(error.value)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda one: st.lists(one, max_size=3) | st.dictionaries(st.text(max_size=8), one, max_size=3),
    max_leaves=8,
)
_FIELDS = st.sampled_from(["begins", "contains", "kind", "op", "role", "other"])


@given(_JSON | st.lists(st.dictionaries(_FIELDS, _JSON, max_size=5), max_size=3))
def test_any_content_makes_rules_or_a_trace_error(rules: Any) -> None:
    try:
        found = parse_rules({"rule": rules}, "made.toml")
    except TraceError as error:
        assert str(error).startswith("made.toml")
    else:
        assert len(judge(["some name"], found)) == 1


def test_every_file_that_comes_along_is_asked() -> None:
    files = {file.name for file in resources.files("tpprof.rules").iterdir()}
    assert {name for name in files if name.endswith(".toml")} == {f"{one}.toml" for one in ORDER}
