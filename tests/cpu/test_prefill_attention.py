"""Libraries' kernels for the prompts of a step, with fakes in their place: what they are given,
when they are chosen, and what happens where they are wrong or break."""

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.attention.varlen
from gpu.prompt_rates import rates_of

from tests.cpu.fake_prefill import FakeFlashInfer, FakeVarlen
from tpinfer.attention import load_prefill
from tpinfer.attention.flashinfer_prefill import FlashInferPrompts
from tpinfer.attention.interface import HeadLayout, StepSpans
from tpinfer.attention.load_prefill import error_of, load_prefill_attention, probe_sizes, why_wrong
from tpinfer.attention.made_step import MadeStep, made_step
from tpinfer.attention.prompt_attention import (
    AttentionShape,
    PromptAttention,
    PromptKernel,
    PromptsOfShape,
)
from tpinfer.attention.prompt_part import prompt_part
from tpinfer.attention.reference import ReferenceAttention
from tpinfer.attention.varlen_prefill import VarlenPrompts
from tpinfer.config.dtypes import DType
from tpinfer.sharding.kv_layout import KVLayout

CPU, BLOCK = torch.device("cpu"), 16
F16, BF16, F32 = DType.FLOAT16, DType.BFLOAT16, DType.FLOAT32
SHAPE = AttentionShape(HeadLayout(8, 2, 4, 0), 64)
TORCH = f"torch {torch.__version__.partition('+')[0]}'s varlen_attn"


def flashinfer(fake: FakeFlashInfer | None = None, block: int = BLOCK) -> FlashInferPrompts:
    return FlashInferPrompts(fake or FakeFlashInfer(), block, CPU, torch.float16, SHAPE)


def varlen(fake: FakeVarlen | None = None, block: int = BLOCK) -> VarlenPrompts:
    return VarlenPrompts(fake or FakeVarlen(), block)


def made(
    sizes: tuple[tuple[int, int], ...], shape: AttentionShape = SHAPE, block: int = BLOCK
) -> MadeStep:
    return made_step(sizes, shape, block, CPU, torch.float16, F16)


KERNELS: list[Callable[..., PromptKernel]] = [flashinfer, varlen]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        (SHAPE, BLOCK),
        (replace(SHAPE, window=5), BLOCK),
        (replace(SHAPE, window=33), BLOCK),
        (SHAPE, 256),
        (SHAPE, 5),
        (AttentionShape(HeadLayout(6, 2, 3, 0), 64), BLOCK),
        (AttentionShape(HeadLayout(3, 3, 1, 0), 128), BLOCK),
        (AttentionShape(HeadLayout(7, 1, 7, 0), 64, 40), BLOCK),
    ],
)
def test_prompts_are_those_of_plain_torch(
    kernel: Callable[..., PromptKernel], shape: AttentionShape, block: int
) -> None:
    served = PromptsOfShape("it", kernel(block=block).bind(shape))
    for sizes in probe_sizes(block):
        assert error_of(served, shape, made(sizes, shape, block)) < 4e-3


def test_the_steps_of_the_probe_are_what_it_is_for() -> None:
    for block in (1, 16, 256):
        steps = probe_sizes(block)
        sizes = [size for step in steps for size in step]
        assert all(0 < count <= context for count, context in sizes)
        prompts = [(count, context) for count, context in sizes if count > 8]
        assert any(count == context for count, context in prompts), "without a prefix"
        assert any(count < context for count, context in prompts), "with one"
        assert any(context % block == 0 for _, context in sizes)
        parts = [prompt_part(made(step, block=block).spans) for step in steps]
        rows = [part.rows for part in parts if part is not None]
        assert None in rows, "decodes between prompts"
        assert any(one is not None and one.start > 0 for one in rows), "decodes around them"
    step = made(((20, 64), (30, 30)))
    paged = step.spans.paged
    assert paged is not None
    blocks = paged.block_tables_RB[int(paged.rows_S[0]), :4].tolist()
    assert blocks != sorted(blocks), "blocks are out of order"
    assert step.cache.values_2KSD.isnan().any(), "nothing was written behind the contexts"


@pytest.mark.parametrize("wrong", ["window", "scale", "lse", "rows"])
def test_the_probe_sees_what_is_wrong(wrong: str) -> None:
    """Of a window of 4,000 tokens one too many would never show: a shorter one is tried."""
    shape = replace(SHAPE, window=4000)
    assert why_wrong(flashinfer(), shape, BLOCK, torch.float16, CPU) == ""
    fake = flashinfer(FakeFlashInfer(wrong=wrong))
    assert why_wrong(fake, shape, BLOCK, torch.float16, CPU).startswith("is off by ")


def test_a_step_is_planned_once_for_all_its_layers() -> None:
    fake = FakeFlashInfer()
    prompts = PromptAttention(flashinfer(fake), lambda shape: "")
    bound = SHAPE.layout, SHAPE.head_dim
    layers = [prompts.bind(*bound, window) for window in (None, 33, None, 33, None)]
    assert layers[0] is not None and layers[1] is not None
    steps = [made(sizes, replace(SHAPE, window=33)) for sizes in probe_sizes(BLOCK)]
    for number, step in enumerate(steps):
        out = torch.empty(step.query_THD.shape, dtype=torch.float16)
        for layer in layers:
            assert layer is not None and layer(step.query_THD, step.cache, step.spans, out, None)
        assert len(fake.plans) == 2 * (number + 1), "one for full attention, one for the window"
        assert [plan["left"] for plan in fake.plans[-2:]] == [-1, 32]
        assert fake.num_runs == 5 * (number + 1)
    exact = ReferenceAttention().bind_attention(*bound, None)
    found = exact(steps[-1].query_THD.float(), steps[-1].cache, steps[-1].spans)
    rows = prompt_part(steps[-1].spans)
    assert rows is not None
    numbers = rows.row_numbers()
    torch.testing.assert_close(out[numbers].float(), found[numbers], atol=4e-3, rtol=4e-3)


def test_steps_without_prompts_are_left_to_others() -> None:
    fake = FakeFlashInfer()
    served = PromptsOfShape("it", flashinfer(fake).bind(SHAPE))
    step = made(((8, 40), (1, 3)))
    out = torch.empty_like(step.query_THD)
    assert not served(step.query_THD, step.cache, step.spans, out, None)
    recorded = StepSpans((), made(((20, 40),)).spans.paged)
    assert not served(step.query_THD, step.cache, recorded, out, None)
    assert not fake.plans


class Clock:
    """Tells the seconds it was given, in the order in which things are timed."""

    def __init__(self, *seconds: float) -> None:
        self._seconds = [each for each in seconds for _ in range(5)]

    def __call__(self, call: Callable[[], object]) -> float:
        call()
        return self._seconds.pop(0)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Little to time, and libraries that are there only where a test brings them."""
    monkeypatch.setattr(load_prefill, "TIMED_SIZES", ((20, 40), (9, 30)))
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def bring(
    monkeypatch: pytest.MonkeyPatch,
    fake_flashinfer: object = None,
    fake_varlen: object = None,
) -> None:
    if fake_flashinfer is not None:
        monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    if fake_varlen is not None:
        monkeypatch.setattr(torch.nn.attention, "varlen", fake_varlen)


def load(
    *seconds: float, kv: KVLayout | None = None, dtypes: tuple[DType, DType] = (F16, F16),
    batch_invariant: bool = False, shape: AttentionShape = SHAPE,
) -> tuple[PromptAttention | None, str]:  # fmt: skip
    return load_prefill_attention(
        ReferenceAttention(), kv or KVLayout(BLOCK, 0), CPU, dtypes,
        batch_invariant=batch_invariant, shape=shape, time=Clock(*seconds),
    )  # fmt: skip


def test_nothing_is_installed() -> None:
    """torch's own has no kernel for CPUs."""
    found, why = load()
    assert found is None
    assert why.startswith(f"flashinfer is not installed; {TORCH} does not run here: ")
    assert "CPU" in why and "\n" not in why


def test_the_faster_library_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    bring(monkeypatch, FakeFlashInfer(), FakeVarlen())
    held = "with 8 heads over 2 of 64, held against plain torch at start"
    found, why = load(1.3, 1.0, 1.04)
    assert found is not None and found.name == "FlashInfer 0.6.18"
    assert why == (
        f"1.30 times the Triton kernel's rate {held}; {TORCH} is at 1.25 times the Triton "
        "kernel's rate"
    )
    found, why = load(1.3, 1.3, 1.0)
    assert found is not None and found.name == TORCH
    assert why.startswith(f"1.30 times the Triton kernel's rate {held}; FlashInfer 0.6.18 is at 1")


def test_a_slower_library_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    bring(monkeypatch, FakeFlashInfer(), FakeVarlen())
    found, why = load(1.0, 1.25, 0.99)
    assert found is None
    assert why == (
        "FlashInfer 0.6.18 is at 0.80 times the Triton kernel's rate; "
        f"{TORCH} is at 1.01 times the Triton kernel's rate"
    )


def test_a_library_that_leaves_rows_unwritten_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    bring(monkeypatch, None, FakeVarlen(unwritten=1))
    found, why = load()
    assert found is None
    assert why.startswith(f"flashinfer is not installed; {TORCH} is off by ")


def test_blocks_that_a_library_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    bring(monkeypatch, None, FakeVarlen(page_multiple=256))
    found, why = load()
    assert found is None and "must be divisible by 256" in why
    found, why = load(2.0, 1.0, kv=KVLayout(256, 0))
    assert found is not None and why.startswith("2.00 times the Triton kernel's rate")
    assert why.endswith("; flashinfer is not installed")


def test_what_a_library_raises_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    bring(monkeypatch, FakeFlashInfer(head_dims=(128,)), FakeVarlen())
    found, why = load(3.0, 1.0)
    assert found is not None and found.name == TORCH
    assert why.endswith("FlashInfer 0.6.18 does not run here: Unsupported head_dim: 64")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise RuntimeError('no nvcc\\nanywhere')", "cannot be imported: no nvcc"),
        ("import no_such_module_at_all", "cannot be imported: No module named"),
        ("", "does not run here: module 'flashinfer' has no attribute"),
    ],
)
def test_a_broken_installation_is_told(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flashinfer.py").write_text(text + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flashinfer")
    try:
        found, why = load()
    finally:
        sys.modules.pop("flashinfer", None)
    assert found is None
    assert said in why.partition("; ")[0] and "\n" not in why


def test_an_older_torch_knows_no_block_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older:
        """As torch 2.11 has it."""

        def varlen_attn(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
            raise AssertionError("not to be called")

    bring(monkeypatch, None, Older())
    assert load()[1] == f"flashinfer is not installed; {TORCH} knows no block tables"


@pytest.mark.parametrize(
    ("said", "options"),
    [
        ("do not depend on their batch", {"batch_invariant": True}),
        ("ranks share a KV head", {"kv": KVLayout(BLOCK, 0, 2, 1)}),
        ("not in float32", {"dtypes": (F32, F32)}),
        ("keys are stored as int8", {"dtypes": (BF16, DType.INT8)}),
        ("keys are stored as float16, and libraries read bfloat16", {"dtypes": (BF16, F16)}),
        ("whole ones", {"shape": replace(SHAPE, layout=HeadLayout(5, 2, 3, 0))}),
        ("whole ones", {"shape": replace(SHAPE, layout=HeadLayout(4, 2, 2, 1))}),
    ],
)
def test_what_no_library_serves(
    said: str, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Nor is one imported for it."""
    fake, torchs = FakeFlashInfer(), FakeVarlen()
    bring(monkeypatch, fake, torchs)
    found, why = load(2.0, 1.0, 1.0, **options)
    assert found is None and said in why
    assert not fake.plans and not torchs.num_calls
    assert load(2.0, 1.0, 1.0)[0] is not None, "it would have been used"


def test_shapes_are_proved_when_they_are_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    bring(monkeypatch, FakeFlashInfer())
    found, _ = load(2.0, 1.0)
    assert found is not None
    assert found.bind(HeadLayout(6, 2, 3, 0), 128, None) is not None
    assert found.bind(HeadLayout(6, 2, 3, 0), 128, 40) is not None
    with pytest.warns(RuntimeWarning, match="go through the Triton kernel: FlashInfer.*80"):
        assert found.bind(HeadLayout(6, 2, 3, 0), 80, None) is None
    assert found.bind(HeadLayout(6, 2, 3, 0), 80, None) is None, "told once"
    with pytest.warns(RuntimeWarning, match="whole groups"):
        assert found.bind(HeadLayout(5, 2, 3, 0), 64, None) is None


@pytest.mark.parametrize("when", ["break_plan", "break_run"])
def test_a_library_that_breaks_is_not_asked_again(when: str) -> None:
    fake = FakeFlashInfer()
    served = PromptsOfShape("FlashInfer", flashinfer(fake).bind(SHAPE))
    step = made(((20, 40),))
    out = torch.empty_like(step.query_THD, memory_format=torch.contiguous_format)
    assert served(step.query_THD, step.cache, step.spans, out, None)
    setattr(fake, when, True)
    another = made(((21, 40),))
    out = torch.empty_like(another.query_THD, memory_format=torch.contiguous_format)
    with pytest.warns(RuntimeWarning, match="from here on: FlashInfer raised"):
        assert not served(another.query_THD, another.cache, another.spans, out, None)
    setattr(fake, when, False)
    before = len(fake.plans), fake.num_runs
    assert not served(step.query_THD, step.cache, step.spans, out, None)
    assert (len(fake.plans), fake.num_runs) == before


def test_the_script_says_which_is_faster_and_which_is_right() -> None:
    sizes = (20, 40), (9, 30)
    kernels = [flashinfer(), varlen(FakeVarlen(unwritten=0)), flashinfer(FakeFlashInfer((80,)))]
    clock = iter([2e-3] * 10 + [1e-3] * 10 + [4e-3] * 10)

    def time(call: Callable[[], object]) -> float:
        call()
        return next(clock)

    found = rates_of(made(sizes), sizes, SHAPE, ReferenceAttention(), kernels[:2], time)
    assert list(found) == ["Triton", "FlashInfer 0.6.18", TORCH]
    flops = 4 * 8 * 64 * (20 * 21 + sum(range(1, 21)) - 20 + 9 * 21 + sum(range(1, 10)))
    assert found["Triton"]["us"] == pytest.approx(2000)
    assert found["Triton"]["tflops"] == pytest.approx(flops / 2e-3 / 1e12)
    assert found["FlashInfer 0.6.18"]["us"] == pytest.approx(1000)
    errors = [float(each["error"]) for each in found.values()]
    assert errors[0] < 1e-3 and errors[1] < 1e-3 and errors[2] > 1
    clock = iter([1e-3] * 10)
    found = rates_of(made(sizes), sizes, SHAPE, ReferenceAttention(), kernels[2:], time)
    assert found["FlashInfer 0.6.18"] == {
        "raised": "ValueError: Unsupported head_dim: 64\nand more lines"
    }


@pytest.mark.parametrize("case", ["mixes", "windows", "log_sum_exp", "breaks", "chosen"])
def test_prompts_and_decodes_of_a_step(case: str) -> None:
    """Decodes by the paged kernel under Triton's interpreter, which is chosen at import."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.cpu.prefill_mix_program", case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert f"{case} agrees" in done.stdout
