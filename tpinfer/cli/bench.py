"""`tpinfer bench latency|throughput`: time the offline engine with made-up prompts, and say where
the time went. Flags carry the names that vLLM's commands of the same name use."""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from tpinfer.cli.bench_flags import check_workload, dataset_flags, read_workload, workload_flags
from tpinfer.cli.generate_flags import (
    check_output,
    check_placement,
    engine_config,
    memory_flags,
    model_flags,
    recording_flags,
    recording_request,
)
from tpinfer.cli.rank_start import run_on_ranks
from tpinfer.cli.stream import Progress
from tpinfer.config.errors import ConfigError
from tpinfer.config.huggingface import read_model_spec

if TYPE_CHECKING:
    from tpinfer.bench.offline import BenchResult
    from tpinfer.engine.rank_engine import Engine
    from tpinfer.engine.requests import GenerationRequest
    from tpinfer.launching.seat import Seat
    from tpinfer.text.tokenizer import Tokenizer

EPILOG = """examples:
  tpinfer bench latency --tp 2 --batch-size 1 --input-len 32 --output-len 128
  tpinfer bench throughput --tp 2 --num-prompts 64 --input-len 16 --output-len 128 --json out.json
  tpinfer bench throughput --dataset-name sharegpt --dataset-path talk.json --num-prompts 200
  tpinfer bench latency --model shape:qwen3-0.6b --tp 2 --num-iters 3 --profile traces
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare all flags."""
    parser.add_argument(
        "what", choices=["latency", "throughput"],
        help="latency: one batch, again and again; throughput: all prompts at once",
    )  # fmt: skip
    model_flags(parser.add_argument_group("model and ranks"))
    workload_flags(parser.add_argument_group("workload"))
    dataset_flags(parser.add_argument_group("datasets (throughput)"))
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", metavar="FILE", help="our keys: command, ttft_s, tpot_s, attribution, ..."
    )
    output.add_argument("--output-json", metavar="FILE", help="the keys that vLLM's command writes")
    memory_flags(parser.add_argument_group("memory and batching"))
    recording_flags(parser.add_argument_group("recording (read it with tpprof)"))


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Be the launcher, or one rank; returns the exit code."""
    return run_on_ranks(
        args, argv, lambda tp: _check(args, tp), lambda s: _run_rank(args, argv, s), False
    )


def _check(args: argparse.Namespace, tp: int) -> None:
    config = engine_config(args, tp)
    spec = read_model_spec(config.model_dir)
    check_placement(config, spec)
    config.check_model(spec)
    recording_request(args)
    for flag, name in (("--json", args.json), ("--output-json", args.output_json)):
        if name is not None:
            check_output(flag, name)
    check_workload(args, spec)
    if args.dataset_path and not (config.model_dir / "tokenizer.json").is_file():
        raise ConfigError(
            f"--dataset-path {args.dataset_path} is text, and {config.model_dir} has no "
            "tokenizer.json; use random prompts, or a model with a tokenizer"
        )


def _run_rank(args: argparse.Namespace, argv: Sequence[str], seat: "Seat") -> int:
    from tpinfer.engine.rank_engine import open_engine

    tp = seat.world if args.tp is None else args.tp
    config = engine_config(args, tp)
    if seat.rank:
        with closing(open_engine(config, seat)) as engine:
            if args.nvtx:
                engine.use_nvtx()
            engine.serve()
        return 0
    if seat.launcher not in ("tpinfer", "single"):
        _check(args, tp)
    tokenizer = _tokenizer(config.model_dir, is_needed=bool(args.dataset_path))
    progress = Progress(sys.stderr)
    shown = None if args.disable_detokenize else tokenizer
    engine = open_engine(config, seat, progress.show, shown)
    progress.finish()
    with closing(engine):
        vocab_size = read_model_spec(config.model_dir).vocab_size
        result = _measure(args, engine, vocab_size, tokenizer)
    _print(args, result)
    _write(args, argv, result)
    return 0


def _tokenizer(directory: Path, is_needed: bool) -> "Tokenizer | None":
    """The model's; None where a shape has none and random prompts need none. Raises
    CheckpointError for one that is needed."""
    from tpinfer.text.tokenizer import Tokenizer

    return Tokenizer(directory) if is_needed or (directory / "tokenizer.json").is_file() else None


def _measure(
    args: argparse.Namespace, engine: "Engine", vocab_size: int, tokenizer: "Tokenizer | None"
) -> "BenchResult":
    from tpinfer.bench.offline import measure, requests_of, run_batch

    workload = read_workload(args, tokenizer.encode if tokenizer is not None else _no_text)

    def requests(run: int) -> "list[GenerationRequest]":
        samples = workload.samples(vocab_size, run)
        return requests_of(samples, args.n, args.temperature, run)

    if args.nvtx:
        engine.use_nvtx()
    result = measure(engine, requests, args.num_iters_warmup, args.num_iters)
    recording = recording_request(args)
    if recording is not None:
        # A run of its own behind the counted ones: a recorder stretches what it records.
        engine.record(recording)
        run_batch(engine, requests(args.num_iters_warmup + args.num_iters))
        for warning in engine.write_recording(["tpinfer", *sys.argv[1:]]):
            print(f"warning: {warning}", file=sys.stderr)
    return result


def _no_text(text: str) -> list[int]:
    raise AssertionError("a dataset of texts has a tokenizer")


def _print(args: argparse.Namespace, result: "BenchResult") -> None:
    from tpinfer.cli.attribution_table import render_run

    if args.what == "latency":
        print(f"Avg latency: {sum(result.latencies_s) / len(result.latencies_s)} seconds")
        for percent, value in result.percentiles_s().items():
            print(f"{percent}% percentile latency: {value} seconds")
    else:
        middle = result.middle_run
        total = middle.num_input_tokens + middle.num_output_tokens
        print(
            f"Throughput: {middle.num_requests / middle.wall_s:.2f} requests/s, "
            f"{total / middle.wall_s:.2f} total tokens/s, "
            f"{middle.num_output_tokens / middle.wall_s:.2f} output tokens/s"
        )
        print(f"Total num prompt tokens:  {middle.num_input_tokens}")
        print(f"Total num output tokens:  {middle.num_output_tokens}")
    print(
        f"Medians: time to first token {result.ttft_s * 1e3:.2f} ms, per output token "
        f"{result.tpot_s * 1e3:.3f} ms, {result.output_tokens_per_s:.1f} output tokens/s\n"
    )
    report = result.runs[-1].report
    print(render_run(report), flush=True)
    if args.explain:
        print("\nWhat was chosen here, and why\n  " + "\n  ".join(report.choices), flush=True)


def _write(args: argparse.Namespace, argv: Sequence[str], result: "BenchResult") -> None:
    written = []
    if args.json:
        written.append((args.json, {"command": ["tpinfer", *argv], **result.to_json()}))
    if args.output_json:
        written.append((args.output_json, _vllm_keys(args, result)))
    for name, value in written:
        try:
            Path(name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"{name}: cannot be written ({error.strerror}); name another file"
            ) from error


def _vllm_keys(args: argparse.Namespace, result: "BenchResult") -> dict[str, object]:
    if args.what == "latency":
        return {
            "model_id": args.model,
            "avg_latency": sum(result.latencies_s) / len(result.latencies_s),
            "latencies": result.latencies_s,
            "percentiles": {str(p): value for p, value in result.percentiles_s().items()},
        }
    middle = result.middle_run
    num_tokens = middle.num_input_tokens + middle.num_output_tokens
    return {
        "elapsed_time": middle.wall_s,
        "num_requests": middle.num_requests,
        "total_num_tokens": num_tokens,
        "requests_per_second": middle.num_requests / middle.wall_s,
        "tokens_per_second": num_tokens / middle.wall_s,
    }
