"""From what the user names - files, directories, globs - to one file a rank.

A directory gives the recordings in it (or, where it has none, in the folders right below it), of
its newest session where it holds several. Ranks come from the names that vLLM, SGLang, torch's
TensorBoard handler and this project give, else from the file itself.
"""

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import TraceError
from ..events import NONE
from .kineto import looks_recorded, rank_in_header
from .nsight_tables import MAGIC

_RANK = re.compile(r"(?:\A|[^A-Za-z])rank[-_.]?(\d{1,6})(?!\d)", re.IGNORECASE)
_PLACE = re.compile(r"(?:\A|[_-])(dp|pp|tp|dcp|ep)(\d{1,6})(?=[_-])")
"""vLLM: dp0_pp0_tp0_dcp0_ep0_rank0.<ns>.pt.trace.json.gz"""
_SGLANG = re.compile(
    r"(?P<session>.+)-TP-(?P<tp>\d+)(?:-DP-(?P<dp>\d+))?(?:-PP-(?P<pp>\d+))?(?:-EP-(?P<ep>\d+))?"
    r"(?P<stage>-[A-Za-z_]+)?\.trace\.json(?:\.gz)?\Z"
)
_STAMP = re.compile(r"\.(\d{10,20})\.")
"""When a file was written, in its name."""
_NO_RANK = re.compile(r"async_llm|\Amerged[-._]", re.IGNORECASE)
"""A coordinator's file, and files made from those of all ranks."""
_REPORT = (".nsys-rep", ".qdrep", ".qdstrm")
_KINETO = (".json", ".json.gz")
_SQLITE = (".sqlite", ".sqlite3", ".db")


@dataclass
class Found:
    """What was found."""

    files: list[tuple[int, Path]] = field(default_factory=list)
    """(rank, file), by rank; NONE where the file itself will say, or has several ranks."""
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Candidate:
    path: Path
    is_named: bool
    """The user named this very file."""
    rank: int = NONE
    place: tuple[int, ...] = ()
    """Position on the rank grid, (pp, dp, tp, ep), where the name tells one."""
    session: str = ""


def find_traces(paths: Sequence[str | Path]) -> Found:
    """One file a rank (an Nsight Systems export may hold several), by rank.

    Raises TraceError where a path holds no recording, or two files that were named are of one
    rank. What is left out (coordinators, merged files, older sessions) is told in `warnings`.
    """
    found = Found()
    candidates: dict[Path, _Candidate] = {}
    for given in paths:
        for path, is_named in _expand(Path(given)):
            candidate = _candidate(path, is_named, found)
            if candidate is not None:
                key = path.resolve()
                known = candidates.get(key)
                candidates[key] = candidate if known is None or is_named else known
    if not candidates:
        listed = ", ".join(map(str, paths)) or "(no path)"
        told = f" ({found.warnings[0]})" if found.warnings else ""
        raise TraceError(
            f"{listed}: no recording of a rank{told}; name *.json, *.json.gz, *.sqlite"
        )
    kept = _newest_session(list(candidates.values()), found)
    kept = _one_recorder(kept, found)
    kept = [_with_rank(candidate) for candidate in kept]
    kept = _by_place(kept, found)
    kept = _one_each(kept, found)
    kept.sort(key=lambda one: (one.rank == NONE, one.rank))
    found.files = [(one.rank, one.path) for one in kept]
    return found


def is_nsight(path: Path) -> bool:
    """Whether a file is SQLite, by its first bytes, or by its name where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC or path.name.endswith(_SQLITE)
    except OSError:
        return path.name.endswith(_SQLITE)


def _expand(given: Path) -> list[tuple[Path, bool]]:
    """Files that a path stands for, and whether it named them itself."""
    if given.is_dir():
        return [(path, False) for path in _in_directory(given)]
    if given.exists():
        return [(given, True)]
    matches = sorted(glob.glob(str(given), recursive=True)) if glob.has_magic(str(given)) else []
    if not matches:
        raise TraceError(
            f"{given}: no such file; name trace files, a directory that holds them, or a glob"
        )
    files = []
    for match in map(Path, matches):
        if match.is_dir():
            files += [(path, False) for path in _in_directory(match, is_strict=False)]
        else:
            files.append((match, False))
    return files


def _in_directory(directory: Path, is_strict: bool = True) -> list[Path]:
    for pattern in ("*", "*/*"):
        files = sorted(path for path in directory.glob(pattern) if path.is_file())
        found = [path for path in files if _is_recording(path)]
        if found:
            return found
        reports = [path for path in files if path.name.endswith(_REPORT)]
        if reports:
            raise _refuse_report(reports[0])
    if is_strict:
        raise TraceError(
            f"{directory} holds no recording: expected *.json, *.json.gz (Kineto) or *.sqlite "
            "(nsys export --type sqlite); name the directory the profiler wrote to"
        )
    return []


def _is_recording(path: Path) -> bool:
    """Whether a file of a directory is one: by its name, or, for other JSON, by its content."""
    name = path.name
    if name.endswith(_SQLITE):
        return is_nsight(path)
    if not name.endswith(_KINETO):
        return False
    if name.endswith((".trace.json", ".trace.json.gz")):
        return True
    return looks_recorded(path)


def _refuse_report(path: Path) -> TraceError:
    export = path.with_suffix(".sqlite")
    return TraceError(
        f"{path} is a report that only Nsight Systems reads; export it and name the export: "
        f"nsys export --type sqlite --output {export} {path}"
    )


def _candidate(path: Path, is_named: bool, found: Found) -> _Candidate | None:
    name = path.name
    if name.endswith(_REPORT):
        raise _refuse_report(path)
    if _NO_RANK.search(name):
        found.warnings.append(f"{path} is no rank's file (coordinator or merged); it was left out")
        return None
    sglang = _SGLANG.match(name)
    if sglang:
        place = tuple(int(sglang[axis] or 0) for axis in ("pp", "dp", "tp", "ep"))
        session = sglang["session"] + (sglang["stage"] or "")
        return _Candidate(path, is_named, place=place, session=session)
    rank = _RANK.search(name)
    axes = {axis: int(number) for axis, number in _PLACE.findall(name)}
    place = tuple(axes.get(axis, 0) for axis in ("pp", "dp", "tp", "ep")) if axes else ()
    return _Candidate(path, is_named, int(rank[1]) if rank else NONE, place)


def _newest_session(candidates: list[_Candidate], found: Found) -> list[_Candidate]:
    """Of several sessions that nobody told apart, the newest: names that count up, else times."""
    sessions = {one.session for one in candidates if one.session and not one.is_named}
    if len(sessions) < 2:
        return candidates

    def age(session: str) -> tuple[float, float, str]:
        stamp = re.search(r"\d+(?:\.\d+)?", session)
        times = [_written(one.path)[1] for one in candidates if one.session == session]
        return (float(stamp[0]) if stamp else 0.0, max(times), session)

    newest = max(sessions, key=age)
    others = ", ".join(sorted(sessions - {newest}))
    found.warnings.append(
        f"several sessions lie side by side: {newest} was read, {others} left out; name the files "
        "of another with a glob"
    )
    return [one for one in candidates if one.is_named or one.session in ("", newest)]


def _one_recorder(candidates: list[_Candidate], found: Found) -> list[_Candidate]:
    """Kineto's files alone where a directory has both: one run may be recorded by both."""
    exports = [one for one in candidates if not one.is_named and is_nsight(one.path)]
    others = [one for one in candidates if one not in exports]
    if not exports or not others:
        return candidates
    listed = ", ".join(str(one.path) for one in exports)
    found.warnings.append(f"{listed} left out beside Kineto's files; name them alone to read them")
    return others


def _with_rank(one: _Candidate) -> _Candidate:
    """The rank that the file itself tells, where its name does not."""
    if one.rank != NONE or one.place or is_nsight(one.path):
        return one
    told = rank_in_header(one.path)
    return _Candidate(one.path, one.is_named, NONE if told is None else told)


def _by_place(candidates: list[_Candidate], found: Found) -> list[_Candidate]:
    """Ranks from positions on the grid, where names tell those and no rank, or one rank twice.

    The tensor axis is the innermost; with pipeline stages the rank counts through them. Data
    parallel copies count through only where they do not share the tensor axis (attention of
    SGLang's --enable-dp-attention does: there each file has its own TP number).
    """
    placed = [one for one in candidates if one.place]
    ranks = {one.place: one.rank for one in placed}
    if not placed or (NONE not in ranks.values() and len(set(ranks.values())) == len(ranks)):
        return candidates
    stages = {(pp, tp) for pp, _, tp, _ in ranks}
    shares_axis = len(stages) == len(ranks)
    if shares_axis and len({tp for _, tp in stages}) == len(stages):
        number = {place: place[2] for place in ranks}
    else:
        order = [0, 2, 1, 3] if shares_axis else [1, 0, 2, 3]
        ordered = sorted(ranks, key=lambda place: [place[axis] for axis in order])
        number = {place: index for index, place in enumerate(ordered)}
        found.warnings.append(
            "file names give positions on the grid of ranks, not ranks: numbered by "
            + ("pipeline and tensor position" if shares_axis else "data, pipeline, tensor position")
        )
    return [
        _Candidate(one.path, one.is_named, number[one.place], one.place) if one.place else one
        for one in candidates
    ]


def _one_each(candidates: list[_Candidate], found: Found) -> list[_Candidate]:
    """One file a rank: the newest of those that a directory or a glob brought."""
    of_rank: dict[int, list[_Candidate]] = {}
    for one in candidates:
        of_rank.setdefault(one.rank, []).append(one)
    kept = of_rank.pop(NONE, [])
    for rank, several in sorted(of_rank.items()):
        named = [one for one in several if one.is_named]
        if len(named) > 1:
            listed = ", ".join(str(one.path) for one in named)
            raise TraceError(
                f"rank {rank} is in {len(named)} files: {listed}; name one file a rank, of one run"
            )
        newest = named[0] if named else max(several, key=lambda one: _written(one.path))
        kept.append(newest)
        others = [one for one in several if one is not newest]
        if others:
            listed = ", ".join(str(one.path) for one in others)
            found.warnings.append(
                f"rank {rank} has {len(several)} files: {newest.path} was read, {listed} left out"
            )
    return kept


def _written(path: Path) -> tuple[int, float, str]:
    """Orders files by age: the time in the name, else that of the file system."""
    stamp = _STAMP.search(path.name)
    try:
        changed = path.stat().st_mtime
    except OSError:
        changed = 0.0
    return (int(stamp[1]) if stamp else 0, changed, path.name)
