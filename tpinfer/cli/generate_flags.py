"""Flags of `tpinfer generate`, and the settings they stand for."""

import argparse
import os
from pathlib import Path
from typing import get_args

from tpinfer.cli.set_flag import add_set_flag
from tpinfer.config.dtypes import DType
from tpinfer.config.engine import COMPUTE_DTYPES, CollectiveName, EngineConfig, RecordingRequest
from tpinfer.config.errors import ConfigError
from tpinfer.config.kv_cache import KVCacheDTypeName, KVLayoutName
from tpinfer.config.model import ModelSpec
from tpinfer.config.model_name import is_shape, model_directory
from tpinfer.config.topology_reader import load_topology
from tpinfer.config.units import parse_size, parse_time
from tpinfer.embedded.locate import MODELS, shape_names
from tpinfer.sharding.partition import partition_model

_RECORDED_STEPS, _SKIPPED_STEPS = 10, 3


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare all flags."""
    model_flags(parser.add_argument_group("model and ranks"))
    _prompt_flags(parser.add_argument_group("prompts"))
    _sampling_flags(
        parser.add_argument_group(
            "sampling (defaults: the checkpoint's generation_config.json, else greedy)"
        )
    )
    _output_flags(parser.add_argument_group("output"))
    memory_flags(parser.add_argument_group("memory and batching"))
    recording_flags(parser.add_argument_group("recording (read it with tpprof)"))


def model_flags(group: argparse._ArgumentGroup) -> None:
    """Which model, on what."""
    shapes = ", ".join(shape_names())
    group.add_argument(
        "--model", default="story", metavar="DIR",
        help="checkpoint directory, or a hub id already in the local cache; default: the small "
             "trained model that "
        f"comes along ({' and '.join(MODELS)}); shape:NAME gives random weights ({shapes})",
    )  # fmt: skip
    group.add_argument(
        "--tp", type=int, metavar="N", help="tensor-parallel ranks (default 1, or the launcher's)"
    )
    group.add_argument(
        "--dtype", choices=["auto", *(dtype.value for dtype in COMPUTE_DTYPES)],
        default="auto",
        help="compute in this; auto: the checkpoint's, float32 on CPUs without AVX512_BF16",
    )  # fmt: skip
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    group.add_argument(
        "--share-device", action="store_true",
        help="let several ranks sit on one GPU; emulation: no speed claim",
    )  # fmt: skip
    group.add_argument(
        "--nccl-library", metavar="FILE",
        help="with --share-device: libnccl.so.2 (2.30 or newer) that ranks load instead of torch's",
    )  # fmt: skip
    group.add_argument(
        "--collective", choices=get_args(CollectiveName), default="auto", metavar="NAME",
        help=f"what carries the sums between ranks: {', '.join(get_args(CollectiveName))}",
    )  # fmt: skip
    group.add_argument(
        "--topology",
        metavar="FILE",
        help="YAML of this machine, or the name of a shipped one: ceilings and shares",
    )
    add_set_flag(group)
    group.add_argument(
        "--explain", action="store_true", help="print each choice and the reason for it"
    )
    group.add_argument(
        "--wait-timeout",
        type=float,
        default=300.0,
        metavar="S",
        help="longest wait for a rank (300)",
    )
    group.add_argument(
        "--step-timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="longest wait for a step (60)",
    )


def _prompt_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompt", action="append", metavar="TEXT", help="can be given several times"
    )
    group.add_argument(
        "--file", metavar="FILE", help="the whole file is one prompt; - is standard input"
    )
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help='JSON lines of {"prompt": ...} or {"prompt_token_ids": [...]}',
    )
    group.add_argument("--chat", action="store_true", help="put prompts through the chat template")
    group.add_argument(
        "--raw", action="store_true", help="continue the prompt as it stands (the default)"
    )
    group.add_argument("--system", metavar="TEXT", help="system message of a chat")


def _sampling_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max-tokens", type=int, metavar="N", help="most tokens to write (128)")
    group.add_argument(
        "--temperature", type=float, metavar="T", help="0 always takes the likeliest token"
    )
    group.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    group.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens; 0: all")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="only the likeliest tokens that make up P"
    )
    group.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="only tokens at least P times as likely as the best",
    )
    group.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same text")
    group.add_argument(
        "--ignore-eos", action="store_true", help="go on to --max-tokens whatever comes"
    )
    group.add_argument("--n", type=int, default=1, metavar="N", help="continuations a prompt (1)")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; several times"
    )
    group.add_argument(
        "--include-stop", action="store_true", help="keep the text of --stop in the output"
    )
    group.add_argument("--min-tokens", type=int, metavar="N", help="no end before N tokens (0)")
    group.add_argument(
        "--repetition-penalty", type=float, metavar="X",
        help="above 1: what prompt or output hold already is less likely",
    )  # fmt: skip
    group.add_argument(
        "--frequency-penalty", type=float, metavar="X",
        help="taken off a token's logit for each time that the output holds it",
    )  # fmt: skip
    group.add_argument(
        "--presence-penalty", type=float, metavar="X",
        help="taken off once if the output holds it at all",
    )  # fmt: skip
    group.add_argument(
        "--logit-bias", action="append", metavar="TOKEN=X", help="added to a token's logit"
    )
    group.add_argument("--banned-tokens", metavar="IDS", help="token ids that must not come: 5,17")
    group.add_argument("--allowed-tokens", metavar="IDS", help="only these token ids may come")
    group.add_argument(
        "--logprobs", type=int, metavar="K",
        help="with --json: log probability of each token and of the K likeliest",
    )  # fmt: skip
    group.add_argument(
        "--prompt-logprobs", type=int, metavar="K", help="the same for the prompt's tokens"
    )
    group.add_argument(
        "--echo", action="store_true", help="with --json: text begins with the prompt's"
    )


def _output_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--json", metavar="FILE", help="one JSON object a prompt, in order; - is standard output"
    )
    group.add_argument(
        "--table", action=argparse.BooleanOptionalAction, default=None,
        help="print where the time went (default: on a terminal)",
    )  # fmt: skip


def memory_flags(group: argparse._ArgumentGroup) -> None:
    """What a step and the cache may hold."""
    group.add_argument(
        "--max-model-len", type=int, metavar="N", help="longest prompt plus output, in tokens"
    )
    group.add_argument(
        "--memory-utilization",
        type=float,
        default=0.9,
        metavar="X",
        help="share of free memory to use (0.9)",
    )
    group.add_argument(
        "--kv-bytes", metavar="SIZE", help="KV cache per rank, such as 2GB or a count of bytes"
    )
    group.add_argument(
        "--kv-host-bytes", metavar="SIZE", default="0",
        help="host memory per rank for KV blocks moved out of the cache (0)",
    )  # fmt: skip
    group.add_argument(
        "--kv-layout", choices=get_args(KVLayoutName), default="auto",
        help="auto: ranks that read the same KV head share its blocks out; replicated: each "
             "stores it whole",
    )  # fmt: skip
    group.add_argument(
        "--kv-cache-dtype", choices=get_args(KVCacheDTypeName), default="auto",
        help="store keys and values in this; auto: what is computed in",
    )  # fmt: skip
    group.add_argument(
        "--block-size", type=int, default=16, metavar="N", help="tokens per KV block (16)"
    )
    group.add_argument(
        "--max-num-seqs", type=int, default=32, metavar="N", help="most prompts in one step (32)"
    )
    group.add_argument(
        "--max-num-batched-tokens", type=int, metavar="N",
        help="most tokens in one step; longer prompts go in chunks (by the rates of --topology, "
             "else 2048)",
    )  # fmt: skip
    group.add_argument(
        "--step-budget", metavar="TIME",
        help="predicted time, such as 25ms, that prompts may fill a step up to",
    )  # fmt: skip
    group.add_argument(
        "--no-prefix-caching", dest="prefix_caching", action="store_false",
        help="compute every prompt whole, also what another one began with",
    )  # fmt: skip
    group.add_argument(
        "--steps-in-flight", type=int, metavar="N",
        help="above 1: plan the next steps while one runs (2 on GPUs, else 1)",
    )  # fmt: skip
    group.add_argument(
        "--no-cuda-graphs", dest="cuda_graphs", action="store_false",
        help="GPUs: launch the ops of decode steps one by one, instead of replaying recorded steps",
    )  # fmt: skip
    group.add_argument(
        "--batch-invariant", action="store_true",
        help="GPUs: attention of a row has the same bits in every batch; slower",
    )  # fmt: skip


def recording_flags(group: argparse._ArgumentGroup) -> None:
    """What to record, and for whom."""
    group.add_argument(
        "--profile", metavar="DIR",
        help="record some steps on every rank with torch's profiler, and write them there",
    )  # fmt: skip
    group.add_argument(
        "--profile-steps", type=int, metavar="N", help=f"steps to record ({_RECORDED_STEPS})"
    )
    group.add_argument(
        "--profile-skip", type=int, metavar="N",
        help=f"steps to run before ({_SKIPPED_STEPS}); 0 records the time to first token too",
    )  # fmt: skip
    group.add_argument(
        "--nvtx", action="store_true", help="name steps and ops to Nsight Systems (launch/nsys.sh)"
    )


def recording_request(args: argparse.Namespace) -> RecordingRequest | None:
    """What --profile asks for. Raises ConfigError."""
    if args.profile is None:
        for flag, given in (
            ("--profile-steps", args.profile_steps),
            ("--profile-skip", args.profile_skip),
        ):
            if given is not None:
                raise ConfigError(f"{flag} {given} says what --profile records; add --profile DIR")
        return None
    num_steps = _RECORDED_STEPS if args.profile_steps is None else args.profile_steps
    num_skipped = _SKIPPED_STEPS if args.profile_skip is None else args.profile_skip
    if num_steps < 1 or num_skipped < 0:
        raise ConfigError(
            f"--profile-steps {num_steps} must be 1 or more and --profile-skip {num_skipped} 0 or "
            "more"
        )
    directory = Path(args.profile)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--profile {directory}: cannot be made ({error.strerror}); name another directory"
        ) from error
    return RecordingRequest(directory, num_skipped, num_steps)


def check_output(flag: str, name: str) -> None:
    """Refuse, before the work, a file that cannot be written after it. Raises ConfigError."""
    path = Path(name)
    if path.is_dir():
        raise ConfigError(f"{flag} {name} is a directory; name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"{flag} {name}: there is no directory {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{flag} {name} cannot be written here; name another place")


def check_placement(config: EngineConfig, spec: ModelSpec) -> None:
    """Refuse, before the work, a model that cannot be cut over the ranks or a topology without
    places and paths for them. Raises ConfigError."""
    topology = None
    if config.topology:
        topology = load_topology(config.topology, config.topology_settings)
    partition_model(spec, config.tp, topology.shares if topology else None, config.kv_layout)
    if topology is not None:
        for rank in range(config.tp):
            topology.ceilings_of_rank(rank, config.tp)


def engine_config(args: argparse.Namespace, tp: int) -> EngineConfig:
    """The engine settings of a run on `tp` ranks. Raises ConfigError."""
    return EngineConfig(
        model_dir=model_directory(args.model),
        tp=tp,
        dtype=None if args.dtype == "auto" else DType(args.dtype),
        load_format="random" if is_shape(args.model) else "auto",
        max_model_len=args.max_model_len,
        memory_utilization=args.memory_utilization,
        kv_bytes=_bytes("--kv-bytes", args.kv_bytes),
        kv_host_bytes=_bytes("--kv-host-bytes", args.kv_host_bytes) or 0,
        kv_layout=args.kv_layout,
        kv_cache_dtype=args.kv_cache_dtype,
        block_size=args.block_size,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        step_budget_s=_seconds("--step-budget", args.step_budget),
        prefix_caching=args.prefix_caching,
        batch_invariant=args.batch_invariant,
        cuda_graphs=args.cuda_graphs,
        steps_in_flight=args.steps_in_flight,
        collective=args.collective,
        device=args.device,
        share_device=args.share_device,
        nccl_library=args.nccl_library,
        topology=args.topology,
        topology_settings=tuple(args.set),
        wait_timeout_s=args.wait_timeout,
        step_timeout_s=args.step_timeout,
    )


def _bytes(flag: str, text: str | None) -> int | None:
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    try:
        return int(parse_size(text))
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}, or as a count of bytes") from error


def _seconds(flag: str, text: str | None) -> float | None:
    try:
        return None if text is None else parse_time(text)
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from error
