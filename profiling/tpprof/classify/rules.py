"""Kernel names to kinds, collectives and roles, by rules that are files: another engine needs text,
not code.

A rule fits a name that contains one of its texts, without regard to case. Files are asked in the
order of ORDER, rules in the order of their file, and the first that fits counts.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from tpprof.classify.work import WorkKind
from tpprof.errors import TraceError

ORDER = ("communication", "attention", "layers", "matmul", "torch")
"""Rule files, without `.toml`: what looks most specific is asked first."""
ROLES = (
    "gemm", "attention", "norm", "rope", "kv_write", "activation", "moe", "quant", "sample",
    "embed", "elementwise",
)  # fmt: skip
_KINDS: dict[str | None, WorkKind] = {"comm": WorkKind.COMM, "fused_comm": WorkKind.FUSED_COMM}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a name says."""

    kind: WorkKind = WorkKind.COMPUTE
    op: str = ""
    """The collective, for communication."""
    role: str = ""
    """Of ROLES; "" where no rule knows the name."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of a file."""

    texts: tuple[str, ...]
    """Lower case."""
    verdict: Verdict


def parse_rules(content: dict[str, Any], file: str) -> tuple[Rule, ...]:
    """The rules of one file. Raises TraceError naming file, rule and what is wrong."""
    found = []
    for number, rule in enumerate(content.get("rule", ()), 1):
        place = f"{file}, rule {number}"
        unknown = set(rule) - {"contains", "kind", "op", "role"}
        if unknown or not rule.get("contains"):
            raise TraceError(
                f"{place}: needs `contains` and knows kind, op and role; it has {sorted(rule)}"
            )
        kind, role = rule.get("kind"), rule.get("role", "")
        if kind is not None and kind not in _KINDS:
            raise TraceError(f"{place}: kind {kind!r} must be comm or fused_comm")
        if role and role not in ROLES:
            raise TraceError(f"{place}: role {role!r} must be one of {', '.join(ROLES)}")
        verdict = Verdict(_KINDS.get(kind, WorkKind.COMPUTE), rule.get("op", ""), role)
        found.append(Rule(tuple(text.lower() for text in rule["contains"]), verdict))
    return tuple(found)


@cache
def shipped_rules() -> tuple[Rule, ...]:
    """All rules that come along, in the order they are asked."""
    found: tuple[Rule, ...] = ()
    for name in ORDER:
        file = resources.files("tpprof.rules") / f"{name}.toml"
        found += parse_rules(tomllib.loads(file.read_text(encoding="utf-8")), f"{name}.toml")
    return found


def judge(names: Sequence[str], rules: Sequence[Rule] | None = None) -> list[Verdict]:
    """One verdict a name; a name no rule fits is COMPUTE without a role."""
    asked = shipped_rules() if rules is None else rules
    nothing = Verdict()
    found = []
    for name in names:
        text = name.lower()
        fitting = (rule for rule in asked if any(part in text for part in rule.texts))
        rule = next(fitting, None)
        found.append(rule.verdict if rule is not None else nothing)
    return found
