"""A rank other than 0 of a program that is rank 0 itself: `python -m tpinfer.engine.follower
CONFIG`, started by `launching.followers`."""

import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from tpinfer.config.engine import EngineConfig
from tpinfer.config.environment import calm_thread_pools, read_environment
from tpinfer.launching.guard import guard_rank, leave, run_rank
from tpinfer.launching.seat import Seat, seat_from_environment


def config_argument(config: EngineConfig) -> str:
    """A configuration as one argument."""
    return msgspec.json.encode(config, enc_hook=str).decode()


def _from_argument(text: str) -> EngineConfig:
    def restore(kind: type, value: Any) -> Any:
        return Path(value) if kind is Path else value

    return msgspec.json.decode(text, type=EngineConfig, dec_hook=restore)


def _serve(config: EngineConfig, seat: Seat) -> int:
    from tpinfer.engine.rank_engine import open_engine

    with closing(open_engine(config, seat)) as engine:
        while engine.serve():
            continue
    return 0


def main() -> int:
    """Be one rank until rank 0 closes."""
    calm_thread_pools()
    config, environment = _from_argument(sys.argv[1]), read_environment()
    seat = seat_from_environment(environment, config.device, shares=config.share_device)
    guard_rank(seat)
    seat = replace(seat, ends_process=True)
    if not seat.device.startswith("cuda"):
        return run_rank(seat, environment, lambda: _serve(config, seat))
    leave(run_rank(seat, environment, lambda: _serve(config, seat)))


if __name__ == "__main__":
    sys.exit(main())
