"""`tpinfer plan calibrate RESULTS`: fit the planner to measured points, and say how far off it is
on points that it has not seen. The traits go to a file that `tpinfer plan --traits` reads."""

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpinfer.config.errors import ConfigError

if TYPE_CHECKING:
    from tpinfer.planner.calibrate import Calibration, HeldOut
    from tpinfer.planner.traits import Traits

_NAME = 30


def calibrate_from(path: Path) -> tuple[str, dict[str, Any]]:
    """(table for people, JSON) of a CSV of measured points. Raises ConfigError."""
    from tpinfer.config.huggingface import read_model_spec
    from tpinfer.embedded.locate import shape_directory, shape_names
    from tpinfer.planner.calibrate import calibrate
    from tpinfer.planner.point_model import PointModels
    from tpinfer.planner.published import read_published

    published = read_published(path)
    specs = {name: read_model_spec(shape_directory(name)) for name in shape_names()}
    found = calibrate(published.points, PointModels(specs))
    document = {
        "groups": [_group_json(one) for one in found.values()],
        "unused": published.unused,
    }
    return _table(found, published.unused), document


def _table(found: "Mapping[tuple[str, str, str], Calibration]", unused: Mapping[str, int]) -> str:
    """One line a group, at most 100 columns."""
    from tpinfer.planner.calibrate import median_error

    lines = [
        "Median error of times, and part of the points inside 80 % intervals",
        f"{'device/engine/precision':<{_NAME}}{'points':>7}{'fitted':>9}{'other TP':>10}"
        f"{'inside':>8}{'other model':>13}{'inside':>8}",
    ]
    notes = []
    for one in found.values():
        cells = "".join(
            f"{_percent(median_error(held.judged) if held else None):>{width}}"
            f"{_percent(held.coverage() if held else None):>8}"
            for held, width in ((_held(one, "tp"), 10), (_held(one, "model"), 13))
        )
        lines.append(
            f"{one.traits.name:<{_NAME}}{len(one.fitted):>7}"
            f"{_percent(median_error(one.fitted) if one.fitted else None):>9}{cells}"
        )
        notes += [
            textwrap.fill(
                f"{one.traits.name}: {len(points)} points set aside: {reason}",
                100,
                subsequent_indent="  ",
            )
            for reason, points in one.set_aside.items()
        ]
    lines.append("fitted: in-sample; other TP, other model: of points held out of the fit.")
    count = sum(unused.values())
    if count:
        lines.append(f"{count} rows of other metrics or loads were not used; --json counts them.")
    return "\n".join([*lines, *notes])


def _held(one: "Calibration", by: str) -> "HeldOut | None":
    return next((held for held in one.held_out if held.by == by), None)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _group_json(one: "Calibration") -> dict[str, Any]:
    from tpinfer.planner.calibrate import median_error
    from tpinfer.planner.traits import write_traits

    return {
        "traits": json.loads(write_traits(one.traits)),
        "num_points": len(one.fitted),
        "median_error_fitted": median_error(one.fitted) if one.fitted else None,
        "held_out": {
            held.by: {
                "median_error": median_error(held.judged),
                "coverage": held.coverage(),
                "by_fold": {name: median_error(fold) for name, fold in held.folds.items()},
            }
            for held in one.held_out
        },
        "set_aside": {reason: len(points) for reason, points in one.set_aside.items()},
    }


def traits_in(
    text: str, source: str, skus: set[str], precision: str, engine: str | None
) -> "Traits":
    """From a file with one record, or with those of many groups: the one of this device and
    precision, of `engine` where several were measured. Raises ConfigError."""
    from tpinfer.planner.traits import read_traits

    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"{source} is not JSON ({error}); name a file of plan calibrate"
        ) from error
    if not isinstance(found, dict) or "groups" not in found:
        return read_traits(text, source)
    try:
        records = {one["traits"]["name"]: json.dumps(one["traits"]) for one in found["groups"]}
        parts = {name: name.split("/") for name in records}
        fits = [
            name
            for name, (sku, made_by, format_) in parts.items()
            if sku in skus and format_ == precision and engine in (None, made_by)
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{source} has groups without traits; write it with `tpinfer plan calibrate` again"
        ) from error
    if len(fits) != 1:
        what = f"{' or '.join(sorted(skus))} in {precision}"
        if fits:
            raise ConfigError(f"{source} has {', '.join(fits)} for {what}; say which with --engine")
        raise ConfigError(
            f"{source} has nothing for {what}{f' by {engine}' if engine else ''}; it has "
            f"{', '.join(records) or 'no groups'}"
        )
    return read_traits(records[fits[0]], source)
