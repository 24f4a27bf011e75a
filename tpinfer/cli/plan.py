"""`tpinfer plan`: how fast a model would be on a machine, which placement to take, and why."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tpinfer.cli.plan_flags import add_flags as add_flags
from tpinfer.config.errors import ConfigError

if TYPE_CHECKING:
    from tpinfer.planner.pictures import PrefillLaw
    from tpinfer.planner.placement import EngineSettings
    from tpinfer.planner.plan import Plan
    from tpinfer.planner.predict import Planner
    from tpinfer.planner.search import Found

EPILOG = """Numbers are predictions: each has its mode (datasheet, probe, calibrated) and the
interval that 80 of 100 measurements should fall into. Nothing is run, and no weights are read.

examples:
  tpinfer plan --model llama-3.1-70b --topology dgx-h100 --input-len 512 --output-len 128 \\
      --concurrency 64
  tpinfer plan --model DIR --topology my-host.yaml --tp 4 --precision fp8 --input-len 2000 \\
      --output-len 200 --rate 3.5 --slo ttft=500ms,tpot=30ms --html plan.html
  tpinfer plan --model DIR --topology my-host.yaml --tp 2 --input-len 32 --output-len 128 \\
      --concurrency 8 --compare report.json
  tpinfer plan calibrate measured.csv --json traits.json
"""
_MOST_ROWS = 256
_ROWS_EVER = 4096
"""Sequences of a step beyond which none is planned unless asked: what a step keeps for each leaves
no room for keys, and its products have long been bound by compute."""


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Plan, print, write."""
    if args.calibrate:
        return _calibrate(args)
    _require(args)
    planner, settings = _planner(args)
    sizes = _sizes(args)
    found = _found(args, planner, settings, sizes)
    law = _prefill(planner, found)
    if args.json != "-":
        print(_text(args, planner, found, law), flush=True)
    document = to_document(planner, found, law)
    if args.json:
        _write(args.json, json.dumps(document, indent=1) + "\n", "--json")
    if args.compare:
        print(_compared(found.plans[0], Path(args.compare)))
    if args.html:
        from tpinfer.cli.plan_html import render_page

        is_free = args.max_num_batched_tokens is None
        page = render_page(_title(planner), planner, found, law, is_free)
        _write(args.html, page, "--html")
    return 0 if any(plan.fits for plan in found.plans) else 1


def _calibrate(args: argparse.Namespace) -> int:
    from tpinfer.cli.plan_calibrate import calibrate_from

    if args.calibrate[0] != "calibrate" or len(args.calibrate) != 2:
        raise ConfigError(
            f"{' '.join(args.calibrate)!r} is not understood; plans take flags alone, and "
            "`calibrate` one file of measured points"
        )
    text, document = calibrate_from(Path(args.calibrate[1]))
    if args.json != "-":
        print(text)
    if args.json:
        _write(args.json, json.dumps(document, indent=1) + "\n", "--json")
    return 0


def _require(args: argparse.Namespace) -> None:
    names = ("model", "topology", "input_len", "output_len")
    missing = ["--" + name.replace("_", "-") for name in names if getattr(args, name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} missing; see `tpinfer plan --help` for examples")
    for name in ("tp", "pp", "dp", "num_requests", "steps_in_flight"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be 1 or more")


def _planner(args: argparse.Namespace) -> "tuple[Planner, EngineSettings]":
    from tpinfer.cli.plan_calibrate import traits_in
    from tpinfer.config.dtypes import DType
    from tpinfer.config.engine import DEFAULT_BATCHED_TOKENS
    from tpinfer.config.huggingface import read_model_spec
    from tpinfer.config.kv_cache import kv_cache_dtype
    from tpinfer.config.model_name import shape_or_model_directory
    from tpinfer.config.topology_reader import load_topology
    from tpinfer.config.units import parse_price
    from tpinfer.planner.placement import EngineSettings
    from tpinfer.planner.precision import precision_named
    from tpinfer.planner.predict import Planner
    from tpinfer.planner.workload import Slo, Workload, parse_slo

    spec = read_model_spec(shape_or_model_directory(args.model))
    topology = load_topology(args.topology, args.set)
    if args.price:
        topology = replace(topology, usd_per_gpu_hour=parse_price(args.price))
    workload = Workload(
        args.input_len, args.output_len, args.concurrency, args.rate, args.seed, args.prefix_hit
    )
    if workload.num_tokens > spec.max_position:
        raise ConfigError(
            f"--input-len {args.input_len} and --output-len {args.output_len} make "
            f"{workload.num_tokens} tokens, and the model takes {spec.max_position}; lower one"
        )
    names = {DType.FLOAT32: "fp32", DType.BFLOAT16: "bf16", DType.FLOAT16: "fp16"}
    dtype = spec.dtype
    if topology.measured and any(host.computes_on_cpu for host in topology.hosts):
        # As the runtime does, where a processor multiplies 16 bits more slowly.
        dtype = topology.measured.computed_in() or dtype
    precision = precision_named(names[dtype] if args.precision == "auto" else args.precision)
    precision = precision.with_kv(kv_cache_dtype(args.kv_cache_dtype, precision.activation))
    traits = None
    if args.traits:
        skus = {str(device.sku) for host in topology.hosts for device in host.devices}
        text = _read(args.traits)
        traits = traits_in(text, args.traits, skus, precision.name, args.engine)
        if traits.kv != "auto" and args.kv_cache_dtype == "auto":
            precision = precision.with_kv(precision_named(traits.kv).kv)
    rows = args.max_num_seqs
    if rows is None:
        rows = max(_MOST_ROWS, min(args.concurrency or 0, _ROWS_EVER))
    given = args.max_num_batched_tokens
    settings = EngineSettings(
        rows, DEFAULT_BATCHED_TOKENS if given is None else given, args.memory_utilization
    )
    slo = parse_slo(args.slo) if args.slo else Slo()
    ahead = args.steps_in_flight
    return Planner(spec, topology, precision, workload, slo, traits, ahead), settings


def _sizes(args: argparse.Namespace) -> tuple[int, int, int] | None:
    given = (args.tp, args.pp, args.dp)
    if given == (None, None, None):
        return None
    return (args.tp or 1, args.pp or 1, args.dp or 1)


def _found(
    args: argparse.Namespace,
    planner: "Planner",
    settings: "EngineSettings",
    sizes: tuple[int, int, int] | None,
) -> "Found":
    from tpinfer.planner.search import fixed, search

    if sizes is not None:
        if args.max_num_batched_tokens is None:
            settings = planner.with_chunk(sizes, settings)
        return fixed(planner, sizes, settings, args.num_requests)
    is_free = (args.max_num_seqs is None, args.max_num_batched_tokens is None)
    return search(planner, settings, is_free, args.num_requests)


def _prefill(planner: "Planner", found: "Found") -> "PrefillLaw | None":
    from tpinfer.planner.pictures import prefill_law

    best = found.plans[0] if found.plans else None
    if best is None or not best.fits:
        return None
    placement = planner.fit((best.tp, best.pp, best.dp), best.settings).placement
    return prefill_law(
        planner.model(placement), planner.workload.input_len, best.settings.max_num_batched_tokens
    )


def to_document(planner: "Planner", found: "Found", law: "PrefillLaw | None") -> dict[str, object]:
    """The JSON: `plans` has the keys that are kept stable, `details` the rest in the same order."""
    return {
        "plans": [plan.to_json() for plan in found.plans],
        "details": [
            {**plan.details(), "is_on_front": place in found.front}
            for place, plan in enumerate(found.plans)
        ],
        "load": planner.workload.words(),
        "precision": planner.precision.name,
        "topology": planner.topology.name,
        "prefill": law.to_json() if law else None,
        "num_estimated": found.num_estimated,
    }


def _title(planner: "Planner") -> str:
    spec, topology = planner.spec, planner.topology
    kinds = {device.sku or device.kind for host in topology.hosts for device in host.devices}
    count = sum(len(host.devices) for host in topology.hosts)
    return (
        f"{spec.architecture} of {spec.num_layers} layers in {planner.precision.name} on "
        f"{topology.name} ({count} x {', '.join(sorted(kinds))}): {planner.workload.words()}"
    )


def _text(
    args: argparse.Namespace, planner: "Planner", found: "Found", law: "PrefillLaw | None"
) -> str:
    from tpinfer.planner.report import render_plans

    return render_plans(f"{args.model}: {_title(planner)}", found, law)


def _compared(plan: "Plan", path: Path) -> str:
    """The plan against a report of tpprof's. Raises TpinferError."""
    from tpprof.report.jsonform import read_report
    from tpprof.report.prediction import Prediction, measured_in, render_comparison

    from tpinfer.planner.outcome import as_words

    if not plan.fits:
        raise ConfigError(f"--compare {path}: nothing is predicted, for {plan.reason}")
    words = as_words(plan.tpot_split), as_words(plan.ttft_split)
    measured = measured_in(read_report(path), str(path))
    return render_comparison(Prediction(*words, plan.relative, plan.mode), measured)


def _read(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise ConfigError(f"{name} cannot be read ({reason}); name another file") from error


def _write(name: str, text: str, flag: str) -> None:
    if name == "-":
        print(text, end="")
        return
    try:
        Path(name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{name}: cannot be written ({error.strerror}); pass another {flag}"
        ) from error
