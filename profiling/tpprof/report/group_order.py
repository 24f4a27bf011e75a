"""The order in which the rows of a grouping are shown."""

import re
from collections.abc import Sequence

from tpprof.results import Group

UNATTRIBUTED = "(unattributed)"
ORDERED = ("rank", "step", "phase", "layer")
"""Groupings whose keys have an order of their own; of others the longest comes first."""


def in_order(groups: Sequence[Group], by: str) -> list[Group]:
    """By the numbers in their keys, or by time; what belongs to none comes last."""
    if by in ORDERED:
        return sorted(groups, key=lambda group: (group.key == UNATTRIBUTED, _natural(group.key)))
    return sorted(groups, key=lambda group: (-group.wall_ns, group.key))


def _natural(key: str) -> list[tuple[int, int, str]]:
    """`layers.9` before `layers.10`."""
    parts = re.findall(r"\d+|\D+", key)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]
