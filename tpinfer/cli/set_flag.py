"""`--set`, for every command that takes a topology."""

import argparse


def add_set_flag(parser: argparse._ActionsContainer) -> None:
    """Declare it."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change a value of the topology, such as hosts.box.links.0.bw=16GB/s; repeatable",
    )
