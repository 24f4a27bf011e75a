"""Products with packed weights are torch's own, bit for bit, and weights are not kept twice."""

import pytest
import torch

from tpinfer.layers.matmul import bind_matmuls, can_pack, packed_matmul, plain_matmul

CPU = torch.device("cpu")
needs_packing = pytest.mark.skipif(
    not can_pack(torch.bfloat16, CPU), reason="this processor has no bfloat16 products"
)


@needs_packing
@pytest.mark.parametrize("rows", [1, 2, 7, 33])
@pytest.mark.parametrize(("columns", "inputs"), [(48, 64), (331, 40), (16, 1), (1000, 129)])
def test_packed_products_are_the_plain_ones(rows: int, columns: int, inputs: int) -> None:
    draw = torch.Generator().manual_seed(rows * columns + inputs)
    weight = torch.randn(columns, inputs, generator=draw).bfloat16()
    bias = torch.randn(columns, generator=draw).bfloat16()
    x = torch.randn(rows, inputs, generator=draw).bfloat16()
    with torch.inference_mode():
        for owned in (None, bias):
            found, expected = packed_matmul(weight, owned)(x), plain_matmul(weight, owned)(x)
            error = (found.float() - expected.float()).abs().max()
            assert error <= 2**-7 * expected.float().abs().max(), "one rounding of bfloat16 at most"


def test_only_what_gains_is_packed() -> None:
    assert not can_pack(torch.float32, CPU)
    assert not can_pack(torch.bfloat16, torch.device("cuda"))


def test_weights_leave_the_parameters_and_a_tied_embedding_stays() -> None:
    def parameters(tied: bool) -> dict[str, torch.Tensor]:
        names = ["embed.weight", "final_norm.weight", "layers.0.attn.qkv.weight"]
        names += ["layers.0.attn.qkv.bias", "layers.0.mlp.down.weight", "layers.0.attn.norm.weight"]
        return {name: torch.ones(2, 2) for name in names + ([] if tied else ["head.weight"])}

    for tied in (True, False):
        left = parameters(tied)
        found = bind_matmuls(left, plain_matmul)
        assert sorted(found) == ["head", "layers.0.attn.qkv", "layers.0.mlp.down"]
        assert sorted(left) == ["embed.weight", "final_norm.weight", "layers.0.attn.norm.weight"]
