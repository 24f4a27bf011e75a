"""`tpinfer generate`: start ranks if nobody has, then generate, stream and tell where the time
went.

Everything the user can get wrong is checked before a rank starts.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from tpinfer.cli.generate_flags import add_flags as add_flags
from tpinfer.cli.generate_flags import (
    check_output,
    check_placement,
    engine_config,
    recording_request,
)
from tpinfer.cli.prompts import Prompt, argument_text, read_prompts, reads_stdin
from tpinfer.cli.rank_start import run_on_ranks
from tpinfer.cli.results_json import write_results
from tpinfer.cli.stream import Progress, TextStream
from tpinfer.config.errors import ConfigError, TpinferError
from tpinfer.config.huggingface import read_generation_defaults, read_model_spec
from tpinfer.config.model_name import is_shape
from tpinfer.config.sampling import SamplingParams

if TYPE_CHECKING:
    from tpinfer.engine.rank_engine import Engine
    from tpinfer.engine.requests import GenerationRequest
    from tpinfer.launching.seat import Seat
    from tpinfer.text.tokenizer import Tokenizer

EPILOG = """examples:
  tpinfer generate --prompt "Once upon a time" --max-tokens 60
  tpinfer generate --tp 2 --chat --prompt "Tell me a story about a fox."
  tpinfer generate --model ~/models/Qwen3-0.6B --tp 2 --prompts questions.jsonl --json answers.jsonl
  torchrun --nproc-per-node 2 -m tpinfer generate --prompt "Hello"
"""


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Be the launcher, or one rank; returns the exit code."""
    return run_on_ranks(
        args, argv, lambda tp: _check(args, tp), lambda s: _run_rank(args, s), reads_stdin(args)
    )


def _check(args: argparse.Namespace, tp: int) -> None:
    """Refuse what cannot work, with the remedy, while nothing has started. Raises ConfigError."""
    config = engine_config(args, tp)
    spec = read_model_spec(config.model_dir)
    config.check_model(spec)
    check_placement(config, spec)
    _sampling(args, config.model_dir)
    recording_request(args)
    if args.json is None:
        _check_without_json(args)
    elif args.json != "-":
        check_output("--json", args.json)
    if args.chat and args.raw:
        raise ConfigError("--chat and --raw exclude each other; give one")
    if args.system and not args.chat:
        raise ConfigError("--system speaks to a chat, and --chat is not there; add it")
    if args.greedy and args.temperature:
        raise ConfigError(
            f"--greedy and --temperature {args.temperature} exclude each other; give one"
        )
    if not reads_stdin(args):
        read_prompts(args)


def _check_without_json(args: argparse.Namespace) -> None:
    """Refuse what would be computed and shown nowhere. Raises ConfigError."""
    for flag, given in (
        ("--logprobs", args.logprobs),
        ("--prompt-logprobs", args.prompt_logprobs),
        ("--echo", args.echo or None),
    ):
        if given is not None:
            shown = flag if given is True else f"{flag} {given}"
            raise ConfigError(
                f"{shown} is for --json, and --json is not there; add --json FILE, or --json - for "
                "standard output"
            )


def _run_rank(args: argparse.Namespace, seat: "Seat") -> int:
    from tpinfer.engine.rank_engine import open_engine

    config = engine_config(args, seat.world if args.tp is None else args.tp)
    if seat.rank:
        engine = open_engine(config, seat)
        with closing(engine):
            if args.nvtx:
                engine.use_nvtx()
            engine.serve()
        return 0
    if seat.launcher not in ("tpinfer", "single"):
        _check(args, config.tp)
    prompts = read_prompts(args)
    tokenizer = _tokenizer(args, config.model_dir, prompts)
    requests = _requests(args, config.model_dir, prompts, tokenizer)
    progress = Progress(sys.stderr)
    engine = open_engine(config, seat, progress.show, tokenizer)
    progress.finish()
    with closing(engine):
        return _generate(args, engine, prompts, requests, tokenizer)


def _generate(
    args: argparse.Namespace,
    engine: "Engine",
    prompts: Sequence[Prompt],
    requests: "Sequence[GenerationRequest]",
    tokenizer: "Tokenizer | None",
) -> int:
    quiet = args.json == "-"
    echoes = [prompt.text if not args.chat and args.prompt else None for prompt in prompts]
    stream = TextStream(sys.stdout, tokenizer is not None, echoes, args.n) if not quiet else None
    exit_code, failed = 0, False
    recording = recording_request(args)
    if args.nvtx:
        engine.use_nvtx()
    if recording is not None:
        engine.record(recording)
    try:
        for event in engine.generate(requests):
            if stream is not None:
                stream.show(event)
            if event.finish_reason == "error":
                failed = True
    except KeyboardInterrupt:
        exit_code = 130
    if stream is not None:
        stream.finish()
    if exit_code:
        print("stopped", file=sys.stderr)
        return exit_code
    if recording is not None:
        _write_recording(engine, recording.directory)
    if args.json:
        write_results(args.json, engine.results())
    wants_table = sys.stdout.isatty() if args.table is None else args.table
    if (wants_table and not quiet) or args.explain:
        _print_report(args, engine, wants_table and not quiet)
    if failed:
        _raise_failures(engine)
    return 0


def _raise_failures(engine: "Engine") -> None:
    """Say why requests ended by an error. Raises TpinferError."""
    results = engine.results()
    found: list[str] = []
    for number, result in enumerate(results, 1):
        which = f"prompt {number}: " if len(results) > 1 else ""
        found += [which + text for text in dict.fromkeys(o.error for o in result.outputs) if text]
    raise TpinferError("\n".join(found))


def _write_recording(engine: "Engine", directory: Path) -> None:
    for warning in engine.write_recording(["tpinfer", *sys.argv[1:]]):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"recorded to {directory}; read it with: tpprof analyze {directory}", file=sys.stderr)


def _print_report(args: argparse.Namespace, engine: "Engine", with_table: bool) -> None:
    from tpinfer.cli.attribution_table import render_run

    report = engine.report()
    if with_table:
        print("\n" + render_run(report))
    if args.explain:
        text = "\nWhat was chosen here, and why\n  " + "\n  ".join(report.choices)
        print(text, file=sys.stderr if args.json == "-" else sys.stdout, flush=True)


def _tokenizer(
    args: argparse.Namespace, directory: Path, prompts: Sequence[Prompt]
) -> "Tokenizer | None":
    """The checkpoint's tokenizer; None where it has none and none is needed."""
    from tpinfer.text.tokenizer import Tokenizer

    if (directory / "tokenizer.json").is_file():
        return Tokenizer(directory)
    needed = any(prompt.token_ids is None for prompt in prompts)
    return Tokenizer(directory) if needed and not is_shape(args.model) else None


def _requests(
    args: argparse.Namespace,
    directory: Path,
    prompts: Sequence[Prompt],
    tokenizer: "Tokenizer | None",
) -> "list[GenerationRequest]":
    from tpinfer.engine.requests import GenerationRequest

    params = _sampling(args, directory)
    vocab_size = read_model_spec(directory).vocab_size
    requests = []
    for number, prompt in enumerate(prompts, 1):
        token_ids = list(prompt.token_ids or _encode(args, directory, prompt.text or "", tokenizer))
        if not token_ids:
            raise ConfigError(f"prompt {number} has no tokens; give it at least one character")
        too_large = next((t for t in token_ids if t >= vocab_size), None)
        if too_large is not None:
            raise ConfigError(
                f"prompt {number}: token {too_large} is outside the model's vocabulary of "
                f"{vocab_size}; "
                "tokenizer and model do not belong together"
            )
        requests.append(GenerationRequest(token_ids, params))
    return requests


def _encode(
    args: argparse.Namespace, directory: Path, text: str, tokenizer: "Tokenizer | None"
) -> list[int]:
    if tokenizer is None:
        return list(text.encode())  # random weights have no tokenizer: bytes stand in for tokens
    if not args.chat:
        return tokenizer.encode(text)
    from tpinfer.text.chat_template import ChatTemplate, find_template

    source = find_template(directory)
    if source is None:
        raise ConfigError(f"{directory} has no chat template; leave out --chat")
    names = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    system = argument_text("--system", args.system) if args.system else None
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    return tokenizer.encode(ChatTemplate(source, names).render(messages), add_special_tokens=False)


def _sampling(args: argparse.Namespace, directory: Path) -> SamplingParams:
    spec = read_model_spec(directory)
    params = read_generation_defaults(directory).sampling_params(
        spec.eos_token_ids,
        temperature=0.0 if args.greedy else args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        max_tokens=args.max_tokens,
        ignore_eos=args.ignore_eos,
        n=args.n,
        stop=tuple(argument_text("--stop", text) for text in args.stop or ()),
        include_stop_in_output=args.include_stop,
        min_tokens=args.min_tokens,
        repetition_penalty=args.repetition_penalty,
        frequency_penalty=args.frequency_penalty,
        presence_penalty=args.presence_penalty,
        logit_bias=_logit_bias(args.logit_bias or ()),
        banned_token_ids=_token_ids("--banned-tokens", args.banned_tokens),
        allowed_token_ids=_token_ids("--allowed-tokens", args.allowed_tokens),
        logprobs=args.logprobs,
        prompt_logprobs=args.prompt_logprobs,
        echo=args.echo,
    )
    params.check_vocab(spec.vocab_size)
    return params


def _logit_bias(entries: Sequence[str]) -> tuple[tuple[int, float], ...] | None:
    found: list[tuple[int, float]] = []
    for entry in entries:
        token, _, bias = entry.partition("=")
        try:
            found.append((int(token), float(bias)))
        except ValueError as error:
            raise ConfigError(
                f"--logit-bias {entry!r} is not TOKEN=X; write one such as 17=-2.5"
            ) from error
    return tuple(found) or None


def _token_ids(flag: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{flag} {text!r} is not a list of token ids such as 5,17") from error


__all__ = ["EPILOG", "add_flags", "run"]
