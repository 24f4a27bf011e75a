"""Which op of a decoder each kernel of a foreign step is, told from the order of kernel names.

A replayed graph carries no shapes and no modules; but a decoder's layers repeat, and the order in
one is fixed: norm, qkv, rope, attention, out, (reduce,) norm, gate-up, activation, down, (reduce).
Attention kernels are the anchors. Where their number is not the model's number of layers, or what
lies between them does not repeat, nothing is claimed, and the reason is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from tpprof.classify.rules import Verdict
from tpprof.classify.work import WorkKind

LEAST_REPEATS = 0.8
"""Share of kernels between two anchors that must be those between the next two, in the median."""


@dataclass(frozen=True, slots=True)
class Roles:
    """Op ids of one step's kernels."""

    keys: list[str] = field(default_factory=list)
    """Ledger's id per kernel; "" where it is none of them."""
    layers: list[int] = field(default_factory=list)
    """Layer per kernel, also where the id is unknown; -1 outside."""
    period: int = 0
    """Kernels of a layer."""
    reason: str = ""
    """Why nothing is claimed."""


def assign_roles(names: Sequence[int], verdicts: Sequence[Verdict], num_layers: int) -> Roles:
    """Roles of the kernels of one step, in order of time.

    names: equal numbers for equal names. num_layers: of the model.
    """
    roles = [verdict.role for verdict in verdicts]
    if "moe" in roles:
        return Roles(reason="it has expert layers, which have no model here")
    anchors = _anchors(roles)
    if len(anchors) != num_layers:
        return Roles(
            reason=f"{len(anchors)} attention calls were found and the model has {num_layers} "
            "layers; check --model, and whether the step is whole"
        )
    period = _period(np.asarray(names), anchors)
    if period is None:
        return Roles(reason="the kernels between attention calls do not repeat from layer to layer")
    walk = _Walk(num_layers)
    for role, verdict in zip(roles, verdicts, strict=True):
        walk.step(role, verdict.kind)
    return Roles(walk.keys, walk.layers, period)


def _anchors(roles: Sequence[str]) -> list[int]:
    """First kernel of each run of attention kernels; a merge or reduction behind one, with only
    small kernels between, belongs to it."""
    found: list[int] = []
    apart = True
    for place, role in enumerate(roles):
        if role == "attention":
            if apart:
                found.append(place)
            apart = False
        elif role == "gemm":
            apart = True
    return found


def _period(names: np.ndarray, anchors: Sequence[int]) -> int | None:
    """Kernels from anchor to anchor; None where neighbours are unlike."""
    if len(anchors) < 2:
        return len(names)
    stretches = [names[a:b] for a, b in pairwise(anchors)]
    lengths = [len(one) for one in stretches]
    alike = []
    for distance in (1, 2):  # layers may alternate
        shares = [
            float((one[: min(len(one), len(two))] == two[: min(len(one), len(two))]).sum())
            / max(len(one), len(two))
            for one, two in zip(stretches, stretches[distance:], strict=False)
        ]
        alike.append(float(np.median(shares)) if shares else 1.0)
    return int(np.median(lengths)) if max(alike) >= LEAST_REPEATS else None


class _Walk:
    """Goes through the kernels and keeps what comes next."""

    def __init__(self, num_layers: int) -> None:
        self.keys: list[str] = []
        self.layers: list[int] = []
        self._num_layers = num_layers
        self._layer = 0
        self._next = "start"
        self._in_attention = False

    def step(self, role: str, kind: WorkKind) -> None:
        """Take one kernel."""
        if self._in_attention and role in ("gemm", "norm"):
            self._in_attention, self._next = False, "out"
        key = self._key(role, kind)
        inside = self._next not in ("start", "head", "end")
        self.keys.append(key)
        self.layers.append(self._layer if inside and self._layer < self._num_layers else -1)

    def _key(self, role: str, kind: WorkKind) -> str:
        if kind in (WorkKind.COMM, WorkKind.FUSED_COMM):
            return self._communicate(kind)
        if role == "attention":
            self._in_attention = True
            self._next = "core"
            return self._op("attn.core")
        handler = {
            "start": self._start, "qkv": self._qkv, "core": self._rest, "out": self._out,
            "mlp_norm": self._mlp_norm, "gate_up": self._gate_up, "down": self._down,
            "next_norm": self._next_norm, "head": self._head, "end": self._end,
        }[self._next]  # fmt: skip
        return handler(role)

    def _op(self, name: str) -> str:
        return f"layers.{self._layer}.{name}"

    def _communicate(self, kind: WorkKind) -> str:
        fused = kind == WorkKind.FUSED_COMM
        if self._next in ("core", "mlp_norm", "out"):
            self._in_attention = False
            key = self._op("attn.reduce")
            self._next = "gate_up" if fused else "mlp_norm"
            return key
        if self._next in ("next_norm", "down"):
            key = self._op("mlp.reduce")
            self._next = "next_norm"
            if fused:
                self._leave_layer()
            return key
        if self._next == "start":
            return "embed.reduce"
        return "head.gather" if self._next in ("head", "end") else ""

    def _leave_layer(self) -> None:
        self._layer += 1
        self._next = "qkv" if self._layer < self._num_layers else "head"

    def _start(self, role: str) -> str:
        if role == "norm":
            self._next = "qkv"
            return "layers.0.attn.norm"
        return "embed" if role == "embed" else ""

    def _qkv(self, role: str) -> str:
        if role == "gemm":
            return self._op("attn.qkv")
        if role in ("rope", "kv_write", "norm", "elementwise", "quant"):
            return self._op("attn.rope")
        return ""

    def _rest(self, role: str) -> str:
        return self._op("attn.core") if role in ("elementwise", "kv_write") else ""

    def _out(self, role: str) -> str:
        if role == "gemm":
            self._next = "mlp_norm"
            return self._op("attn.out")
        return ""

    def _mlp_norm(self, role: str) -> str:
        if role == "gemm":  # the second half of a split product
            return self._op("attn.out")
        if role == "norm":
            self._next = "gate_up"
            return self._op("mlp.norm")
        return ""

    def _gate_up(self, role: str) -> str:
        if role == "gemm":
            return self._op("mlp.gate_up")
        if role == "activation":
            self._next = "down"
            return self._op("mlp.act")
        return ""

    def _down(self, role: str) -> str:
        if role == "gemm":
            self._next = "next_norm"
            return self._op("mlp.down")
        return ""

    def _next_norm(self, role: str) -> str:
        if role == "gemm":
            return self._op("mlp.down")
        if role == "norm":
            self._leave_layer()
            if self._next == "head":
                return "final_norm"
            return self._op("attn.norm")
        return ""

    def _head(self, role: str) -> str:
        if role == "gemm":
            self._next = "end"
            return "head"
        return ""

    def _end(self, role: str) -> str:
        if role == "gemm":
            return "head"
        return "sample" if role in ("sample", "elementwise") else ""
