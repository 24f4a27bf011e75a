"""Compile `ring.c` once with the system's C compiler and keep the library in the user's cache.

    python -m tpinfer.collectives.build_ring

Without a compiler the Python ring does the same work, some four times slower.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tpinfer.config.environment import read_environment

SOURCE = Path(__file__).with_name("ring.c")
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-Wall")


def library_path() -> Path:
    """Where the compiled ring for this processor lies or would lie."""
    key = hashlib.blake2b(SOURCE.read_bytes(), digest_size=6)
    key.update(" ".join(FLAGS).encode())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        key.update(next((line for line in lines if line.startswith(("flags", "Features"))), "").encode())
    except OSError:
        key.update(b"unknown processor")
    return read_environment().user_cache / f"ring-{key.hexdigest()}.so"


def build_ring() -> tuple[Path | None, str]:
    """(library, ""), or (None, why there is none). Safe to call from several processes at once."""
    target = library_path()
    if target.is_file():
        return target, ""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        return None, "no C compiler (cc, gcc or clang) is installed"
    fresh = target.with_suffix(f".{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [compiler, *FLAGS, "-o", str(fresh), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode:
            return None, f"{compiler} failed: {done.stderr.strip()[-200:]}"
        ctypes.CDLL(str(fresh))
        fresh.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"the compiled ring cannot be used: {error}"
    finally:
        fresh.unlink(missing_ok=True)
    return target, ""


def main() -> int:
    """Build and say what came of it; a missing compiler is no failure."""
    path, reason = build_ring()
    print(f"native ring: {path}" if path else f"native ring: not built, {reason}; the Python ring is used")
    return 0


if __name__ == "__main__":
    sys.exit(main())
