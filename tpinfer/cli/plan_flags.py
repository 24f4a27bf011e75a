"""Flags of `tpinfer plan`."""

import argparse

from tpinfer.cli.set_flag import add_set_flag


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare all flags."""
    parser.add_argument(
        "calibrate", nargs="*", metavar="calibrate RESULTS",
        help="instead of planning: fit the planner to a CSV of measured points, and tell its error "
             "on points it has not seen",
    )  # fmt: skip
    _machine_flags(parser.add_argument_group("model and machine"))
    _load_flags(parser.add_argument_group("load"))
    _engine_flags(parser.add_argument_group("engine (default: what is best is looked for)"))
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="the plans as JSON; - is standard output")
    output.add_argument("--html", metavar="FILE", help="a page with pictures")
    output.add_argument(
        "--compare", metavar="REPORT.json",
        help="set the best plan against what tpprof measured (analyze --window steps --json)",
    )  # fmt: skip


def _machine_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model", metavar="DIR",
        help="checkpoint directory, a hub id in the local cache, or a shape such as llama-3.1-8b",
    )  # fmt: skip
    group.add_argument(
        "--topology", metavar="FILE", help="YAML of the machine, or the name of a shipped one"
    )
    add_set_flag(group)
    for axis, text in (
        ("tp", "tensor-parallel ranks"), ("pp", "pipeline stages"), ("dp", "replicas"),
    ):  # fmt: skip
        group.add_argument(
            f"--{axis}", type=int, metavar="N",
            help=f"{text}; without --tp, --pp and --dp placements are searched",
        )  # fmt: skip
    group.add_argument(
        "--precision", default="auto", metavar="NAME",
        help="weights and products: bf16, fp8, int8, int4 (bf16 products), fp16, fp32, fp4; auto: "
             "the checkpoint's, on a probed CPU what its ops ran in",
    )  # fmt: skip
    group.add_argument(
        "--kv-cache-dtype", choices=["auto", "bf16", "int8", "fp8"], default="auto",
        help="what keys and values are stored in; auto: as activations",
    )  # fmt: skip
    group.add_argument("--price", metavar="P", help="of a device-hour, such as 2.50USD/h")
    group.add_argument(
        "--traits", metavar="FILE", help="what `tpinfer plan calibrate` found for such a device"
    )
    group.add_argument(
        "--engine", metavar="NAME", help="whose traits, where the file has those of several engines"
    )


def _load_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--input-len", type=int, metavar="I", help="tokens of each prompt")
    group.add_argument("--output-len", type=int, metavar="O", help="tokens generated for each")
    group.add_argument(
        "--concurrency", type=int, metavar="C",
        help="requests in flight: whose last token came sends the next one at once",
    )  # fmt: skip
    group.add_argument(
        "--rate", type=float, metavar="R", help="requests a second, at random (Poisson)"
    )
    group.add_argument(
        "--prefix-hit", type=float, default=0.0, metavar="F",
        help="share of each prompt that all have in common and the prefix cache holds (0)",
    )  # fmt: skip
    group.add_argument("--slo", metavar="P", help="promises on means, such as ttft=500ms,tpot=30ms")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the arrivals (0)")
    group.add_argument(
        "--num-requests", type=int, metavar="N",
        help="requests simulated for each of a plan's engines (as many as settle the means)",
    )  # fmt: skip


def _engine_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-num-seqs", type=int, metavar="N", help="most sequences in one step of a replica"
    )
    group.add_argument(
        "--max-num-batched-tokens", type=int, metavar="N", help="most tokens in one step"
    )
    group.add_argument(
        "--steps-in-flight", type=int, metavar="N",
        help="steps handed to ranks at once: from 2 on the device hides the host's time, where "
             "that was probed (2 on GPUs, 1 on CPUs)",
    )  # fmt: skip
    group.add_argument(
        "--memory-utilization", type=float, default=0.9, metavar="F",
        help="share of what weights leave that the cache and activations may take (0.9)",
    )  # fmt: skip
