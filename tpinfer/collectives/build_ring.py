"""Compile the native shared-memory ring once: `python -m tpinfer.collectives.build_ring`.

Set-up calls it; a rank that finds no library compiles it itself, which takes a second. Without a C
compiler the Python ring is used.
"""

import ctypes
from pathlib import Path

from tpinfer.numerics.native_library import build_library

SOURCE = Path(__file__).with_name("ring.c")


def build_ring() -> tuple[Path | None, str]:
    """(library, where it came from), compiling it where it is missing; (None, why not)."""
    return build_library(SOURCE)


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
