"""Compile the native shared-memory ring once: `python -m tpinfer.collectives.build_ring`.

Set-up calls it; a rank that finds no library compiles it itself, which takes a second. The library
is kept in the user's cache under a name that changes with the source, the flags and the processor
it was compiled for. Needs any C compiler; without one the Python ring is used.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from tpinfer.config.environment import read_environment

SOURCE = Path(__file__).with_name("ring.c")
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC")
_NATIVE = "-march=native"
_COMPILE_TIMEOUT_S = 60.0


def library_path() -> Path:
    """Where the library for this source and this processor belongs."""
    seed = SOURCE.read_bytes() + repr((_FLAGS, _NATIVE, platform.machine())).encode()
    digest = hashlib.blake2b(seed + _processor_flags(), digest_size=8).hexdigest()
    return read_environment().user_cache / f"ring-{digest}.so"


def find_compiler() -> str | None:
    """Path of a C compiler, or None."""
    return next(filter(None, map(shutil.which, _COMPILERS)), None)


def build_ring() -> tuple[Path | None, str]:
    """(library, where it came from), compiling it where it is missing; (None, why not)."""
    path = library_path()
    if _is_ours(path):
        return path, "compiled before"
    compiler = find_compiler()
    if compiler is None:
        return None, f"no C compiler found ({', '.join(_COMPILERS)}); install gcc"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".ring-", dir=path.parent) as scratch:
            fresh = Path(scratch, path.name)
            problem = _compile(compiler, fresh)
            if problem:
                return None, problem
            fresh.chmod(0o700)
            # Ranks may compile at once: each renames its own, complete, library into place.
            os.replace(fresh, path)
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{compiler} could not be run in {path.parent}: {error}"
    return path, f"compiled now with {compiler}"


def _compile(compiler: str, target: Path) -> str:
    """Compile for this processor, else for its family. Returns what went wrong, if it did."""
    message = ""
    for flags in ((*_FLAGS, _NATIVE), _FLAGS):
        command = [compiler, *flags, str(SOURCE), "-o", str(target)]
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False
        )
        if run.returncode == 0:
            return ""
        message = run.stderr.strip().partition("\n")[0]
    return f"{compiler} failed: {message}"


def _is_ours(path: Path) -> bool:
    """A library that only this user can have written."""
    try:
        status = path.stat()
    except OSError:
        return False
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def _processor_flags() -> bytes:
    """What -march=native looks at: a cache shared between machines must tell them apart."""
    try:
        with open("/proc/cpuinfo", "rb") as file:
            head = file.read(16384)
    except OSError:
        return platform.processor().encode()
    keep = (b"flags", b"Features", b"vendor_id", b"CPU implementer", b"CPU part")
    lines = [line for line in head.split(b"\n") if line.startswith(keep)]
    return b"\n".join(sorted(set(lines)))


def load_ring() -> tuple[ctypes.PyDLL | None, str]:
    """(library, where it came from), or (None, why it cannot be had)."""
    path, reason = build_ring()
    if path is None:
        return None, reason
    try:
        return ctypes.PyDLL(str(path)), reason
    except OSError as error:
        return None, f"{path} cannot be loaded: {error}; delete it"


if __name__ == "__main__":
    built, said = build_ring()
    print(f"native shared-memory ring: {built or 'not built, the Python one is used'} ({said})")
