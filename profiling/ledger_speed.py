"""Time to price one step with the cost ledger, in closed form.

    python profiling/ledger_speed.py

Prints the median, in us, of `step_cost` for decode steps of a 32-layer 8B shape on 8 ranks, and of
the sum over its ops that it stands for. The target is 20 us: the scheduler and the live metrics
price every step.
"""

import statistics
import sys
import time
from collections.abc import Callable

from tpinfer.config.dtypes import DType
from tpinfer.config.huggingface import read_model_spec
from tpinfer.costs.ledger import CostLedger
from tpinfer.costs.ops import StepAggregates, aggregate
from tpinfer.embedded.locate import shape_directory
from tpinfer.sharding.partition import partition_model

TARGET_US = 20.0
ROUNDS = 2000
NUM_SEQUENCES, CONTEXT = 32, 2000


def median_us(price: Callable[[StepAggregates], object], rounds: int) -> float:
    """Median time of a call, each with a step of its own."""
    took_us = []
    for growth in range(rounds):
        context = [CONTEXT + growth] * NUM_SEQUENCES
        sums = aggregate([1] * NUM_SEQUENCES, context, NUM_SEQUENCES)
        began_ns = time.perf_counter_ns()
        price(sums)
        took_us.append((time.perf_counter_ns() - began_ns) / 1e3)
    return statistics.median(took_us)


def main() -> int:
    """Measure and print."""
    spec = read_model_spec(shape_directory("llama-3.1-8b"))
    assert spec.num_layers == 32, "the target is stated for 32 layers"
    ledger = CostLedger(spec, partition_model(spec, 8), 0, DType.BFLOAT16, DType.BFLOAT16)
    ids = ledger.op_ids()
    closed_us = median_us(ledger.step_cost, ROUNDS)
    listed_us = median_us(lambda sums: [ledger.cost(op, sums) for op in ids], ROUNDS // 20)
    print(f"step_cost, {spec.num_layers} layers: median {closed_us:.1f} us (target {TARGET_US} us)")
    print(f"sum over its {len(ids)} ops: median {listed_us:.0f} us")
    return 0 if closed_us <= TARGET_US else 1


if __name__ == "__main__":
    sys.exit(main())
