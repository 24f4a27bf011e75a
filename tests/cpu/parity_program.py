"""Rank program of test_parity: greedy tokens of every checkpoint in a directory, as JSON.

    python -m tests.cpu.parity_program CHECKPOINTS OUT.json TP [COLLECTIVE]

Starts its own ranks. One process opens one engine per checkpoint, one after the other.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from tpinfer.config.environment import read_environment
from tpinfer.config.errors import ConfigError
from tpinfer.launching.guard import guard_rank, run_rank
from tpinfer.launching.ranks import launch
from tpinfer.launching.seat import Seat, seat_from_environment

MAX_TOKENS = 24


def run_all(seat: Seat, checkpoints: Path, out: Path, collective: str) -> int:
    """Generate with every checkpoint; rank 0 writes {name: [tokens per prompt]}."""
    from tpinfer.config.dtypes import DType
    from tpinfer.config.engine import EngineConfig
    from tpinfer.config.sampling import SamplingParams
    from tpinfer.engine.rank_engine import open_engine
    from tpinfer.engine.requests import GenerationRequest

    prompts = json.loads((checkpoints / "prompts.json").read_text())
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    found: dict[str, object] = {}
    directories = sorted(path for path in checkpoints.iterdir() if path.is_dir())
    for generation, directory in enumerate(directories):
        config = EngineConfig(
            model_dir=directory,
            tp=seat.world,
            dtype=DType.FLOAT32,
            block_size=4,
            max_num_seqs=4,
            max_num_batched_tokens=16,  # prompts are prefilled in chunks, beside decodes
            collective=collective,  # pyright: ignore[reportArgumentType]
            wait_timeout_s=60,
        )
        try:
            engine = open_engine(config, replace(seat, generation=generation))
        except ConfigError as error:
            found[directory.name] = str(error)
            continue
        if seat.rank:
            engine.serve()
        else:
            requests = [GenerationRequest(prompt, params) for prompt in prompts]
            tokens: list[list[int]] = [[] for _ in prompts]
            for event in engine.generate(requests):
                tokens[event.index].append(event.token_id)
            found[directory.name] = tokens
        engine.close()
    if seat.rank == 0:
        out.write_text(json.dumps(found))
    return 0


def main() -> int:
    """Launcher or rank."""
    environment = read_environment()
    checkpoints, out, tp = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    collective = sys.argv[4] if len(sys.argv) > 4 else "auto"
    if environment.rank is None and tp > 1:
        return launch(
            sys.argv[1:],
            tp,
            module="tests.cpu.parity_program",
            preload=("torch", "tpinfer.engine.rank_engine"),
            reads_stdin=False,
        )
    seat = seat_from_environment(environment, "cpu")
    guard_rank(seat)
    return run_rank(seat, environment, lambda: run_all(seat, checkpoints, out, collective))


if __name__ == "__main__":
    sys.exit(main())
