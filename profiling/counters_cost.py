"""What the always-on counters cost a step: the clock after every op, the host's spans, the record.

    python profiling/counters_cost.py [story|shape:NAME]

Times the counters' own work alone (the same calls around ops that do nothing, less those ops),
since it is far below what two runs of a model differ by, and gives it as a share of the model's
median decode step at tp=1. The target is 0.5 %.
"""

import argparse
import statistics
from time import perf_counter_ns

from tpinfer.config.environment import calm_thread_pools
from tpinfer.config.model_name import is_shape, model_directory

ROUNDS, STEPS = 9, 300


def main() -> None:
    """Measure and print."""
    calm_thread_pools()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="story")
    args = parser.parse_args()
    from tpinfer.bench.offline import requests_of, run_batch
    from tpinfer.bench.workload import RandomWorkload
    from tpinfer.config.dtypes import DType
    from tpinfer.config.engine import EngineConfig
    from tpinfer.costs.ops import aggregate
    from tpinfer.engine.rank_engine import open_engine
    from tpinfer.launching.seat import Seat
    from tpinfer.layers.step_inputs import Op
    from tpinfer.steps.plan import StepPlan
    from tpinfer.worker.host_spans import HostSpans
    from tpinfer.worker.timing import run_timed
    from tpinfer.worker.worker import _record

    config = EngineConfig(
        model_dir=model_directory(args.model),
        load_format="random" if is_shape(args.model) else "auto",
        dtype=DType.FLOAT32,
    )
    engine = open_engine(config, Seat(0, 1, 0, 1, "cpu", "counters-cost", 0, "single"))
    vocab = engine._assembly.spec.vocab_size
    run_batch(engine, requests_of(RandomWorkload(1, 32, 4).samples(vocab)))
    run = run_batch(engine, requests_of(RandomWorkload(1, 32, 40).samples(vocab, 1)))
    step_us = statistics.median(run.timings[0].itl_s) * 1e6
    num_ops = len(engine._worker.program)
    aggregates = aggregate([1], [40], num_logit_rows=1)
    engine.close()

    program = [Op(f"op.{i}", lambda acts, step: None) for i in range(num_ops)]
    plan = StepPlan(0, (0,), (1,), (1,))
    costs = []
    for _ in range(ROUNDS):
        spans = HostSpans()
        began = perf_counter_ns()
        for _ in range(STEPS):
            for op in program:
                op.call(None, None)  # pyright: ignore[reportArgumentType]
        bare_ns = perf_counter_ns() - began
        began = perf_counter_ns()
        for _ in range(STEPS):
            with spans.part("schedule"):
                started = perf_counter_ns()
            times = run_timed(program, None, None)  # pyright: ignore[reportArgumentType]
            spans.add("prepare", started, times.start_ns)
            with spans.part("schedule"):
                _record(plan, aggregates, times, perf_counter_ns(), started)
        costs.append((perf_counter_ns() - began - bare_ns) / STEPS / 1e3)
    cost_us = statistics.median(costs)
    print(
        f"{args.model}: counters cost {cost_us:.2f} us a step of {num_ops} ops, "
        f"{100 * cost_us / step_us:.2f} % of its {step_us:.0f} us"
    )


if __name__ == "__main__":
    main()
