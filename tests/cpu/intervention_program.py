"""Rank program of test_interventions: generate and record while something is wrong on purpose.

    python -m tests.cpu.intervention_program '{"directory": ..., "tp": 2, "delay_us": 250, ...}'

delay_us: rank `delay_rank` busy-waits that long before each op named in `delay_ops` (endings of
op ids), and writes how long it really did, per op and step, to delays.json. When each rank came
to each `mlp.reduce` goes to arrivals-<rank>.json, on the host's clock. schedule_us: rank 0's
scheduler takes that much longer a step. shape: random weights of that shape, not the story model.
num_tokens, num_steps, num_skipped: how much is generated and recorded. Prints the median decode
step of rank 0 in ns.
"""

import json
import statistics
import sys
from contextlib import closing
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from tpinfer.config.environment import read_environment
from tpinfer.launching.guard import guard_rank, run_rank
from tpinfer.launching.ranks import launch
from tpinfer.launching.seat import Seat, seat_from_environment


def busy_wait(duration_us: float) -> int:
    """Hold the core: sleeping would hand it to the other rank. Returns the ns it really took."""
    began = perf_counter_ns()
    until = began + int(duration_us * 1e3)
    while (now := perf_counter_ns()) < until:
        continue
    return now - began


def delayed(op: Any, duration_us: float, taken_ns: list[int]) -> Any:
    """The op, later; how much later goes to `taken_ns`, a step an entry."""
    from tpinfer.layers.step_inputs import Op

    def call(acts: Any, step: Any) -> None:
        taken_ns.append(busy_wait(duration_us))
        op.call(acts, step)

    return Op(op.id, call)


def witnessed(op: Any, arrivals_ns: list[int]) -> Any:
    """The collective, with the moment this rank came to it; a step an entry."""
    from tpinfer.layers.step_inputs import Op

    def call(acts: Any, step: Any) -> None:
        arrivals_ns.append(perf_counter_ns())
        op.call(acts, step)

    return Op(op.id, call)


def run(seat: Seat, wanted: dict[str, Any]) -> int:
    """One rank's life."""
    from tpinfer.config.dtypes import DType
    from tpinfer.config.engine import EngineConfig, RecordingRequest
    from tpinfer.config.sampling import SamplingParams
    from tpinfer.embedded.locate import embedded_model, shape_directory
    from tpinfer.engine.rank_engine import open_engine
    from tpinfer.engine.requests import GenerationRequest

    shape = wanted.get("shape")
    config = EngineConfig(
        model_dir=shape_directory(shape) if shape else embedded_model("story"),
        load_format="random" if shape else "auto",
        tp=seat.world,
        dtype=DType.FLOAT32,
        collective=wanted.get("collective", "auto"),
        wait_timeout_s=60,
    )
    with closing(open_engine(config, seat)) as engine:
        worker = engine._worker
        taken: dict[str, list[int]] = {}
        if wanted.get("delay_us") and seat.rank == wanted["delay_rank"]:
            endings = tuple(wanted["delay_ops"])
            taken = {op.id: [] for op in worker.program if op.id.endswith(endings)}
            worker.program = [
                delayed(op, wanted["delay_us"], taken[op.id]) if op.id in taken else op
                for op in worker.program
            ]
        arrivals = {op.id: [] for op in worker.program if op.id.endswith(".mlp.reduce")}
        worker.program = [
            witnessed(op, arrivals[op.id]) if op.id in arrivals else op for op in worker.program
        ]
        directory = Path(wanted["directory"])
        if seat.rank:
            engine.serve()
            if taken:
                (directory / "delays.json").write_text(json.dumps(taken))
            (directory / f"arrivals-{seat.rank}.json").write_text(json.dumps(arrivals))
            return 0
        if wanted.get("schedule_us"):
            schedule = engine._scheduler.schedule

            def slow_schedule(now_ns: int) -> Any:
                busy_wait(wanted["schedule_us"])
                return schedule(now_ns)

            engine._scheduler.schedule = slow_schedule
        params = SamplingParams(temperature=0.0, max_tokens=wanted["num_tokens"], ignore_eos=True)
        num_prompts = wanted.get("num_prompts", 1)
        requests = [GenerationRequest([5 + i, 6, 7, 8], params) for i in range(num_prompts)]
        engine.record(RecordingRequest(directory, wanted["num_skipped"], wanted["num_steps"]))
        for _ in engine.generate(requests):
            continue
        engine.write_recording(["intervention"])
        (directory / "arrivals-0.json").write_text(json.dumps(arrivals))
        report = engine.report()
        assert report.decode is not None
        (directory / "counters.json").write_text(json.dumps(report.decode.to_json()))
        results = engine.results()
        assert results[0].timing is not None
        print(int(statistics.median(results[0].timing.itl_s) * 1e9), flush=True)
    return 0


def main() -> int:
    """Launcher or rank."""
    environment = read_environment()
    wanted = json.loads(sys.argv[1])
    if environment.rank is None and wanted["tp"] > 1:
        return launch(
            sys.argv[1:],
            wanted["tp"],
            module="tests.cpu.intervention_program",
            preload=("torch", "tpinfer.engine.rank_engine"),
            reads_stdin=False,
        )
    seat = seat_from_environment(environment, "cpu")
    guard_rank(seat)
    return run_rank(seat, environment, lambda: run(seat, wanted))


if __name__ == "__main__":
    sys.exit(main())
