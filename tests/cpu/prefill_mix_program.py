"""Cases of `test_prefill_attention` whose decodes the Triton kernel computes, one per process:
python -m tests.cpu.prefill_mix_program CASE. Triton's interpreter runs it."""

import sys
import warnings

from tests.cpu.triton_interpreter import interpret

interpret()

import torch  # noqa: E402

from tests.cpu.fake_prefill import FakeFlashInfer, FakeVarlen  # noqa: E402
from tpinfer.attention import load_prefill  # noqa: E402
from tpinfer.attention.flashinfer_prefill import FlashInferPrompts  # noqa: E402
from tpinfer.attention.interface import HeadLayout  # noqa: E402
from tpinfer.attention.made_step import MadeStep, made_step  # noqa: E402
from tpinfer.attention.prompt_attention import AttentionShape, PromptAttention  # noqa: E402
from tpinfer.attention.reference import bind_partial_attention  # noqa: E402
from tpinfer.attention.triton_attention import TritonAttention  # noqa: E402
from tpinfer.attention.varlen_prefill import VarlenPrompts  # noqa: E402
from tpinfer.config.dtypes import DType  # noqa: E402
from tpinfer.costs.choices import Choice, ExecutionChoices  # noqa: E402
from tpinfer.sharding.kv_layout import KVLayout  # noqa: E402
from tpinfer.worker import kernels  # noqa: E402

CPU, BLOCK, F16 = torch.device("cpu"), 16, DType.FLOAT16
LAYOUT, HEAD_DIM = HeadLayout(6, 2, 3, 0), 64
STEPS = (
    ((20, 20), (9, 60)),
    ((1, 40), (17, 60), (1, 1), (8, 90), (30, 33), (1, 65)),
    ((1, 17), (3, 20), (12, 16)),
    ((40, 41), (1, 17), (1, 48)),
    ((1, 5), (8, 16)),
)
TOLERANCE = 3e-3


def made(sizes: tuple[tuple[int, int], ...], window: int | None = None) -> MadeStep:
    shape = AttentionShape(LAYOUT, HEAD_DIM, window)
    return made_step(sizes, shape, BLOCK, CPU, torch.float16, F16)


def backends() -> list[tuple[TritonAttention, FakeFlashInfer | FakeVarlen]]:
    """The Triton kernel with either library for prompts."""
    fake, varlen = FakeFlashInfer(), FakeVarlen()
    shape = AttentionShape(LAYOUT, HEAD_DIM)
    libraries = FlashInferPrompts(fake, BLOCK, CPU, torch.float16, shape), VarlenPrompts(
        varlen, BLOCK
    )  # fmt: skip
    own = TritonAttention(KVLayout(BLOCK, 0), CPU)
    made = [own.with_prompts(PromptAttention(one, lambda shape: "")) for one in libraries]
    return list(zip(made, (fake, varlen), strict=True))


def num_calls(fake: FakeFlashInfer | FakeVarlen) -> int:
    return fake.num_runs if isinstance(fake, FakeFlashInfer) else fake.num_calls


def launches(backend: TritonAttention) -> list[int]:
    """Notes the longest sequence that each launch of the own kernel takes."""
    noted, run = [], backend._run

    def noting(bound, shortest, longest):
        noted.append(longest)
        run(bound, shortest, longest)

    backend._run = noting  # pyright: ignore
    return noted


def agrees(backend: TritonAttention, step: MadeStep, window: int | None) -> None:
    found = backend.bind_attention(LAYOUT, HEAD_DIM, window)(*vars_of(step))
    exact, _ = bind_partial_attention(LAYOUT, HEAD_DIM, window)(
        step.query_THD.float(), step.cache, step.spans
    )
    torch.testing.assert_close(found.float(), exact, atol=TOLERANCE, rtol=TOLERANCE)


def vars_of(step: MadeStep):
    return step.query_THD, step.cache, step.spans


def mixes() -> None:
    for backend, fake in backends():
        noted = launches(backend)
        for sizes in STEPS:
            before, noted[:] = num_calls(fake), []
            agrees(backend, made(sizes), None)
            counts = [count for count, _ in sizes]
            assert num_calls(fake) - before == (max(counts) > 8)
            assert noted == [8] * (min(counts) <= 8), "prompts are not computed twice"


def windows() -> None:
    for backend, _ in backends():
        for window, sizes in ((16, STEPS[1]), (5, STEPS[2]), (33, STEPS[3])):
            agrees(backend, made(sizes, window), window)


def log_sum_exp() -> None:
    for backend, _ in backends():
        for sizes in STEPS[1:3]:
            step = made(sizes)
            found = backend.bind_partial_attention(LAYOUT, HEAD_DIM, None)(*vars_of(step))
            exact = bind_partial_attention(LAYOUT, HEAD_DIM, None)(
                step.query_THD.float(), step.cache, step.spans
            )
            for mine, other in zip(found, exact, strict=True):
                torch.testing.assert_close(mine.float(), other, atol=TOLERANCE, rtol=TOLERANCE)


def breaks() -> None:
    """A step whose library raises is computed all the same."""
    backend, fake = backends()[0]
    assert isinstance(fake, FakeFlashInfer)
    noted = launches(backend)
    fake.break_run = True
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        agrees(backend, made(STEPS[1]), None)
        agrees(backend, made(STEPS[2]), None)
    assert len(told) == 1 and "from here on: FlashInfer 0.6.18 raised the module" in str(
        told[0].message
    )
    assert noted[0] > 8 and noted[1] == 8


def chosen() -> None:
    """From what is installed to the kernels of a rank, and the lines that say so."""
    shape = AttentionShape(LAYOUT, HEAD_DIM)
    load_prefill.TIMED_SIZES = ((20, 40),)
    seconds = [2.0] * 5 + [1.0] * 5
    load_prefill.device_timer = lambda device: lambda call: (call(), seconds.pop(0))[1]
    choices = ExecutionChoices("cuda", F16, F16, 1, ())
    place = choices, KVLayout(BLOCK, 0), CPU
    for invariant, name, said in (
        (True, "Triton", "rows that do not depend on their batch are asked for"),
        (False, "Triton", "flashinfer is not installed"),
        (False, "FlashInfer 0.6.18", "2.00 times the Triton kernel's rate"),
    ):
        fake = FakeFlashInfer()
        sys.modules["flashinfer"] = fake if name != "Triton" else None  # pyright: ignore
        attention, told = kernels._device_attention(*place, invariant, shape)
        assert isinstance(attention, TritonAttention), told
        assert [choice.name for choice in told] == ["attention", "prefill attention"]
        assert isinstance(told[1], Choice) and told[1].value == name, told
        assert told[1].reason.startswith(said), told
        if name != "Triton":
            before = fake.num_runs
            agrees(attention, made(STEPS[1]), None)
            assert fake.num_runs > before


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    print(f"{sys.argv[1]} agrees")
