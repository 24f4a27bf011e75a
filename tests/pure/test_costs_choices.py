"""What is decided for a machine: each choice, the reason beside it, and the lines of --explain."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.pure.models import tiny
from tpinfer.config.ceilings import Ceilings, MemoryLevel
from tpinfer.config.dtypes import DType
from tpinfer.config.engine import COMPUTE_DTYPES, DeviceName, EngineConfig
from tpinfer.costs.choices import (
    Choice,
    ExecutionChoices,
    choose_execution,
    linears_choice,
    prefill_attention_choice,
)

F32, BF16, F16 = DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16
OLD_CPU = ("avx2",)
SERVER_CPU = ("avx2", "avx512f", "avx512_bf16")
NEWEST_CPU = (*SERVER_CPU, "avx512_fp16")


def choose(
    checkpoint: DType = F32,
    device: str = "cpu",
    flags: tuple[str, ...] = OLD_CPU,
    wanted: DType | None = None,
    asked_device: DeviceName = "auto",
    ranks: int = 1,
    cores: int = 8,
) -> ExecutionChoices:
    config = EngineConfig(Path("model"), dtype=wanted, device=asked_device)
    return choose_execution(config, tiny(dtype=checkpoint), device, ranks, cores, flags)


def reason(choices: ExecutionChoices, name: str) -> str:
    return next(choice.reason for choice in choices.reasons if choice.name == name)


@pytest.mark.parametrize(
    ("checkpoint", "device", "flags", "dtype", "why"),
    [
        (BF16, "cpu", OLD_CPU, F32, "no AVX512_BF16 here"),
        (F16, "cpu", OLD_CPU, F32, "float16 matmuls"),
        (F32, "cpu", OLD_CPU, F32, "no AVX512_BF16 here"),
        (BF16, "cpu", SERVER_CPU, BF16, "the checkpoint's"),
        (F16, "cpu", SERVER_CPU, F32, "float16 matmuls"),
        (F16, "cpu", NEWEST_CPU, F16, "the checkpoint's"),
        (F32, "cpu", NEWEST_CPU, F32, "for a float32 checkpoint"),
        (F32, "cuda:0", OLD_CPU, BF16, "for a float32 checkpoint"),
        (BF16, "cuda:3", OLD_CPU, BF16, "the checkpoint's"),
        (F16, "cuda:0", OLD_CPU, F16, "the checkpoint's"),
    ],
)
def test_dtype(
    checkpoint: DType, device: str, flags: tuple[str, ...], dtype: DType, why: str
) -> None:
    found = choose(checkpoint, device, flags)
    assert (found.compute_dtype, found.kv_dtype) == (dtype, dtype)
    assert why in reason(found, "dtype")
    assert found.device_type == device.partition(":")[0]


@pytest.mark.parametrize("wanted", COMPUTE_DTYPES)
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_wish_beats_every_rule(wanted: DType, device: str) -> None:
    found = choose(BF16, device, OLD_CPU, wanted)
    assert found.compute_dtype is wanted
    assert reason(found, "dtype") == "asked for"


@pytest.mark.parametrize(("asked", "why"), [("auto", "what the seat has"), ("cpu", "asked for")])
def test_device(asked: DeviceName, why: str) -> None:
    found = choose(asked_device=asked)
    assert found.reasons[0] == Choice("device", "cpu", why)


@pytest.mark.parametrize(
    ("cores", "ranks", "threads"), [(8, 1, 8), (8, 2, 4), (8, 3, 2), (2, 2, 1), (2, 4, 1)]
)
def test_ranks_share_the_cores(cores: int, ranks: int, threads: int) -> None:
    found = choose(cores=cores, ranks=ranks)
    assert found.num_threads == threads
    assert reason(found, "threads") == f"{cores} cores over {ranks} ranks"


def test_every_choice_has_a_reason_and_the_record_agrees_with_the_fields() -> None:
    found = choose(BF16, "cpu", SERVER_CPU, ranks=2)
    values = {choice.name: choice.value for choice in found.reasons}
    assert list(values) == ["device", "dtype", "KV dtype", "threads"]
    assert values["dtype"] == found.compute_dtype and values["KV dtype"] == found.kv_dtype
    assert values["threads"] == str(found.num_threads)
    assert all(choice.reason for choice in found.reasons)


def test_the_same_machine_gives_the_same_choices() -> None:
    assert choose(BF16, flags=SERVER_CPU) == choose(BF16, flags=tuple(reversed(SERVER_CPU)))
    assert choose(BF16, flags=SERVER_CPU) != choose(BF16, flags=OLD_CPU)


def test_what_products_reach_is_said_beside_the_dtype() -> None:
    config, spec = EngineConfig(Path("model")), tiny(dtype=BF16)
    rates = Ceilings((MemoryLevel("DRAM", 1, 1.0),), {F32: 2e11}, 0.0, 0.0, 1.0, "box.yaml")

    def said(ceilings: Ceilings, *flags: str) -> str:
        found = choose_execution(config, spec, "cpu", 1, 8, flags, None, ceilings)
        return reason(found, "dtype")

    assert said(rates).endswith("float32; products at 200 GFLOPS, by box.yaml")
    assert said(rates, "avx512_bf16") == "the checkpoint's", "nobody measured bfloat16"
    both = replace(rates, flops_per_s={F32: 2e11, BF16: 4.04e11})
    assert said(both, "avx512_bf16") == (
        "the checkpoint's; products at 404 GFLOPS, 200 in float32, by box.yaml"
    )
    assert said(both).endswith("products at 200 GFLOPS, 404 in bfloat16, by box.yaml")


def test_weights_that_lie_packed_are_counted() -> None:
    assert linears_choice(True, 1_190_000_000).reason.startswith("1.19 GB copied into")
    assert "over 21 MB of weights" in linears_choice(False, 21_000_000).reason


def test_what_computes_prompts_on_a_gpu() -> None:
    found = prefill_attention_choice("FlashInfer 0.6.18", "1.30 times the Triton kernel's rate")
    assert found == Choice(
        "prefill attention", "FlashInfer 0.6.18", "1.30 times the Triton kernel's rate"
    )
    why = "flashinfer is not installed"
    assert prefill_attention_choice(None, why) == Choice("prefill attention", "Triton", why)


def test_explain_has_one_line_a_choice() -> None:
    found = choose(BF16, ranks=2).with_choice(
        Choice("collective", "shared_memory native", "all ranks share a host")
    )
    assert found.explain() == [
        "device      cpu  (what the seat has)",
        "dtype       float32  (no AVX512_BF16 here, so 16-bit matmuls would be slower than "
        "float32)",
        "KV dtype    float32  (the compute dtype; 256 B a token over all heads)",
        "threads     4  (8 cores over 2 ranks)",
        "collective  shared_memory native  (all ranks share a host)",
    ]
