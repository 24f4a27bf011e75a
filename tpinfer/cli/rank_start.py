"""What every verb that computes does first: start the ranks, or be one of them."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tpinfer.config.environment import calm_thread_pools, read_environment
from tpinfer.launching.seat import choose_device, count_gpus
from tpinfer.launching.shared_device import preload_variables

if TYPE_CHECKING:
    from tpinfer.launching.seat import Seat

ENGINE_MODULES = ("torch", "tpinfer.engine.rank_engine")
"""What ranks that our launcher forks have imported already."""


def run_on_ranks(
    args: argparse.Namespace,
    argv: Sequence[str],
    check: Callable[[int], None],
    body: "Callable[[Seat], int]",
    reads_stdin: bool,
) -> int:
    """Be the launcher of `args.tp` ranks, or one rank; returns the exit code.

    `check(tp)` refuses what cannot work while nothing has started; `body` is a rank's work.
    """
    calm_thread_pools()
    environment = read_environment()
    if environment.rank is None:
        tp = 1 if args.tp is None else args.tp
        check(tp)
        num_gpus = count_gpus(environment.visible_gpus)
        choose_device(args.device, 0, tp, num_gpus, shares=args.share_device)
        if tp > 1:
            from tpinfer.launching.ranks import launch

            loads = preload_variables(args.nccl_library)
            # A library comes before torch in fresh processes alone.
            preload = () if loads else ENGINE_MODULES
            return launch(argv, tp, preload=preload, variables=loads, reads_stdin=reads_stdin)
    from tpinfer.launching.guard import guard_rank, leave, run_rank
    from tpinfer.launching.seat import seat_from_environment

    seat = seat_from_environment(environment, args.device, shares=args.share_device)
    guard_rank(seat)
    seat = replace(seat, ends_process=True)
    if seat.world == 1 or not seat.device.startswith("cuda"):
        return run_rank(seat, environment, lambda: body(seat))
    leave(run_rank(seat, environment, lambda: body(seat)))
