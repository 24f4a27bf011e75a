"""Rank program that is one `tpinfer` call, in a process that has torch imported already."""

import os
from collections.abc import Mapping

from tests.cpu.ranks import RankOutcome, run_ranks
from tests.cpu.tpinfer_command import user_environment
from tpinfer.launching.seat import Seat


def call(seat: Seat, argv: list[str], stdin: str | None) -> int:
    """The exit code of `tpinfer <argv>`, with the file `stdin` as standard input."""
    from tpinfer.cli.main import main

    if stdin is not None:
        os.dup2(os.open(stdin, os.O_RDONLY), 0)
    return main(argv)


def quick_generate(
    run_name: str,
    *arguments: object,
    stdin: object = None,
    variables: Mapping[str, str] | None = None,
) -> RankOutcome:
    """`tpinfer generate` sooner than as a program of its own; `value` is its exit code, `output`
    the end of both its outputs. `--tp` starts ranks as always.
    """
    added = {"XDG_CACHE_HOME": user_environment()["XDG_CACHE_HOME"], **(variables or {})}
    argv = ["generate", *map(str, arguments)]
    wanted = {"argv": argv, "stdin": None if stdin is None else str(stdin)}
    (outcome,) = run_ranks(
        "tests.cpu.cli_program:call", 1, run_name, wanted, timeout_s=60, variables=added
    )
    assert not outcome.error and not outcome.timed_out, outcome
    return outcome


def assert_one_line(status: int | None, told: str, words: str) -> None:
    """It failed, the last line says why, and there is no traceback."""
    assert status == 1, told
    assert "Traceback" not in told, told
    last = told.splitlines()[-1]
    assert words in last and last.startswith(("error: ", "rank 0 failed: ", "rank 1 failed: "))
