"""Flags of `tpinfer bench` and the work they stand for. Names and meanings are those of vLLM's
commands; what cannot be had here is refused with what to do instead.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tpinfer.bench.datasets import (
    Encode,
    TextSample,
    custom_samples,
    read_custom,
    read_sharegpt,
    sharegpt_samples,
)
from tpinfer.bench.workload import PrefixWorkload, RandomWorkload, Sample
from tpinfer.config.errors import ConfigError
from tpinfer.config.sampling import SamplingParams

if TYPE_CHECKING:
    from tpinfer.config.model import ModelSpec

DATASETS = ("random", "sharegpt", "custom", "prefix_repetition")
_READERS: dict[str, Callable[[Path], list[TextSample]]] = {
    "sharegpt": read_sharegpt,
    "custom": read_custom,
}
_OUTPUT_LEN = 128
_BATCH_SIZE, _NUM_PROMPTS = 8, 64
_TAKE_A_FILE = "have the file here and pass --dataset-name sharegpt or custom with --dataset-path"
_ELSEWHERE = {
    "--use-beam-search": "there is no beam search here; leave it out, or sample with --n",
    "--async-engine": "this times the offline engine; leave it out",
    "--disable-frontend-multiprocessing": "the engine runs in rank 0's own process; leave it out",
    "--lora-path": "there are no adapters here yet; leave it out",
    "--hf-subset": f"nothing is downloaded; {_TAKE_A_FILE}",
    "--hf-split": f"nothing is downloaded; {_TAKE_A_FILE}",
    "--hf-max-batch-size": "other engines are not started; run them by their own commands",
}
"""Flags of vLLM's commands, and why they are refused."""
_DOWNLOADED = ("sonnet", "burstgpt", "hf", "random-mm")


@dataclass(frozen=True, slots=True)
class Workload:
    """What a benchmark hands over, run by run."""

    samples: Callable[[int, int], Sequence[Sample]]
    """(vocabulary size, run) -> its requests."""
    longest: int | None
    """Most tokens of a sequence; None until texts are tokenized."""


class _Refused(argparse.Action):
    """A flag that ends the command with its reason."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> NoReturn:
        parser.error(f"{option_string}: {_ELSEWHERE[self.option_strings[0]]}")


def workload_flags(group: argparse._ArgumentGroup) -> None:
    """How many prompts of what length, and how often."""
    count = partial(group.add_argument, type=int, metavar="N")
    count("--input-len", "--random-input-len", default=32, help="tokens of each prompt (32)")
    count(
        "--output-len", "--random-output-len",
        help="tokens generated for each (128; sharegpt: as many as the answer has)",
    )  # fmt: skip
    count("--batch-size", help=f"latency: prompts in a batch ({_BATCH_SIZE})")
    count("--num-prompts", help=f"throughput: prompts in all ({_NUM_PROMPTS})")
    count("--n", default=1, help="continuations of each prompt (1)")
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T",
        help="draw tokens at this one (0): always the likeliest; vLLM's commands draw at 1",
    )  # fmt: skip
    count("--num-iters-warmup", default=1, help="runs before any is counted (1)")
    count(
        "--num-iters", default=5,
        help="runs that are counted (5), each with other prompts; throughput tells of the one of "
             "median time",
    )  # fmt: skip
    count("--seed", default=0, help="key of the prompts (0)")
    group.add_argument(
        "--disable-detokenize", action="store_true", help="do not turn tokens into text"
    )


def dataset_flags(group: argparse._ArgumentGroup) -> None:
    """Prompts for `throughput` other than random ones of one length."""
    count = partial(group.add_argument, type=int, metavar="N")
    group.add_argument(
        "--dataset-name", metavar="NAME",
        help="random (the default), sharegpt (the default with a path), custom or "
             "prefix_repetition",
    )  # fmt: skip
    group.add_argument(
        "--dataset-path", "--dataset", metavar="FILE",
        help='sharegpt: JSON of conversations; custom: lines of {"prompt": "text"}',
    )  # fmt: skip
    count(
        "--prefix-len", "--random-prefix-len", default=0,
        help="random: tokens in front that all prompts share (0)",
    )  # fmt: skip
    group.add_argument(
        "--random-range-ratio", type=float, default=0.0, metavar="R",
        help="random: lengths from (1 - R) to (1 + R) times the given ones (0)",
    )  # fmt: skip
    for what, default, text in (
        ("prefix-len", 256, "tokens of each prefix"),
        ("suffix-len", 256, "tokens behind it"),
        ("num-prefixes", 10, "prefixes"),
        ("output-len", _OUTPUT_LEN, "tokens generated"),
    ):
        count(f"--prefix-repetition-{what}", default=default, help=f"{text} ({default})")
    hidden = argparse.SUPPRESS
    group.add_argument("--backend", help=hidden)
    for flag in _ELSEWHERE:
        group.add_argument(flag, action=_Refused, nargs="?", help=hidden)


def check_workload(args: argparse.Namespace, spec: "ModelSpec") -> None:
    """Refuse, before the work, what cannot be run. Raises ConfigError."""
    mine, others = ("batch-size", "num-prompts")[:: 1 if args.what == "latency" else -1]
    if _flag(args, others) is not None:
        raise ConfigError(
            f"--{others} {_flag(args, others)} says nothing to bench {args.what}; give --{mine}"
        )
    for flag in (mine, "num-iters", "n"):
        value = _flag(args, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag} {value} must be 1 or more")
    SamplingParams(temperature=args.temperature, n=args.n)
    if args.num_iters_warmup < 0:
        raise ConfigError(f"--num-iters-warmup {args.num_iters_warmup} must be 0 or more")
    if args.backend not in (None, "tpinfer", "vllm"):
        raise ConfigError(
            f"--backend {args.backend}: this times tpinfer's own engine; leave it out, or run the "
            "other engine by its own command"
        )
    _check_dataset(args)
    longest = read_workload(args, lambda text: list(text.encode())).longest
    limit = args.max_model_len or spec.max_position
    if longest is not None and longest > limit:
        raise ConfigError(
            f"prompt and output come to {longest} tokens, and "
            + (f"--max-model-len is {limit}" if args.max_model_len else f"the model takes {limit}")
            + "; lower --input-len or --output-len"
        )


def _flag(args: argparse.Namespace, name: str) -> int | None:
    return getattr(args, name.replace("-", "_"))


def dataset_name(args: argparse.Namespace) -> str:
    """Which dataset is meant. Raises ConfigError for one that cannot be had."""
    name = args.dataset_name or ("sharegpt" if args.dataset_path else "random")
    if name in _DOWNLOADED:
        raise ConfigError(
            f"--dataset-name {name} has to be downloaded, and nothing is here; {_TAKE_A_FILE}"
        )
    if name not in DATASETS:
        raise ConfigError(f"--dataset-name {name} is not known; use {', '.join(DATASETS)}")
    return name


def read_workload(args: argparse.Namespace, encode: Encode) -> Workload:
    """What the flags ask for; texts become tokens by `encode`. Raises ConfigError."""
    name = dataset_name(args)
    if args.what == "latency":
        count = _BATCH_SIZE if args.batch_size is None else args.batch_size
    else:
        count = _NUM_PROMPTS if args.num_prompts is None else args.num_prompts
    if name == "prefix_repetition":
        made = PrefixWorkload(
            count,
            args.prefix_repetition_num_prefixes,
            args.prefix_repetition_prefix_len,
            args.prefix_repetition_suffix_len,
            args.prefix_repetition_output_len,
            args.seed,
        )
        return Workload(made.samples, made.longest)
    output_len = args.output_len if args.output_len is not None else _OUTPUT_LEN
    if name == "random":
        drawn = RandomWorkload(
            count,
            args.input_len,
            output_len,
            args.prefix_len,
            args.random_range_ratio,
            args.seed,
        )
        return Workload(drawn.samples, drawn.longest)
    if output_len < 1:
        raise ConfigError(f"--output-len {output_len} must be 1 or more")
    found = _READERS[name](Path(args.dataset_path))
    if name == "sharegpt":
        samples = sharegpt_samples(found, encode, count, args.output_len, args.seed)
    else:
        samples = custom_samples(found, encode, count, output_len)
    return Workload(lambda vocab_size, run: samples, None)


def _check_dataset(args: argparse.Namespace) -> None:
    name = dataset_name(args)
    if args.what == "latency" and name != "random":
        raise ConfigError(
            f"--dataset-name {name}: latency times one batch of random prompts; use throughput"
        )
    reads = name in _READERS
    if reads and not args.dataset_path:
        raise ConfigError(f"--dataset-name {name} needs --dataset-path FILE")
    if args.dataset_path and not reads:
        raise ConfigError(f"--dataset-path is not for --dataset-name {name}; leave one of them out")
