"""A `Report` as JSON and back. The keys are those of `results`; unknown ones are ignored when read.

Also reads what lacks the tables of a trace - live counters, a prediction - as long as it has the
wall, its leaves and the ranks.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from tpinfer.costs.leaves import ROLLUP, roll_up
from tpprof.errors import TraceError
from tpprof.results import FORMAT_VERSION, Coverage, Report

_ABSENT: dict[str, Any] = {
    "collectives": [],
    "coverage": asdict(Coverage(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)),
    "clock_alignment": {},
    "dilation": None,
    "warnings": [],
}
"""What a report without a trace behind it may leave out."""


def encode_report(report: Report) -> bytes:
    """Indented JSON with a newline at its end."""
    return msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"


def decode_report(encoded: bytes, source: str) -> Report:
    """The report in JSON that `source` held.

    Raises TraceError for text that is no report, a version of the future, or leaves that do not
    add up to their wall.
    """
    try:
        found = msgspec.json.decode(encoded)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TraceError(
            f"{source} is not JSON ({error}); pass a file that --json wrote, or traces"
        ) from None
    if not isinstance(found, dict) or "wall_ns" not in found or "leaves" not in found:
        raise TraceError(
            f"{source} is no report: it has no wall_ns and leaves; pass a file that --json wrote, "
            "or a directory of traces"
        )
    try:
        version = int(found.get("format_version", FORMAT_VERSION))
        if version > FORMAT_VERSION:
            raise TraceError(
                f"{source} has format_version {version}, this tpprof reads up to "
                f"{FORMAT_VERSION}; use the tpprof that wrote it"
            )
        report = msgspec.convert(_filled(found), Report)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise TraceError(f"{source} is no report: {error}") from None
    _check_sums(report, source)
    return report


def read_report(path: Path) -> Report:
    """The report in a file. Raises TraceError, also where the file cannot be read."""
    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}") from None
    return decode_report(encoded, str(path))


def _filled(found: Mapping[str, Any]) -> dict[str, Any]:
    """With what a report without a trace may leave out."""
    whole = {**_ABSENT, **found}
    split = {"rank": 0, **{key: whole[key] for key in ("wall_ns", "leaves")}}
    ranks = whole.get("ranks") or [split]
    whole["ranks"] = [{"rollup": roll_up(rank["leaves"]), **rank} for rank in ranks]
    whole.setdefault("rollup", roll_up(whole["leaves"]))
    return whole


def _check_sums(report: Report, source: str) -> None:
    whole = [("the whole", report.wall_ns, report.leaves, report.rollup)]
    whole += [(f"rank {s.rank}", s.wall_ns, s.leaves, s.rollup) for s in report.ranks]
    for place, wall_ns, leaves, rollup in whole:
        total = sum(leaves.values())
        if total != wall_ns:
            raise TraceError(
                f"{source}: the leaves of {place} sum to {total} ns, its wall is {wall_ns} ns; "
                "write the report again from the traces"
            )
        words = roll_up(leaves)
        if sum(words.values()) != wall_ns or any(rollup.get(w, 0) != ns for w, ns in words.items()):
            raise TraceError(
                f"{source}: rollup of {place} does not match its leaves over {', '.join(ROLLUP)}; "
                "write the report again from the traces"
            )
