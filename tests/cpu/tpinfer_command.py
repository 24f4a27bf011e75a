"""`tpinfer` as a process of its own, the way a user runs it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tpinfer.collectives.build_ring import build_ring

REPOSITORY = Path(__file__).resolve().parents[2]
GENERATE = (sys.executable, "-m", "tpinfer", "generate")
TIMEOUT_S = 100.0
"""For one run, however busy the machine is."""


@cache
def _ring_cache() -> TemporaryDirectory[str]:
    """A user cache with our own compiled ring and without DeepSpeed's library, which spins without
    yielding: that costs seconds where other tests use the same two cores.
    """
    directory = TemporaryDirectory(prefix="tpinfer-cache-")
    library, _ = build_ring()
    if library is not None:
        target = Path(directory.name, "tpinfer", library.name)
        target.parent.mkdir()
        shutil.copyfile(library, target)
    return directory


def user_environment(
    variables: Mapping[str, str] | None = None, deepspeed: bool = False
) -> dict[str, str]:
    """The environment of a run: this one's, with DeepSpeed's library only where asked for."""
    found = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    if not deepspeed:
        found["XDG_CACHE_HOME"] = _ring_cache().name
    return found | dict(variables or {})


def generate(
    *arguments: str | Path, text_in: str | bytes | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `tpinfer generate` to its end, wherever it goes. `text_in` is its standard input."""
    content = text_in.encode() if isinstance(text_in, str) else text_in
    done = subprocess.run(
        [*GENERATE, *map(str, arguments)],
        cwd=REPOSITORY,
        env=user_environment(variables),
        input=b"" if content is None else content,
        capture_output=True,
        timeout=TIMEOUT_S,
    )
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def json_lines(source: Path | str) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, or of such text."""
    text = source if isinstance(source, str) else source.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]
