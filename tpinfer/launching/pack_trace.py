"""Compress one recorded trace: `python -m tpinfer.launching.pack_trace RAW.json OUT.json.gz`.

Runs as a child of the rank that recorded, since compressing takes longer than recording did. Our
own ranges are recorded as operators, which is cheaper; here they get the category they belong to.
"""

import gzip
import os
import re
import sys
from pathlib import Path

_CHUNK_BYTES = 8 << 20
_AS_RECORDED = re.compile(rb'"cat": "cpu_op",(\s{0,40})"name": "tpinfer\.')
_AS_WRITTEN = rb'"cat": "user_annotation",\1"name": "tpinfer.'
_LONGEST_MATCH = 80
"""Bytes of _AS_RECORDED at most."""


def pack(raw: Path, final: Path) -> None:
    """Write `final` whole or not at all, then remove `raw`."""
    partial = final.with_name(final.name + ".part")
    with raw.open("rb") as source, gzip.open(partial, "wb", compresslevel=4) as target:
        held = b""
        while chunk := source.read(_CHUNK_BYTES):
            held = _AS_RECORDED.sub(_AS_WRITTEN, held + chunk)
            # A match may straddle two chunks: keep back what could be the start of one.
            target.write(held[:-_LONGEST_MATCH])
            held = held[-_LONGEST_MATCH:]
        target.write(held)
    os.replace(partial, final)
    raw.unlink()


if __name__ == "__main__":
    pack(Path(sys.argv[1]), Path(sys.argv[2]))
