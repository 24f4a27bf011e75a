"""Start the ranks of a run on this host and stay with them: what `tpinfer generate --tp N` does
first.

Ranks find torchrun's environment variables, so a program that runs under one runs under the other.
Two ways to start them: `processes`, N fresh interpreters, or `fork`, which imports what all of them
need once, here, and then copies this process N times. Imports no torch by itself; does not restart
ranks and does not reach other hosts.
"""

import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from tpinfer.config.environment import child_environment, export_variables
from tpinfer.config.errors import ConfigError
from tpinfer.launching.child import RankProcess, num_threads, preload_modules, start_rank
from tpinfer.launching.sweep import remove_run, sweep_stale
from tpinfer.launching.watch import Keyboard, Watch, caught_signals
from tpinfer.steps.segment import segment_path

StartMethod = Literal["auto", "fork", "processes"]


def launch(
    argv: Sequence[str],
    num_ranks: int,
    *,
    start: StartMethod = "auto",
    module: str = "tpinfer",
    preload: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    reads_stdin: bool = True,
) -> int:
    """Run `python -m <module> <argv>` as `num_ranks` ranks of this host and return the run's exit
    code.

    `preload` names modules for `fork` to import first (torch, the engine). `auto` forks when there
    are any and the process has a single thread afterwards, and starts processes otherwise.
    `variables` are added to the ranks' environment. Standard input goes to rank 0, or to nobody
    without `reads_stdin`.

    The main thread must call this. A rank that fails ends the run within 5 s: its own error is
    printed on standard error and its code returned. SIGINT and SIGTERM are passed on once and
    return 130 and 143. If this process is killed, the kernel kills the ranks. Raises ConfigError
    for num_ranks below 1, ImportError when a preloaded module is missing.
    """
    if num_ranks < 1:
        raise ConfigError(f"num_ranks={num_ranks} must be at least 1")
    shared = shared_variables(num_ranks, variables or {})
    fork_only = _prepare_fork(start, preload, shared)
    run_id = shared["TORCHELASTIC_RUN_ID"]
    make_rendezvous(Path(shared["TPINFER_RENDEZVOUS"]))
    with caught_signals() as signals:
        keyboard = Keyboard() if reads_stdin and _is_terminal(0) else None
        stdin = keyboard.read_end if keyboard is not None else (0 if reads_stdin else None)
        ranks: list[RankProcess] = []
        try:
            for rank in range(num_ranks):
                own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                source = stdin if rank == 0 else None
                mine = [started.report for started in ranks]
                mine += [signals] if keyboard is None else [signals, keyboard.write_end]
                ranks.append(start_rank(rank, module, argv, own, source, fork_only, mine))
            sweep_stale()
            return Watch(ranks, signals, keyboard).follow()
        finally:
            _end_all(ranks)
            remove_run(run_id)


def shared_variables(num_ranks: int, variables: Mapping[str, str]) -> dict[str, str]:
    """What every rank's environment gets, torchrun's variables and ours."""
    run_id = f"run-{os.urandom(6).hex()}"
    inherited = child_environment(variables)
    threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    return {
        "OMP_NUM_THREADS": inherited.get("OMP_NUM_THREADS", str(threads)),
        # numpy's BLAS would start a pool when imported, after which forking is unsafe.
        "OPENBLAS_NUM_THREADS": inherited.get("OPENBLAS_NUM_THREADS", "1"),
        **variables,
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "LOCAL_SIZE": str(num_ranks),  # DeepSpeed's name for it
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TPINFER_LAUNCHER": "tpinfer",
        "TPINFER_RENDEZVOUS": str(segment_path(f"{run_id}-rendezvous")),
    }


def make_rendezvous(directory: Path) -> None:
    """Make the directory in which the ranks of a run meet. Raises ConfigError."""
    try:
        directory.mkdir(mode=0o700)
    except OSError as error:
        raise ConfigError(
            f"{directory.parent}: cannot be written ({error.strerror}), and ranks of one host "
            "meet there; mount a writable tmpfs or use one rank"
        ) from error


def _prepare_fork(start: StartMethod, preload: Sequence[str], shared: Mapping[str, str]) -> bool:
    """Import what forked ranks share, if they are to be forked; says whether they are."""
    if start == "processes" or (start == "auto" and (not preload or num_threads() > 1)):
        return False
    # Thread pools size themselves when their library is loaded, which is now.
    export_variables({name: shared[name] for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")})
    is_safe = preload_modules(preload)
    if not is_safe and start == "fork":
        raise ConfigError(
            f"start=fork needs a process with one thread and this one has {num_threads()} after "
            f"importing {', '.join(preload) or 'nothing'}; use start=processes"
        )
    return is_safe


def _free_port() -> int:
    """A loopback port nobody listens on: ours never do, programs written for torchrun may."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _is_terminal(descriptor: int) -> bool:
    try:
        return os.isatty(descriptor)
    except OSError:
        return False


def _end_all(ranks: Sequence[RankProcess]) -> None:
    """Leave no child behind, whatever happened here."""
    for rank in ranks:
        if rank.exit_status is None:
            try:
                os.killpg(rank.pid, signal.SIGKILL)
                os.waitpid(rank.pid, 0)
            except (ProcessLookupError, ChildProcessError) as error:
                print(f"rank {rank.rank} was gone already: {error}", file=sys.stderr)
        os.close(rank.report)
