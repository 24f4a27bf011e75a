"""Compress one recorded trace: `python -m tpinfer.launching.pack_trace RAW.json OUT.json.gz`.

Runs as a child of the rank that recorded, since compressing takes longer than recording did. Our
own ranges are recorded as operators, which is cheaper; here they get the category they belong to.
"""

import gzip
import os
import sys
from pathlib import Path

_CHUNK_BYTES = 8 << 20
_AS_RECORDED = b'"cat": "cpu_op", "name": "tpinfer.'
_AS_WRITTEN = b'"cat": "user_annotation", "name": "tpinfer.'


def pack(raw: Path, final: Path) -> None:
    """Write `final` whole or not at all, then remove `raw`."""
    partial = final.with_name(final.name + ".part")
    keep = len(_AS_RECORDED) - 1
    with raw.open("rb") as source, gzip.open(partial, "wb", compresslevel=4) as target:
        held = b""
        while chunk := source.read(_CHUNK_BYTES):
            held = (held + chunk).replace(_AS_RECORDED, _AS_WRITTEN)
            # A match may straddle two chunks: keep back what could be the start of one.
            target.write(held[:-keep])
            held = held[-keep:]
        target.write(held)
    os.replace(partial, final)
    raw.unlink()


if __name__ == "__main__":
    pack(Path(sys.argv[1]), Path(sys.argv[2]))
