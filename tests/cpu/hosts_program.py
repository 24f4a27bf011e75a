"""Rank programs whose ranks sit on pretended hosts: the seats say so, the wires believe it, and all
of it happens on loopback."""

import os
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.cpu import collective_cases
from tpinfer.config.environment import read_environment
from tpinfer.launching.seat import Seat, seat_from_environment

TOKEN = "0123456789abcdef"


def host_variables(
    rank: int, world: int, per_host: int, run_id: str, port: int, **changed: str
) -> dict[str, str]:
    """What a launcher gives rank `rank`, where a host has `per_host` ranks."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank % per_host),
        "LOCAL_WORLD_SIZE": str(per_host),
        "GROUP_RANK": str(rank // per_host),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TPINFER_LAUNCHER": "tpinfer",
        "TPINFER_PLAN_PORT": str(port),
        "TPINFER_TOKEN": TOKEN,
        **changed,
    }


def sit(seat: Seat, per_host: int, port: int, changed: dict[str, dict[str, str]]) -> Seat:
    """A rank's seat on its pretended host. `changed` are variables of single ranks."""
    own = changed.get(str(seat.rank), {})
    os.environ.update(host_variables(seat.rank, seat.world, per_host, seat.run_id, port, **own))
    return seat_from_environment(read_environment(), "cpu")


def collectives(seat: Seat, per_host: int, port: int, wanted: str = "auto") -> list[Any]:
    """[digest and wrong sums, names of wrong exchanges, addresses that were listened on]."""
    found: list[Any] = []
    cases = (
        lambda placed: collective_cases.close_sums(placed, wanted),
        lambda placed: collective_cases.exchanges(placed, [wanted]),
        lambda placed: collective_cases.listening(placed, wanted),
    )
    for generation, case in enumerate(cases):
        restarted = {str(seat.rank): {"TORCHELASTIC_RESTART_COUNT": str(generation)}}
        found.append(case(sit(seat, per_host, port, restarted)))
    return found


def joins(
    seat: Seat, per_host: int, port: int, changed: dict[str, dict[str, str]],
    timeout_s: float, wanted: str = "auto",
) -> str:  # fmt: skip
    """What opening a group ends with: its backend, or the error."""
    try:
        with collective_cases.open_backend(
            sit(seat, per_host, port, changed), wanted, timeout_s
        ) as group:
            group.barrier()
            return group.name
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def tokens(
    seat: Seat, per_host: int, port: int, model: str | None = None, dies: list[int] | None = None
) -> dict[str, Any] | None:
    """Greedy tokens of a few requests, and what was chosen; `dies` is a rank and the step in which
    it is killed."""
    from tpinfer.config.dtypes import DType
    from tpinfer.config.engine import EngineConfig
    from tpinfer.config.sampling import SamplingParams
    from tpinfer.embedded.locate import embedded_model
    from tpinfer.engine.rank_engine import open_engine
    from tpinfer.engine.requests import GenerationRequest

    placed = sit(seat, per_host, port, {})
    config = EngineConfig(
        model_dir=embedded_model() if model is None else Path(model),
        tp=placed.world,
        dtype=DType.FLOAT32,
        wait_timeout_s=60,
        kv_bytes=1 << 22,
    )
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    prompts = [[5, 6, 7], [9], list(range(3, 43)), [90, 80, 70, 60]]
    with closing(open_engine(config, placed)) as engine:
        if dies is not None and dies[0] == placed.rank:
            _kill_in_step(engine._assembly.worker, dies[1])
        if placed.rank:
            engine.serve()
            return None
        found: list[list[int]] = [[] for _ in prompts]
        for event in engine.generate([GenerationRequest(prompt, params) for prompt in prompts]):
            found[event.index].append(event.token_id)
        engine.scheduler.check_idle()
        return {"tokens": found, "choices": list(engine.report().choices)}


def _kill_in_step(worker: Any, at_step: int) -> None:
    issue, calls = worker.issue, 0

    def counted(plan: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return issue(plan)

    worker.issue = counted
