"""Rank program of test_launchers: killed while DeepSpeed's segments still have their names."""

import os
import signal
from pathlib import Path

from tpinfer.collectives.deepspeed_shm import DeepSpeedGroup, library_path
from tpinfer.collectives.shared_memory import open_shared_memory
from tpinfer.launching.seat import Seat


def killed_while_opening(seat: Seat) -> None:
    """Every rank ends itself where it would remove the name of its segment."""
    ring = open_shared_memory(f"{seat.run_id}-ring", seat.rank, seat.world, 20.0, seat.world)

    def end(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    Path.unlink = end  # type: ignore[method-assign]
    DeepSpeedGroup(ring, library_path(), f"{seat.run_id}-g0")
