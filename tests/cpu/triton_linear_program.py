"""Cases of `test_triton_linear`, one per process: python -m tests.cpu.triton_linear_program
CASE."""

import sys

from tests.cpu.triton_interpreter import interpret

CASE = sys.argv[1]
if CASE != "compiled":
    interpret()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from tpinfer.layers.skinny import SkinnyProducts  # noqa: E402
from tpinfer.layers.triton_linear import TILES, few_rows, one_row, skinny_product  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def products() -> None:
    """Odd sizes, strided input, with and without a bias, against torch's in float32."""
    for dtype, tolerance in TOLERANCE.items():
        for rows, columns, inner in ((1, 40, 64), (1, 7, 1100), (2, 33, 72), (16, 20, 520)):
            torch.manual_seed(inner)
            wide = torch.randn(rows, inner + 8).to(dtype)
            x, weight = wide[:, :inner], (torch.randn(columns, inner) / inner**0.5).to(dtype)
            for bias in (None, torch.randn(columns).to(dtype)):
                exact = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
                for tile in TILES:
                    found = skinny_product(x, weight, bias, tile)
                    assert found.dtype is dtype and found.shape == (rows, columns)
                    torch.testing.assert_close(found.float(), exact, atol=tolerance, rtol=tolerance)


def choices() -> None:
    """Own kernels where they are faster, one measurement a shape, torch's product for all else."""
    clock = iter(range(10**6))
    torch_is_slow = {"now": True}

    def time(call: object) -> float:
        is_own = "skinny_product" in getattr(call, "__code__").co_names  # noqa: B009
        step = next(clock) * 1e-9
        return step + (1.0 if is_own == torch_is_slow["now"] else 2.0)

    weight, x = torch.randn(24, 40), torch.randn(20, 40)
    products = SkinnyProducts(time)
    matmul = products.bind(weight, None)
    assert set(products.chosen) == {(24, 40, 1), (24, 40, 4), (24, 40, 16)}
    assert all(products.chosen.values()) and "in 3 of 3 cases" in products.words()
    assert "2.00 times torch's rate" in products.words()
    for rows in (1, 2, 3, 16, 17, 20):
        torch.testing.assert_close(matmul(x[:rows]), F.linear(x[:rows], weight))
    assert matmul(x[:0]).shape == (0, 24)
    before = next(clock)
    products.bind(torch.randn(24, 40), torch.randn(24))
    assert next(clock) == before + 1, "the shape is known"
    torch_is_slow["now"] = False
    products = SkinnyProducts(time)
    products.bind(weight, None)
    assert not any(products.chosen.values()) and "in 0 of 3 cases" in products.words()


def compiled() -> None:
    """For sm_90, without one."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for dtype in ("bf16", "fp32"):
        for kernel in (one_row, few_rows):
            for tile in TILES[:2]:
                constants: dict[str, object] = {
                    "COLUMNS": tile.columns, "INNER": tile.inner, "HAS_BIAS": True
                }  # fmt: skip
                if kernel is few_rows:
                    constants |= {"COLUMNS": max(16, tile.columns), "INNER": min(512, tile.inner)}
                    constants["PRECISION"] = "ieee" if dtype == "fp32" else "tf32"
                pointers = ("x", "weight", "bias", "out")
                signature = {
                    name: "constexpr" if name in constants
                    else f"*{dtype}" if name in pointers else "i32"
                    for name in kernel.arg_names
                }  # fmt: skip
                source = ASTSource(kernel, signature, constexprs=constants)
                options = {"num_warps": tile.num_warps, "num_stages": 3}
                made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
                assert made.asm["cubin"], "no machine code"


if __name__ == "__main__":
    globals()[CASE]()
    print(f"{CASE} agrees")
