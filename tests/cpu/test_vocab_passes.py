"""Compiled passes over logits against plain torch's, to the bit, and masses against exp."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpinfer.decoding.masses import CHUNK, MASS_BITS, Scale, masses
from tpinfer.decoding.native_passes import NativePasses, load_native_passes
from tpinfer.decoding.ordered_keys import NAN_KEY
from tpinfer.decoding.vocab_passes import TorchPasses
from tpinfer.numerics.native_library import find_compiler

PLAIN = TorchPasses()
ODD_VALUES = [0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 1e-45, 3.4e38, -3.4e38]


@pytest.fixture(scope="module")
def native() -> NativePasses:
    """On two threads."""
    passes, reason = load_native_passes(2)
    if passes is None:
        assert find_compiler() is None, reason
        pytest.skip(reason)
    return passes


def scale_of(
    logits: torch.Tensor, rows: Sequence[int], factor: float, min_p: float, cut: int | None
) -> Scale:
    """One scale for all rows; a cut behind the token `cut` places down the row's order."""
    some = logits[torch.tensor(rows)]
    ones = torch.ones(len(rows), 1)
    value, last = None, None
    if cut is not None:
        order = torch.sort(some, descending=True, stable=True)
        value, last = order.values[:, cut : cut + 1], order.indices[:, cut : cut + 1] + 7
    return Scale(some.amax(-1, keepdim=True), factor * ones, min_p * ones, min_p, value, last)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_compiled_passes_give_the_bits_of_torch(native: NativePasses, data: st.DataObject) -> None:
    width = data.draw(st.sampled_from((1, 2, 127, 128, 129, 700, 1024, 2049)))
    num_rows = data.draw(st.integers(1, 4))
    rows = data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, unique=True).map(sorted))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    spread = data.draw(st.sampled_from((0.0, 1e-3, 1.0, 8.0, 1e4)))
    # A view with a longer stride, as one rank's columns of a wider tensor are.
    logits = (spread * torch.randn(num_rows, width + 5, generator=generator))[:, 3 : 3 + width]
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, num_rows - 1)), data.draw(st.integers(0, width - 1))
        logits[place] = data.draw(st.sampled_from(ODD_VALUES))
    factor = data.draw(st.sampled_from((1.0, 0.4, 1.25, 100.0, 3e38)))
    min_p = data.draw(st.sampled_from((0.0, 0.05, 1.0)))
    cut = data.draw(st.none() | st.integers(0, width - 1))
    of = logits, rows, scale_of(logits, rows, factor, min_p, cut), 7

    assert torch.equal(native.best_keys(logits, rows, 7), PLAIN.best_keys(logits, rows, 7))
    assert torch.equal(native.row_masses(*of), PLAIN.row_masses(*of))
    sums = native.local_sums(*of)
    assert torch.equal(sums, PLAIN.local_sums(*of))
    share = data.draw(st.sampled_from((0.0, 0.3, 0.999999, 1.0)))
    places = (sums.sum(-1).double() * share).long()
    found = native.tokens_at(*of[:3], sums, places, 7)
    assert torch.equal(found, PLAIN.tokens_at(*of[:3], sums, places, 7))
    assert ((found >= 7) & (found < 7 + width)).all()


def test_many_logits_go_over_threads(native: NativePasses) -> None:
    logits = torch.randn(5, 40_000, generator=torch.Generator().manual_seed(3)) * 4
    rows = [0, 2, 4]
    of = logits, rows, scale_of(logits, rows, 1.0, 0.0, None), 0
    assert torch.equal(native.local_sums(*of), PLAIN.local_sums(*of))
    assert torch.equal(native.row_masses(*of), PLAIN.row_masses(*of))
    assert torch.equal(native.best_keys(logits, rows, 0), PLAIN.best_keys(logits, rows, 0))


def test_masses_are_those_of_exp() -> None:
    logits = torch.linspace(-35.0, 0.0, 20_001).unsqueeze(0)
    one = torch.ones(1, 1)
    found = masses(logits, Scale(0 * one, one, 0 * one, 0.0)).double()
    exact = torch.exp(logits.double()) * 2.0**MASS_BITS
    assert ((found - exact).abs() <= 1 + 4e-7 * exact).all()
    assert found[0, -1] == 2**MASS_BITS
    assert (found[logits < -29.2] == 0).all()


@pytest.mark.parametrize("value", [math.nan, -math.nan])
def test_a_number_that_is_none_comes_first(native: NativePasses, value: float) -> None:
    logits = torch.zeros(2, CHUNK * 9)
    logits[1, 1100] = value
    for passes in (native, PLAIN):
        assert passes.best_keys(logits, [0, 1], 0).eq(NAN_KEY).flatten().tolist() == [False, True]


def test_columns_that_do_not_adjoin_are_refused(native: NativePasses) -> None:
    with pytest.raises(ValueError, match=r"strides \(1, 4\).*contiguous\(\)"):
        native.best_keys(torch.zeros(8, 4).T, [0], 0)
    with pytest.raises(ValueError, match="bfloat16"):
        native.best_keys(torch.zeros(1, 8, dtype=torch.bfloat16), [0], 0)
