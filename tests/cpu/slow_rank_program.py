"""Rank program of test_attribution_ranks: one rank sleeps before chosen ops."""

import time
from contextlib import closing
from typing import Any

from tpinfer.launching.seat import Seat

NUM_TOKENS = 6
PROMPT = [5, 6, 7, 8, 9]


def generate_slowly(
    seat: Seat, slow_rank: int, delay_ms: float, op_endings: list[str]
) -> dict[str, Any] | int:
    """Rank 0 returns attribution, table and choices of one run; other ranks how often they slept.

    `slow_rank` sleeps `delay_ms` before each op whose id ends in one of `op_endings`.
    """
    from tpinfer.cli.attribution_table import render_run
    from tpinfer.config.dtypes import DType
    from tpinfer.config.engine import EngineConfig
    from tpinfer.config.sampling import SamplingParams
    from tpinfer.embedded.locate import embedded_model
    from tpinfer.engine.rank_engine import open_engine
    from tpinfer.engine.requests import GenerationRequest
    from tpinfer.layers.step_inputs import Activations, Op, StepInputs

    slept = 0

    def delayed(op: Op) -> Op:
        def call(acts: Activations, step: StepInputs) -> None:
            nonlocal slept
            slept += 1
            time.sleep(delay_ms / 1e3)
            op.call(acts, step)

        return Op(op.id, call)

    config = EngineConfig(
        model_dir=embedded_model(), tp=seat.world, dtype=DType.FLOAT32, wait_timeout_s=60
    )
    with closing(open_engine(config, seat)) as engine:
        worker = engine._assembly.worker
        if seat.rank == slow_rank:
            endings = tuple(op_endings)
            worker.program = [
                delayed(op) if op.id.endswith(endings) else op for op in worker.program
            ]
        if seat.rank:
            engine.serve()
            return slept
        params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        tokens = [event.token_id for event in engine.generate([GenerationRequest(PROMPT, params)])]
        (result,) = engine.results()
        assert result.attribution is not None and result.token_ids == tokens
        report = engine.report()
        return {
            "slept": slept,
            "attribution": result.attribution.to_json(),
            "table": render_run(report),
            "choices": list(report.choices),
        }
