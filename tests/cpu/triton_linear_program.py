"""Cases of `test_triton_linear`, one per process: python -m tests.cpu.triton_linear_program
CASE."""

import sys
from collections.abc import Callable, Sequence
from functools import partial

from tests.cpu.triton_interpreter import interpret

CASE = sys.argv[1]
if CASE != "compiled":
    interpret()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from tpinfer.layers.product_tiles import MOST_ROWS, TILES, split_space, tiles_for  # noqa: E402
from tpinfer.layers.skinny import SkinnyMatMul, SkinnyProducts, load_skinny  # noqa: E402
from tpinfer.layers.triton_linear import (  # noqa: E402
    few_rows,
    few_rows_gated,
    one_row,
    one_row_added,
    one_row_gated,
    one_row_normed,
    skinny_product,
)

KINDS = {"eps": "fp32", "parts": "*fp32", "arrived": "*i32"}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def products() -> None:
    """Odd sizes, strided input, with and without a bias, against torch's in float32."""
    for dtype, tolerance in TOLERANCE.items():
        shapes = (
            (1, 40, 64),
            (1, 7, 1100),
            (2, 33, 72),
            (16, 20, 520),
            (17, 40, 72),
            (64, 70, 136),
        )
        for rows, columns, inner in shapes:
            torch.manual_seed(inner)
            wide = torch.randn(rows, inner + 8).to(dtype)
            x, weight = wide[:, :inner], (torch.randn(columns, inner) / inner**0.5).to(dtype)
            for bias in (None, torch.randn(columns).to(dtype)):
                exact = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
                space = split_space(columns, x.device)
                for tile in tiles_for(rows, columns):
                    found = skinny_product(x, weight, bias, tile, space)
                    assert not space.arrived.any()
                    assert found.dtype is dtype and found.shape == (rows, columns)
                    torch.testing.assert_close(found.float(), exact, atol=tolerance, rtol=tolerance)


def gated() -> None:
    """Products of several rows with the gate behind, against ops of their own in float32."""
    for dtype, tolerance in TOLERANCE.items():
        for rows, width, inner in ((2, 33, 72), (16, 20, 520), (17, 40, 72), (64, 70, 136)):
            torch.manual_seed(inner)
            x = torch.randn(rows, inner).to(dtype)
            weight = (torch.randn(2 * width, inner) / inner**0.5).to(dtype)
            for bias in (None, torch.randn(2 * width).to(dtype)):
                wide = None if bias is None else bias.float()
                gate, up = F.linear(x.float(), weight.float(), wide).chunk(2, -1)
                space = split_space(2 * width, x.device)
                for tile in tiles_for(rows, 2 * width):
                    one = SkinnyMatMul(weight, bias, (None, *[tile] * MOST_ROWS), False, space)
                    found = one.gated_rows(x)
                    assert not space.arrived.any()
                    assert found.dtype is dtype and found.shape == (rows, width)
                    limit = 2 * tolerance
                    torch.testing.assert_close(
                        found.float(), F.silu(gate) * up, atol=limit, rtol=limit
                    )

    gates_where_its_tile_fits()


def gates_where_its_tile_fits() -> None:
    """Each tile is tried once, with the most rows it has; one that does not fit gates nothing."""
    few, many = TILES[1], tiles_for(MOST_ROWS)[0]
    tiles = (None, few, None, few, few, *[None] * 30, many, many, *[None] * (MOST_ROWS - 36))
    weight, tried = torch.randn(8, 16), []

    class Counted(SkinnyMatMul):
        def gated_rows(self, x_TK: torch.Tensor) -> torch.Tensor:
            tried.append(len(x_TK))
            if len(x_TK) > 16:
                raise RuntimeError("out of resource: shared memory")
            return super().gated_rows(x_TK)

    assert Counted(weight, None, tiles, False).gating_rows() == {3, 4}
    assert tried == [4, 36]


def fused() -> None:
    """Norm, gate and addition inside products of one row, against ops of their own in float32."""
    for dtype, tolerance in TOLERANCE.items():
        for width, inner in ((40, 64), (9, 1100)):
            torch.manual_seed(inner)
            x, norm = torch.randn(1, inner).to(dtype), torch.rand(inner).to(dtype)
            weight = (torch.randn(2 * width, inner) / inner**0.5).to(dtype)
            residual = torch.randn(1, 2 * width).to(dtype)
            hidden = F.rms_norm(x.float(), (inner,), norm.float(), 1e-5)
            for bias in (None, torch.randn(2 * width).to(dtype)):
                wide = None if bias is None else bias.float()
                product = F.linear(hidden, weight.float(), wide)
                gate, up = product.chunk(2, -1)
                plain = F.linear(x.float(), weight.float(), wide)
                for tile in TILES:
                    one = SkinnyMatMul(weight, bias, (None, tile), False)
                    added = residual.clone()
                    one.add_to(added, x)
                    pairs = (
                        (one.normed(x, (norm, 1e-5)), product),
                        (one.gated(x, (norm, 1e-5)), F.silu(gate) * up),
                        (one.gated(x, None), F.silu(plain[:, :width]) * plain[:, width:]),
                        (added, residual.float() + plain),
                    )
                    for found, exact in pairs:
                        assert found.dtype is dtype
                        limit = 2 * tolerance
                        torch.testing.assert_close(found.float(), exact, atol=limit, rtol=limit)


def loading() -> None:
    """What is tried before the kernels are used."""
    found, why = load_skinny_here()
    assert found is not None and not found.dependent, why


def load_skinny_here() -> tuple[SkinnyProducts | None, str]:
    """Without the timer, which needs a device with events."""
    from tpinfer.layers import skinny

    setattr(skinny, "device_timer", lambda device: lambda calls: 1.0)  # noqa: B010
    return load_skinny(torch.device("cpu"))


def choices() -> None:
    """Own kernels where they are faster, one measurement a shape, torch's product for all else."""
    clock = iter(range(10**6))
    torch_is_slow = {"now": True}

    def time(calls: Sequence[Callable[[], object]]) -> float:
        """Of calls on weights apart from each other."""
        parts = [one for one in calls if isinstance(one, partial)]
        weights = [one.args[1] for one in parts]
        assert len(calls) == len(parts) == 16, "as many copies as are ever made"
        assert len({one.data_ptr() for one in weights}) == 16
        is_own = parts[0].func is not F.linear
        for call in calls[:2]:
            assert isinstance(call(), torch.Tensor)
        step = next(clock) * 1e-9
        return step + (1.0 if is_own == torch_is_slow["now"] else 2.0)

    weight, x = torch.randn(24, 40), torch.randn(MOST_ROWS + 1, 40)
    products = SkinnyProducts(time)
    matmul = products.bind(weight, None)
    assert set(products.chosen) == {(24, 40, rows) for rows in (1, 4, 16, 64)}
    assert all(products.chosen.values()) and "in 4 of 4 cases" in products.words()
    assert matmul.fuses
    assert "2.00 times torch's rate" in products.words()
    for rows in (1, 2, 3, 16, 17, 33, 64, 65):
        torch.testing.assert_close(matmul(x[:rows]), F.linear(x[:rows], weight))
    assert matmul(x[:0]).shape == (0, 24)
    before = next(clock)
    products.bind(torch.randn(24, 40), torch.randn(24))
    assert next(clock) == before + 1, "the shape is known"
    torch_is_slow["now"] = False
    products = SkinnyProducts(time)
    assert not products.bind(weight, None).fuses
    assert not any(products.chosen.values()) and "in 0 of 4 cases" in products.words()


def compiled() -> None:
    """For sm_90, without one, launched dependent and not."""
    for dtype in ("bf16", "fp32"):
        for dependent in (False, True):
            common: dict[str, object] = {"HAS_BIAS": True, "DEPENDENT": dependent}
            for tile in TILES[:2]:
                for kernel in (one_row, one_row_normed, one_row_added, one_row_gated):
                    is_gated = kernel is one_row_gated
                    halved = tile.columns // 2 if is_gated else tile.columns
                    constants = {"COLUMNS": halved, "INNER": tile.inner, **common}
                    constants |= {"NORMS": True} if is_gated else {}
                    compile_for_gpu(kernel, dtype, constants, tile.num_warps, 3)
            for rows in (16, 32, 64):
                for tile in (tiles_for(rows)[0], tiles_for(rows)[-1]):
                    constants = {
                        "ROWS": rows,
                        "SPLITS": tile.num_splits,
                        "COLUMNS": max(16, tile.columns),
                        **common,
                    }
                    constants["INNER"] = min(512, tile.inner)
                    constants["PRECISION"] = "ieee" if dtype == "fp32" else "tf32"
                    constants["LINE"] = 32 if dtype == "fp32" else 64
                    if dtype == "fp32" and rows > 16:
                        continue  # wider than shared memory: what does not compile is not chosen
                    made = compile_for_gpu(
                        few_rows, dtype, constants, tile.num_warps, tile.num_stages
                    )
                    assert ("prefetch.global.L2" in made) == dependent
                    constants["COLUMNS"] = max(16, tile.columns // 2)
                    compile_for_gpu(
                        few_rows_gated, dtype, constants, tile.num_warps, tile.num_stages
                    )


def compile_for_gpu(
    kernel, dtype: str, constants: dict[str, object], num_warps: int, num_stages: int
) -> str:
    """Its PTX."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = ("x", "weight", "bias", "norm", "out")
    signature = {
        name: "constexpr" if name in constants
        else f"*{dtype}" if name in pointers else KINDS.get(name, "i32")
        for name in kernel.arg_names
    }  # fmt: skip
    source = ASTSource(kernel, signature, constexprs=constants)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.asm["cubin"], "no machine code"
    assert ("griddepcontrol.wait" in made.asm["ptx"]) == constants["DEPENDENT"]
    return made.asm["ptx"]


if __name__ == "__main__":
    globals()[CASE]()
    print(f"{CASE} agrees")
