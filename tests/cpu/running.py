"""A `tpinfer generate` that goes on until somebody ends it: its ranks, its sockets, its files."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.cpu.tiny_models import write_checkpoint
from tests.cpu.tiny_tokenizers import byte_level
from tests.cpu.tpinfer_command import GENERATE, REPOSITORY, user_environment
from tpinfer.steps.liveness import is_running

START_S = 60.0
_LISTEN = "0A"
PROCESSES = (
    "import sys; from tpinfer.launching.ranks import launch;"
    "sys.exit(launch(sys.argv[1:], 2, start='processes'))"
)
LAUNCHERS: dict[str, tuple[str, ...]] = {
    "fork": (*GENERATE, "--tp", "2"),
    "processes": (sys.executable, "-c", PROCESSES, "generate"),
    "torchrun": (
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "tpinfer", "generate"),
    ),
    "single": GENERATE,
}
"""How two ranks (or one) are started; the flags of generate follow."""


def endless_model(directory: Path) -> Path:
    """A tiny checkpoint that can go on for minutes."""
    byte_level(write_checkpoint("llama-tied-gqa", directory))
    config = directory / "config.json"
    settings = json.loads(config.read_text()) | {"max_position_embeddings": 200_000}
    config.write_text(json.dumps(settings))
    return directory


class Running:
    """A run that writes text without end. Use as a context manager; it is killed at the end."""

    def __init__(self, launcher: str, model: Path, errors: Path, *flags: str, deepspeed=False):
        command = [*LAUNCHERS[launcher], "--model", str(model), "--prompt", "fox", "--ignore-eos"]
        command += ["--max-tokens", "190000", "--max-num-seqs", "1", *flags]
        command += ["--collective", "deepspeed"] if deepspeed else []
        self._errors = errors
        with errors.open("wb") as err:
            self.process = subprocess.Popen(
                command, cwd=REPOSITORY, env=user_environment(deepspeed=deepspeed),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=err,
            )  # fmt: skip
        self.ranks: list[int] = []

    def __enter__(self) -> "Running":
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        shown, deadline_s = b"", time.monotonic() + START_S
        while len(shown) < 12:
            assert time.monotonic() < deadline_s and self.process.poll() is None, self.told()
            shown += self.process.stdout.read() or b""
            time.sleep(0.01)
        self.ranks = children_of(self.process.pid) or [self.process.pid]
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        for pid in self.ranks:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)

    @property
    def pids(self) -> list[int]:
        """The launcher and its ranks."""
        return [self.process.pid, *self.ranks]

    def told(self) -> str:
        """Standard error so far, without the lines that tell progress and the cache's size."""
        lines = self._errors.read_text(errors="replace").splitlines()
        said = (line for line in lines if "tokens of KV cache: room for" not in line)
        return "\n".join(line for line in said if not line.endswith(" ..."))

    def wait(self, timeout_s: float) -> int:
        """Exit code of the launcher; its output is read so that it never waits for us."""
        assert self.process.stdout is not None
        deadline_s = time.monotonic() + timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < deadline_s, f"still runs after {timeout_s} s"
            self.process.stdout.read()
            time.sleep(0.01)
        return self.process.returncode

    def assert_gone(self, timeout_s: float) -> None:
        """No rank runs `timeout_s` from now, and none of them left a file in /dev/shm."""
        deadline_s = time.monotonic() + timeout_s
        while alive := [pid for pid in self.ranks if is_running(pid)]:
            assert time.monotonic() < deadline_s, f"ranks {alive} still run"
            time.sleep(0.01)
        assert self.files() == []

    def files(self) -> list[str]:
        """Files of these processes in /dev/shm, DeepSpeed's for them included."""
        return files_of(self.pids)

    def listening(self, pids: list[int]) -> set[str]:
        """Addresses, in the hexadecimal of /proc/net, that `pids` listen on."""
        sockets = {
            fields[9]: fields[1].partition(":")[0]
            for table in ("tcp", "tcp6")
            for fields in map(str.split, Path("/proc/net", table).read_text().splitlines()[1:])
            if fields[3] == _LISTEN
        }
        held = [os.readlink(path) for pid in pids for path in Path(f"/proc/{pid}/fd").iterdir()]
        inodes = [match[1] for name in held if (match := re.fullmatch(r"socket:\[(\d+)\]", name))]
        return {sockets[inode] for inode in inodes if inode in sockets}


def files_of(pids: list[int]) -> list[str]:
    """Files in /dev/shm whose name says that one of `pids` made them."""
    names = [path.name for path in Path("/dev/shm").iterdir()]
    makers = {str(pid) for pid in pids}
    found = [(name, re.search(r"tpinfer-(\d+)-", name)) for name in names]
    return sorted(name for name, match in found if match and match[1] in makers)


def children_of(parent: int) -> list[int]:
    """Processes whose parent is `parent`, in order of their start."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if int(fields[1]) == parent:
            found.append(int(path.parent.name))
    return sorted(found)
