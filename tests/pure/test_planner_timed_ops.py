"""Steps priced by ops that a probe timed in steps: their times sum, and are filed as before."""

from dataclasses import replace

import pytest
from hypothesis import given

from tests.pure.test_planner_step_model import CARD, PAIR, SPEC, WORDS, sequences, sums
from tpinfer.config.dtypes import DType
from tpinfer.config.measured import OpTime
from tpinfer.costs.ledger import CostLedger
from tpinfer.costs.ops import OpKind, StepAggregates
from tpinfer.planner.kernel_times import DeviceTimes
from tpinfer.planner.precision import precision_named
from tpinfer.planner.step_model import StepModel
from tpinfer.planner.traits import Traits
from tpinfer.sharding.partition import partition_model

BF16 = DType.BFLOAT16
PROBED = Traits(mode="probe")
LEDGER = CostLedger(SPEC, partition_model(SPEC, 2), 0, BF16, BF16)
LINEAR = OpTime("linear", BF16, 9e-6, rates={1: 1e12, 8: 8e12, 64: 40e12})
ATTENTION = OpTime("attention", BF16, 7e-6, 2e-6, 1e12, 100e12)
NORM = OpTime("norm", BF16, 6e-6)
TIMED = replace(CARD, ops={op.kind: op for op in (LINEAR, ATTENTION, NORM)})


def model(
    device: DeviceTimes = TIMED, traits: Traits = PROBED, precision: str = "bf16"
) -> StepModel:
    """Two ranks, of the same ledger."""
    return StepModel(LEDGER, device, PAIR, traits, precision_named(precision))


def seconds_of(kind: OpKind, op: OpTime, step: StepAggregates) -> float:
    """The sum over the ledger's ops of a kind, op by op, as `OpTime` says."""
    total = 0.0
    for name in LEDGER.op_ids():
        cost = LEDGER.cost(name, step)
        if LEDGER.kind(name) is not kind or not cost.flops + cost.bytes_moved:
            continue
        rows = step.rows if name == "head" else step.tokens
        total += op.floor_s + op.row_s * step.rows
        total += cost.bytes_moved / op.bytes_per_s if op.bytes_per_s else 0.0
        rate = op.rates.get(rows) or op.flops_per_s
        total += cost.flops / rate if rate else 0.0
    return total


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_a_step_takes_what_its_ops_took(rows: int) -> None:
    step = sums([(1, 512)] * rows)
    kinds = {OpKind.LINEAR: LINEAR, OpKind.ATTENTION: ATTENTION, OpKind.NORM: NORM}
    named = {kind.value: kind for kind in kinds}
    for kind, op in kinds.items():
        others = {name: one for name, one in TIMED.ops.items() if named[name] is not kind}
        without = model(replace(TIMED, ops=others | {kind.value: OpTime(kind.value, BF16)}))
        found = model().step(step).total - without.step(step).total
        assert found == pytest.approx(seconds_of(kind, op, step), rel=1e-9)


@given(sequences)
def test_words_sum_and_are_none_below_zero(pairs: list[tuple[int, int]]) -> None:
    found = model().step(sums(pairs))
    assert found.total == pytest.approx(sum(getattr(found, word) for word in WORDS))
    assert min(getattr(found, word) for word in WORDS) >= 0


def test_thin_linears_are_memorys_and_thick_ones_arithmetics() -> None:
    only = model(replace(CARD, ops={"linear": LINEAR}))
    thin, thick = only.step(sums([(1, 64)])), only.step(sums([(4096, 4096)]))
    assert thin.memory > 10 * thin.compute
    assert thick.compute > thick.memory


def test_between_known_rows_a_linear_lies_between_their_times() -> None:
    only = model(replace(CARD, ops={"linear": LINEAR}))
    times = [only.step(sums([(1, 8)] * rows)).total for rows in (8, 20, 64)]
    assert times == sorted(times)

    step = sums([(1, 512)] * 4)
    assert model(traits=Traits()).step(step) == model(CARD, Traits()).step(step)
    quantized = model(replace(TIMED, ops={"linear": LINEAR}), precision="int8").step(step)
    # The head stays in the compute dtype, so it alone is priced as it was measured.
    cost = LEDGER.cost("head", step)
    head_s = LINEAR.floor_s + cost.flops / (1e12 + 3 / 7 * 7e12)
    rates = model(CARD, precision="int8").step(step).total
    assert abs(quantized.total - rates - head_s) < cost.bytes_moved / 1e12
    small = replace(CARD.main_memory, name="L2", capacity_bytes=1 << 50)
    cached = replace(TIMED, memory=(small, CARD.main_memory))
    assert model(cached).step(step) == model(replace(cached, ops={})).step(step)


def test_sums_take_what_they_took_in_steps() -> None:
    reduce = OpTime("reduce", BF16, 30e-6, bytes_per_s=5e9)
    gather = OpTime("gather", BF16, 40e-6)
    links = replace(PAIR, ops={"reduce": reduce, "gather": gather})
    own = StepModel(LEDGER, TIMED, links, PROBED, precision_named("bf16"))
    step = sums([(1, 64)] * 4)
    found = own.step(step).communication
    sent = [LEDGER.cost(op, step).bytes_sent for op in LEDGER.op_ids()]
    kinds = [LEDGER.kind(op) for op in LEDGER.op_ids()]
    wanted = sum(
        30e-6 + b / 5e9 if kind is OpKind.REDUCE else 40e-6
        for kind, b in zip(kinds, sent, strict=True)
        if b
    )
    assert found == pytest.approx(wanted, rel=1e-6)
