"""Compile a C source of this package once for this processor, and keep the library.

It is kept in the user's cache under a name that changes with the source, the flags and the
processor it was compiled for. Needs any C compiler.
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

_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC")
_NATIVE = "-march=native"
_COMPILE_TIMEOUT_S = 60.0


def library_path(source: Path, wanted: tuple[str, ...] = ()) -> Path:
    """Where the library of `source`, compiled for this processor with the flags `wanted`,
    belongs."""
    flags = (*_FLAGS, *wanted)
    seed = source.read_bytes() + repr((flags, _NATIVE, platform.machine())).encode()
    digest = hashlib.blake2b(seed + _processor_flags(), digest_size=8).hexdigest()
    return read_environment().user_cache / f"{source.stem}-{digest}.so"


def find_compiler() -> str | None:
    """Path of a C compiler, or None."""
    return next(filter(None, map(shutil.which, _COMPILERS)), None)


def build_library(source: Path, wanted: tuple[str, ...] = ()) -> tuple[Path | None, str]:
    """(library, where it came from), compiling it where it is missing; (None, why not).

    A compiler that refuses the flags `wanted` is asked without them.
    """
    path = library_path(source, wanted)
    if _is_ours(path):
        return path, "compiled before"
    compiler = find_compiler()
    if compiler is None:
        return None, f"no C compiler found ({', '.join(_COMPILERS)}); install gcc"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{source.stem}-", dir=path.parent) as scratch:
            fresh = Path(scratch, path.name)
            problem = _compile(compiler, source, wanted, fresh)
            if problem:
                return None, problem
            fresh.chmod(0o700)
            # Ranks may compile at once: each renames its own, complete, library into place.
            os.replace(fresh, path)
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{compiler} could not be run in {path.parent}: {error}"
    return path, f"compiled now with {compiler}"


def open_library(
    source: Path, wanted: tuple[str, ...], struct: type[ctypes.Structure], size_function: str
) -> tuple[ctypes.CDLL | None, str]:
    """(the library of `source`, where it came from), or (None, why it cannot be had). Its
    `size_function` must give the size of `struct`, which it shares with Python."""
    path, reason = build_library(source, wanted)
    if path is None:
        return None, reason
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path} cannot be loaded: {error}; delete it"
    if library[size_function]() != ctypes.sizeof(struct):
        return None, f"{path} is of another version; delete it"
    return library, reason


def _compile(compiler: str, source: Path, wanted: tuple[str, ...], target: Path) -> str:
    """Compile for this processor, else for its family. Returns what went wrong, if it did."""
    message = ""
    attempts = [(*wanted, _NATIVE), wanted]
    attempts += [(_NATIVE,), ()] if wanted else []
    for flags in attempts:
        command = [compiler, *_FLAGS, *flags, str(source), "-o", str(target), "-lm"]
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
