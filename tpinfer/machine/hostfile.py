"""DeepSpeed's hostfile: one `name slots=N` a line; `#` starts a comment."""

import re
from pathlib import Path

from tpinfer.config.errors import TopologyError

_LINE = re.compile(r"(?P<name>[^\s=]+)\s+slots\s*=\s*(?P<slots>\d+)")
_MOST_SLOTS = 1024


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host name, in order. Raises TopologyError naming file, line and remedy."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TopologyError(f"hostfile {path} cannot be read ({error}); check the path") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        where = f"{path.name}, line {number}: "
        if match is None or not 0 < int(match["slots"][:9]) <= _MOST_SLOTS:
            raise TopologyError(
                f"{where}{text!r} is not `name slots=N` with N of 1 to {_MOST_SLOTS}"
            )
        if match["name"] in slots:
            raise TopologyError(f"{where}host {match['name']} is named again; keep one line")
        slots[match["name"]] = int(match["slots"])
    if not slots:
        raise TopologyError(f"{path.name} names no host; write lines like `node1 slots=8`")
    return slots
