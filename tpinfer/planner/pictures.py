"""Numbers behind a plan's pictures and its sentences: prefill time by context, scaling over
tensor-parallel ranks, and where prefill and decode lie under the roofline."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tpinfer.costs.ops import OpKind, StepAggregates, aggregate
from tpinfer.planner.placement import EngineSettings, num_devices
from tpinfer.planner.plan import Plan
from tpinfer.planner.precision import Precision
from tpinfer.planner.predict import Planner
from tpinfer.planner.step_model import StepModel

_LENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


@dataclass(frozen=True, slots=True)
class PrefillLaw:
    """Time of a lone prompt of n tokens, as `fixed + linear * n + quadratic * n**2` seconds."""

    input_len: int
    fixed_s: float
    linear_s: float
    quadratic_s: float

    def parts_s(self, num_tokens: int) -> tuple[float, float, float]:
        """The three terms at a length."""
        return self.fixed_s, self.linear_s * num_tokens, self.quadratic_s * num_tokens**2

    def to_json(self) -> dict[str, object]:
        """JSON values."""
        return {
            "input_len": self.input_len,
            "fixed_s": self.fixed_s,
            "linear_s_per_token": self.linear_s,
            "quadratic_s_per_token2": self.quadratic_s,
        }


def prefill_law(model: StepModel, input_len: int, chunk: int) -> PrefillLaw:
    """Least squares over prompts from a quarter to twice `input_len`, in chunks of `chunk`; terms
    are not negative."""
    lengths = sorted({max(1, round(input_len * share)) for share in _LENGTHS})
    times = [prefill_s(model, length, chunk) for length in lengths]
    columns = np.array([[1.0, n, n * n] for n in map(float, lengths)])
    kept, found = [0, 1, 2], np.zeros(3)
    while kept:  # a term that came out negative is left out, and the others fitted again
        solved = np.linalg.lstsq(columns[:, kept], np.array(times), rcond=None)[0]
        if (solved >= 0).all():
            found[kept] = solved
            break
        kept.remove(kept[int(solved.argmin())])
    return PrefillLaw(input_len, *(float(value) for value in found))


def prefill_s(model: StepModel, num_tokens: int, chunk: int) -> float:
    """A prompt by itself."""
    total, done, window = 0.0, 0, model.ledger.spec.sliding_window
    while done < num_tokens:
        count = min(chunk, num_tokens - done)
        done += count
        total += model.step(aggregate([count], [done], int(done == num_tokens), 0, window)).total
    return total


def scaling(planner: Planner, settings: EngineSettings, is_free: bool = True) -> list[Plan]:
    """The same load on 1, 2, 4 ... tensor-parallel ranks of one replica; with those too small to
    hold it. `is_free`: each with the tokens of a step that the runtime chooses for it."""
    found, tp = [], 1
    heads = planner.spec.num_heads
    while tp <= min(num_devices(planner.topology), heads):
        if heads % tp == 0:
            sizes = tp, 1, 1
            own = planner.with_chunk(sizes, settings) if is_free else settings
            found.append(planner.simulate(planner.fit(sizes, own), own))
        tp *= 2
    return found


@dataclass(frozen=True, slots=True)
class RoofPoint:
    """One kind of step on one rank."""

    name: str
    flops: float
    bytes_moved: float
    time_s: float
    bound: str
    """The largest of its words."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """Two ceilings and what lies under them."""

    flops_per_s: Mapping[str, float]
    bytes_per_s: Mapping[str, float]
    points: tuple[RoofPoint, ...]


def roofline(planner: Planner, plan: Plan) -> Roofline:
    """Prefill of one chunk, and a decode step of the requests that run at once, on the slowest
    rank."""
    fit = planner.fit((plan.tp, plan.pp, plan.dp), plan.settings)
    model, work = planner.model(fit.placement), planner.workload
    window = planner.spec.sliding_window
    chunk = min(work.input_len, plan.settings.max_num_batched_tokens)
    count = max(1, round(plan.num_running / (plan.pp * plan.dp)))
    context = work.input_len + work.output_len // 2
    steps = {
        f"prefill of {chunk} tokens": aggregate([chunk], [chunk], 1, 0, window),
        f"decode of {count} at {context} tokens": aggregate(
            [1] * count, [context] * count, count, 0, window
        ),
    }
    device, product = model.device, model.precision.product
    names = dict.fromkeys((product, str(model.ledger.compute_dtype)))
    return Roofline(
        {str(name): device.rate(name) for name in names},
        {device.main_memory.name: device.main_memory.bytes_per_s},
        tuple(_point(name, model, sums, planner.precision) for name, sums in steps.items()),
    )


def _point(name: str, model: StepModel, sums: StepAggregates, precision: Precision) -> RoofPoint:
    cost = model.ledger.step_cost(sums)
    local = {kind: one for kind, one in cost.items() if not kind.is_collective}
    flops = sum(one.flops for one in local.values())
    moved = sum(one.bytes_moved for one in local.values()) - _saved_bytes(model, precision)
    split = model.step(sums)
    words = {"compute": split.compute, "memory": split.memory, "latency": split.small_kernels}
    return RoofPoint(name, flops, moved, split.total, max(words, key=lambda word: words[word]))


def _saved_bytes(model: StepModel, precision: Precision) -> float:
    """Weight bytes that the ledger counts at the compute dtype and that are stored in less."""
    ledger = model.ledger
    if precision.weight_bytes >= ledger.compute_dtype.num_bytes:
        return 0.0
    read = 0.0
    for op in ledger.op_ids():
        if ledger.kind(op) is OpKind.LINEAR and op != "head":
            read += dict(ledger.op_formula(op).bytes_read.coefficients).get(0, 0.0)
    return read * (1 - precision.weight_bytes / ledger.compute_dtype.num_bytes)
