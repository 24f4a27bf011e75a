"""Kernel names to kinds, collectives and roles, by rules that are files: another engine needs text,
not code.

A rule fits a name that begins with one of its `begins` texts (behind a leading `void `) and
contains one of its `contains` texts; either may be left out. Case does not count. Files are asked
in the order of ORDER, rules in the order of their file, and the first that fits counts.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from tpprof.classify.work import WorkKind
from tpprof.errors import TraceError

ORDER = ("inductor", "communication", "attention", "layers", "matmul", "torch", "tpinfer")
"""Rule files, without `.toml`: what looks most specific is asked first; this project's own kernels,
of short names, last."""
ROLES = (
    "gemm", "attention", "norm", "rope", "kv_write", "activation", "moe", "quant", "sample",
    "embed", "elementwise", "normed_gemm", "added_gemm", "gated_gemm",
)  # fmt: skip
_KINDS = {"comm": WorkKind.COMM, "fused_comm": WorkKind.FUSED_COMM, "copy": WorkKind.COPY}
_FIELDS = {"begins", "contains", "kind", "op", "role"}


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
    """One rule of a file; texts are in lower case."""

    begins: tuple[str, ...]
    contains: tuple[str, ...]
    verdict: Verdict

    def fits(self, name: str) -> bool:
        """Whether it speaks of `name`, which is in lower case and without a leading `void `."""
        if self.begins and not name.startswith(self.begins):
            return False
        return not self.contains or any(part in name for part in self.contains)


def read_rules(text: str, file: str) -> tuple[Rule, ...]:
    """The rules of one file. Raises TraceError naming file, rule and what is wrong."""
    try:
        return parse_rules(tomllib.loads(text), file)
    except tomllib.TOMLDecodeError as error:
        raise TraceError(f"{file} is no TOML ({error}); correct it or take it away") from None


def parse_rules(content: dict[str, Any], file: str) -> tuple[Rule, ...]:
    """As `read_rules`, from the tables of a file."""
    rules = content.get("rule", [])
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise TraceError(f"{file}: rules are tables; write [[rule]] above each")
    return tuple(_rule(rule, f"{file}, rule {number}") for number, rule in enumerate(rules, 1))


def _rule(rule: dict[str, Any], place: str) -> Rule:
    if set(rule) - _FIELDS or not (rule.get("begins") or rule.get("contains")):
        raise TraceError(
            f"{place}: needs `begins` or `contains` and knows kind, op and role; it has "
            f"{', '.join(sorted(rule)) or 'nothing'}"
        )
    begins, contains = (
        _texts(rule.get(field, []), field, place) for field in ("begins", "contains")
    )
    kind, op, role = rule.get("kind"), rule.get("op", ""), rule.get("role", "")
    if kind is not None and (not isinstance(kind, str) or kind not in _KINDS):
        raise TraceError(f"{place}: kind {kind!r} must be comm, fused_comm or copy")
    if role and role not in ROLES:
        raise TraceError(f"{place}: role {role!r} must be one of {', '.join(ROLES)}")
    if not isinstance(op, str) or (kind in (None, "copy")) != (op == ""):
        raise TraceError(
            f"{place}: op {op!r} must name the collective of comm or fused_comm, and only there"
        )
    found = _KINDS[kind] if kind is not None else WorkKind.COMPUTE
    return Rule(begins, contains, Verdict(found, op, role))


def _texts(found: Any, field: str, place: str) -> tuple[str, ...]:
    if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found):
        raise TraceError(f"{place}: {field} must be a list of texts, and none of them empty")
    return tuple(text.lower() for text in found)


@cache
def shipped_rules() -> tuple[Rule, ...]:
    """All rules that come along, in the order they are asked."""
    found: tuple[Rule, ...] = ()
    for name in ORDER:
        file = resources.files("tpprof.rules") / f"{name}.toml"
        found += read_rules(file.read_text(encoding="utf-8"), f"{name}.toml")
    return found


def judge(names: Sequence[str], rules: Sequence[Rule] | None = None) -> list[Verdict]:
    """One verdict a name; a name no rule fits is COMPUTE without a role."""
    asked = shipped_rules() if rules is None else rules
    nothing = Verdict()
    found = []
    for name in names:
        text = name.lower().removeprefix("void ")
        rule = next((rule for rule in asked if rule.fits(text)), None)
        found.append(rule.verdict if rule is not None else nothing)
    return found
