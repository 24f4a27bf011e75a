"""Published serving measurements as groups that a model can be judged by.

Reads the table of one metric a row that `plan calibrate` takes: model, gpu, tp, pp, precision, isl,
osl, concurrency_or_batch, metric, value. Rows it cannot use (lengths that vary, unknown devices,
other metrics) are counted by reason, not dropped in silence.
"""

import csv
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tpinfer.config.errors import ConfigError

_NEEDED = ("system", "model", "gpu", "tp", "pp", "precision", "isl", "osl",
           "concurrency_or_batch", "metric", "value")  # fmt: skip
_DEVICES = {
    "a100": "a100-sxm-80g", "gh200": "gh200-96g", "gb200": "gb200", "h100": "h100-sxm-80g",
    "h200": "h200-sxm", "b200": "b200", "l40s": "l40s", "rtx4090": "rtx-4090",
    "rtxpro6000": "rtx-pro-6000", "mi300x": "mi300x",
}  # fmt: skip
_ENGINES = (("trt", "trtllm"), ("tensorrt", "trtllm"), ("vllm", "vllm"), ("sglang", "sglang"))
_MODELS = {
    r"llama-?3\.[13]-8b": "llama-3.1-8b", r"llama-?3\.[13]-70b": "llama-3.1-70b",
    r"llama-?3\.1-405b": "llama-3.1-405b", r"llama-?2-70b": "llama-2-70b",
    r"llama-?2-7b": "llama-2-7b", r"mistral-7b": "mistral-7b",
    r"qwen3-0\.6b": "qwen3-0.6b", r"qwen3-1\.7b": "qwen3-1.7b", r"qwen3-4b": "qwen3-4b",
    r"qwen3-8b": "qwen3-8b", r"qwen3-14b": "qwen3-14b", r"qwen3-32b": "qwen3-32b",
}  # fmt: skip
_RUNS = {
    ("trtllm", 128, 128): 30000, ("trtllm", 128, 2048): 3000, ("trtllm", 128, 4096): 1500,
    ("trtllm", 500, 2000): 3000, ("trtllm", 1000, 1000): 3000, ("trtllm", 1000, 2000): 1500,
    ("trtllm", 1024, 2048): 1500, ("trtllm", 2048, 128): 3000, ("trtllm", 2048, 2048): 1500,
    ("trtllm", 5000, 500): 1500, ("trtllm", 20000, 2000): 1000,
}  # fmt: skip
"""Requests of a throughput run, by the table in TensorRT-LLM's docs/source/performance/
perf-overview.md (that of 1024/2048 is taken as that of 1000/2000)."""


@dataclass(frozen=True, slots=True)
class Point:
    """One measured figure."""

    device: str
    """Key of the catalogue."""
    engine: str
    """`vllm`, `sglang`, `trtllm`, `tpinfer`."""
    version: str
    """The engine as its publisher names it: groups of several versions are told apart by it."""
    precision: str
    model: str
    tp: int
    pp: int
    input_len: int
    output_len: int
    concurrency: int | None
    """None: saturated, more requests than fit."""
    num_requests: int | None
    """Length of a saturated run, where its publisher documents it."""
    value: float
    """Seconds of TPOT; output tokens a second where saturated."""

    @property
    def is_throughput(self) -> bool:
        """Whether `value` is a throughput."""
        return self.concurrency is None

    @property
    def group(self) -> tuple[str, str, str]:
        """(device, engine, precision): what is calibrated together."""
        return self.device, self.engine, self.precision


@dataclass(frozen=True, slots=True)
class Published:
    """What a table holds."""

    points: tuple[Point, ...]
    unused: dict[str, int]
    """Rows by the reason why they are left out."""


def read_published(path: Path) -> Published:
    """Raises ConfigError naming file, line and column."""
    points: list[Point] = []
    unused: Counter[str] = Counter()
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            missing = [name for name in _NEEDED if name not in (rows.fieldnames or ())]
            if missing:
                raise ConfigError(
                    f"{path} lacks the column {missing[0]}; its first line must name "
                    f"{', '.join(_NEEDED)}"
                )
            for row in rows:
                found = _point(row, f"{path}:{rows.line_num}")
                if isinstance(found, str):
                    unused[found] += 1
                else:
                    points.append(found)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give a CSV file") from error
    return Published(tuple(points), dict(unused))


def _point(row: dict[str, str], where: str) -> Point | str:
    """A point, or why the row is none."""
    metric, load = row["metric"] or "", row["concurrency_or_batch"] or ""
    concurrency = re.fullmatch(r"c=(\d+)", load)
    if metric == "output tok/s total" and "saturated" in load:
        factor = 1.0
    elif re.fullmatch(r"(TPOT|ITL)( mean| median)? ms", metric) and concurrency:
        factor = 1e-3
    else:
        return f"{metric or 'no metric'}, {'closed loop' if concurrency else 'other load'}"
    plain = re.sub(r"[^a-z0-9]", "", (row["gpu"] or "").lower())
    device = next((sku for key, sku in _DEVICES.items() if key in plain), None)
    if device is None:
        return f"device {row['gpu']}"
    model = next(
        (m for p, m in _MODELS.items() if re.search(p, (row["model"] or "").lower())), None
    )
    if model is None:
        return f"model {row['model']}"
    engine = next((e for key, e in _ENGINES if (row["system"] or "").lower().startswith(key)), None)
    if engine is None:
        return f"engine {row['system']}"
    isl, osl = _count(row, "isl", where), _count(row, "osl", where)
    return Point(
        device=device,
        engine=engine,
        version=row["system"],
        precision=(row["precision"] or "").split("(")[0],
        model=model,
        tp=_count(row, "tp", where),
        pp=_count(row, "pp", where),
        input_len=isl,
        output_len=osl,
        concurrency=int(concurrency[1]) if concurrency else None,
        num_requests=_RUNS.get((engine, isl, osl)) if concurrency is None else None,
        value=_number(row, "value", where) * factor,
    )


def _number(row: dict[str, str], column: str, where: str) -> float:
    try:
        value = float(row[column])
    except (TypeError, ValueError):
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{where}: {column} is {row[column]!r}; it must be a number above 0")
    return value


def _count(row: dict[str, str], column: str, where: str) -> int:
    value = _number(row, column, where)
    if value != int(value):
        raise ConfigError(f"{where}: {column} is {row[column]!r}; it must be a whole number")
    return int(value)
