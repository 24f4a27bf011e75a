"""How well the planner predicts published measurements: every figure that it is judged by.

    python profiling/planner_accuracy.py published_serving_numbers.csv > report.md

Takes a table of one metric a row (`tpinfer.planner.published`) and prints Markdown. `datasheet`
uses nothing but the catalogue and the fabric fits; `held out` predicts each point by a calibration
that has not seen its tensor-parallel size. Needs no GPU and no torch; about a minute.
"""

import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tpinfer.config.errors import TpinferError
from tpinfer.config.huggingface import read_model_spec
from tpinfer.embedded.locate import shape_directory, shape_names
from tpinfer.planner.calibrate import (
    Calibration,
    Judged,
    calibrate,
    inside,
    interval,
    judge,
    median_error,
)
from tpinfer.planner.point_model import PointModels
from tpinfer.planner.published import Point, Published, read_published
from tpinfer.planner.traits import Traits

DATASHEET_MOST, LEFT_OUT_TP_MOST, LEFT_OUT_MODEL_MOST, FOLD_MOST = 0.20, 0.10, 0.15, 0.25
COVERAGE = (0.75, 0.88)
RATIO_MOST, RANKING_LEAST, APART = 0.08, 0.95, 1.10
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Seen:
    """A point with its prediction in the measurement's own unit."""

    point: Point
    predicted: float

    def per_device(self, value: float) -> float:
        """Output tokens a second and device; relative for closed loops, where all share a load."""
        point = self.point
        rate = value if point.concurrency is None else point.concurrency / value
        return rate / (point.tp * point.pp)


def main() -> None:
    """Print the report, or what is wrong with the table."""
    if len(sys.argv) != 2:
        sys.exit("give one CSV file; see the head of this file")
    models = PointModels({n: read_model_spec(shape_directory(n)) for n in shape_names()})
    try:
        table = read_published(Path(sys.argv[1]))
        found = calibrate(table.points, models)
    except TpinferError as error:
        sys.exit(str(error))
    fitted = [one.point for part in found.values() for one in part.fitted]
    plain = {group: judge(_points(part), models, Traits()) for group, part in found.items()}
    held = {group: part.held_out[0].judged for group, part in found.items() if part.held_out}
    print(f"# Planner accuracy on {Path(sys.argv[1]).name}\n")
    _print_table_use(table, found, len(fitted))
    _print_errors(found, plain)
    _print_folds(found)
    _print_coverage(found, plain)
    both = {"datasheet": _seen(plain.values()), "held out": _seen(held.values())}
    _print_ratios(both)
    _print_ranking(both)
    _print_cliffs(both)
    _print_traits(found)


def _points(part: Calibration) -> list[Point]:
    return [one.point for one in part.fitted]


def _seen(parts: Iterable[Sequence[Judged]]) -> list[Seen]:
    """Predictions from errors of time."""
    return [
        Seen(one.point, one.point.value * float(np.exp(sign * one.log_error)))
        for part in parts
        for one in part
        for sign in (-1 if one.point.is_throughput else 1,)
    ]


def _print_table_use(table: Published, found: dict[Key, Calibration], fitted: int) -> None:
    print(f"{len(table.points)} points in {len(found)} groups; {fitted} judged. Not used:\n")
    for reason, count in sorted(table.unused.items()):
        print(f"- {count} rows: {reason}")
    for group, part in found.items():
        for reason, points in part.set_aside.items():
            print(f"- {len(points)} points of {'/'.join(group)}, set aside: {reason}")


def _print_errors(found: dict[Key, Calibration], plain: dict[Key, tuple[Judged, ...]]) -> None:
    print("\n## Median absolute error of TPOT (or of time per token at saturation)\n")
    print("| device / engine / precision | points | what | datasheet | left-out TP | left-out model"
          " | fitted (in-sample) |\n|-|-|-|-|-|-|-|")  # fmt: skip
    for group, part in found.items():
        names = {True: "saturated", False: "TPOT"}
        kinds = {names[one.point.is_throughput] for one in part.fitted}
        what = kinds.pop() if len(kinds) == 1 else "both"
        held = {one.by: _percent(median_error(one.judged)) for one in part.held_out}
        print(
            f"| {' / '.join(group)} | {len(part.fitted)} | {what} "
            f"| {_percent(median_error(plain[group]))} "
            f"| {held.get('tp', '-')} | {held.get('model', '-')} "
            f"| {_percent(median_error(part.fitted))} |"
        )
    print()
    groups_of = {
        "datasheet, TPOT groups": [
            median_error(chosen)
            for one in plain.values()
            if (chosen := [j for j in one if not j.point.is_throughput])
        ],
        "datasheet, all groups": [median_error(one) for one in plain.values() if one],
        "left-out TP": _held_medians(found, "tp"),
        "left-out model": _held_medians(found, "model"),
    }
    limits = (DATASHEET_MOST, DATASHEET_MOST, LEFT_OUT_TP_MOST, LEFT_OUT_MODEL_MOST)
    for (name, medians), limit in zip(groups_of.items(), limits, strict=True):
        if medians:
            middle = float(np.median(medians))
            worst = _percent(max(medians))
            text = f"{name}: median over groups {_percent(middle)}, worst {worst}"
            _verdict(text, middle <= limit, f"<= {_percent(limit)}")


def _held_medians(found: dict[Key, Calibration], by: str) -> list[float]:
    return [
        median_error(held.judged)
        for part in found.values()
        for held in part.held_out
        if held.by == by
    ]


def _print_folds(found: dict[Key, Calibration]) -> None:
    print(f"\n## What was left out and missed by more than {_percent(FOLD_MOST)}\n")
    count = 0
    for group, part in found.items():
        for held in part.held_out:
            for name, fold in held.folds.items():
                if median_error(fold) > FOLD_MOST:
                    count += 1
                    print(f"- {' / '.join(group)}, {name} left out: {_percent(median_error(fold))} "
                          f"over {len(fold)} points; {_why(part, held.by, name)}")  # fmt: skip
    if not count:
        print("Nothing.")


def _why(part: Calibration, by: str, name: str) -> str:
    """What the rest could not tell about what was left out."""
    points = _points(part)
    inner = [p for p in points if (f"tp={p.tp}" if by == "tp" else p.model) == name]
    outer = [p for p in points if p not in inner]
    reasons = []
    if not {p.model for p in inner} & {p.model for p in outer}:
        reasons.append(f"no other size has {' or '.join(sorted({p.model for p in inner}))}")
    if {p.tp for p in inner} == {1} and 1 not in {p.tp for p in outer}:
        reasons.append("every other point has collectives, which share the blame for slow steps")
    versions = {p.version for p in points}
    if len(versions) > 1:
        reasons.append(f"{len(versions)} engine versions are mixed")
    return "; ".join(reasons) or "no reason found"


def _print_coverage(found: dict[Key, Calibration], plain: dict[Key, tuple[Judged, ...]]) -> None:
    print("\n## Coverage of 80 % intervals\n")
    hits, total = 0.0, 0
    for group, part in found.items():
        held = next((h for h in part.held_out if h.by == "tp"), None)
        cover = held.coverage() if held else None
        if held is not None and cover is not None:
            below, above = part.traits.interval
            print(
                f"- {' / '.join(group)}: {_percent(cover)} (-{_percent(below)} +{_percent(above)})"
            )
            hits, total = hits + cover * len(held.judged), total + len(held.judged)
    if total:
        share = hits / total
        _verdict(f"calibrated, sizes left out: {_percent(share)} of {total} points",
                 COVERAGE[0] <= share <= COVERAGE[1], "75-88 %")  # fmt: skip
    inner = []
    for group, judged in plain.items():
        others = [one for name, part in plain.items() if name != group for one in part]
        if others:
            bounds = interval(others)
            inner += [inside(one.log_error, bounds) for one in judged]
    if inner:
        share = sum(inner) / len(inner)
        _verdict(f"datasheet, by the errors of other groups: {_percent(share)}",
                 COVERAGE[0] <= share <= COVERAGE[1], "75-88 %")  # fmt: skip
        fixed = [inside(one.log_error, Traits().interval) for p in plain.values() for one in p]
        below, above = Traits().interval
        print(f"- datasheet, as printed (-{_percent(below)} +{_percent(above)}): "
              f"{_percent(sum(fixed) / len(fixed))}")  # fmt: skip


def _series(seen: Iterable[Seen], more: Callable[[Point], object]) -> dict[object, list[Seen]]:
    series: dict[object, list[Seen]] = defaultdict(list)
    for one in seen:
        p = one.point
        key = (p.group, p.version, p.model, p.input_len, p.output_len, p.concurrency)
        series[(key, more(p))].append(one)
    return series


def _ratios(seen: Iterable[Seen], wide: int, narrow: int) -> list[tuple[Point, float, float]]:
    """(point, measured, predicted) gain in throughput from `narrow` ranks to `wide`."""
    found = []
    for members in _series(seen, lambda p: None).values():
        by_tp = {one.point.tp: one for one in members}
        if wide in by_tp and narrow in by_tp:
            a, b = by_tp[wide], by_tp[narrow]
            scale = wide / narrow
            measured = a.per_device(a.point.value) / b.per_device(b.point.value) * scale
            predicted = a.per_device(a.predicted) / b.per_device(b.predicted) * scale
            found.append((a.point, measured, predicted))
    return found


def _print_ratios(both: dict[str, list[Seen]]) -> None:
    print("\n## Ratios of throughput between tensor-parallel sizes\n")
    for mode, seen in both.items():
        for wide, narrow in ((8, 4), (4, 2)):
            ratios = _ratios(seen, wide, narrow)
            for what, is_saturated in (("saturated", True), ("closed loop", False)):
                errors = [abs(q / m - 1) for p, m, q in ratios if p.is_throughput == is_saturated]
                if errors:
                    middle = float(np.median(errors))
                    _verdict(f"{mode}, TP{wide}/TP{narrow}, {what}, {len(errors)} pairs: "
                             f"{_percent(middle)}", middle <= RATIO_MOST, "<= 8 %")  # fmt: skip


def _print_ranking(both: dict[str, list[Seen]]) -> None:
    print("\n## Order of throughput per GPU, pairs more than 10 % apart\n")
    for mode, seen in both.items():
        within = list(_series(seen, lambda p: None).values())
        across: dict[object, list[Seen]] = defaultdict(list)
        for one in seen:
            p = one.point
            if p.is_throughput:
                across[(p.model, p.input_len, p.output_len)].append(one)
        for what, groups in (("sizes of one series", within), ("devices too", across.values())):
            right = [r for members in groups for r in _ordered(members)]
            if right:
                share = sum(right) / len(right)
                _verdict(f"{mode}, {what}: {share:.1%} of {len(right)} pairs",
                         share >= RANKING_LEAST, ">= 95 %")  # fmt: skip


def _ordered(members: Sequence[Seen]) -> list[bool]:
    found = []
    for a, b in itertools.combinations(members, 2):
        measured = a.per_device(a.point.value) / b.per_device(b.point.value)
        predicted = a.per_device(a.predicted) / b.per_device(b.predicted)
        if measured > APART or measured < 1 / APART:
            found.append((predicted > 1) == (measured > 1))
    return found


def _print_cliffs(both: dict[str, list[Seen]]) -> None:
    print("\n## Known cliffs\n")
    for mode, seen in both.items():
        by_device: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for point, measured, predicted in _ratios(seen, 8, 4):
            if point.is_throughput:
                by_device[point.device].append((measured, predicted))
        for device, pairs in sorted(by_device.items()):
            m, q = (np.array(one) for one in zip(*pairs, strict=True))
            print(f"- {mode}, {device} TP4 -> TP8: measured {m.min():.2f}-{m.max():.2f} "
                  f"(median {np.median(m):.2f}), predicted {q.min():.2f}-{q.max():.2f} "
                  f"(median {np.median(q):.2f})")  # fmt: skip
        for members in _series(seen, lambda p: None).values():
            by_tp = {one.point.tp: one for one in members if one.point.is_throughput}
            if 1 in by_tp and 2 in by_tp and by_tp[1].point.device == "h100-sxm-80g":
                a, b = by_tp[1], by_tp[2]
                p = a.point
                print(f"- {mode}, {p.device} {p.version} {p.model} {p.precision} "
                      f"{p.input_len}/{p.output_len}, TP1 -> TP2: measured "
                      f"{b.point.value / a.point.value:.1f}x, predicted "
                      f"{b.predicted / a.predicted:.1f}x")  # fmt: skip


def _print_traits(found: dict[Key, Calibration]) -> None:
    print("\n## Fitted traits\n")
    names = ("memory", "compute", "kv_read", "attention", "kernel_floor", "collective")
    print(f"| group | KV | {' | '.join(names)} | host ms/step | host us/row | reserved GB |")
    print("|-" * (len(names) + 5) + "|")
    for group, part in found.items():
        t = part.traits
        cells = " | ".join(f"{getattr(t, name):.2f}" for name in names)
        print(f"| {' / '.join(group)} | {t.kv} | {cells} | {t.host_step_s * 1e3:.2f} "
              f"| {t.host_row_s * 1e6:.1f} | {t.reserved_bytes / 1e9:.2f} |")  # fmt: skip


def _verdict(text: str, holds: bool, wanted: str) -> None:
    print(f"- {'ok' if holds else 'MISSED'}: {text} (wanted {wanted})")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    main()
