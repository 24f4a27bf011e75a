"""Which op of a decoder each kernel of a step is, told from the order of kernel names.

A replayed graph carries no shapes and no modules; but a decoder's layers repeat, and the order in
one is fixed: norm, qkv, rope, attention, out, (reduce,) norm, gate-up, activation, down, (reduce).
Products that took the norm in front, the addition or the activation behind along stand for these.
Attention kernels are the anchors. Where their number is not the model's number of layers, or what
lies between them does not repeat or lacks a product, nothing is claimed, and the reason is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import pairwise

import numpy as np

from tpprof.classify.rules import Verdict
from tpprof.classify.work import WorkKind

LEAST_REPEATS = 0.8
"""Share of kernels between two anchors that must be those between the next two, in the median."""
LONGEST_PATTERN = 6
"""Layers may alternate, such as five that slide and one that does not."""
LEAST_COMPLETE = 0.9
"""Share of layers in which all five of _PRODUCTS must be found."""
_PRODUCTS = ("attn.qkv", "attn.core", "attn.out", "mlp.gate_up", "mlp.down")


@dataclass(frozen=True, slots=True)
class Roles:
    """Op ids of one step's kernels."""

    keys: list[str] = field(default_factory=list)
    """Ledger's id per kernel; "" where it is none of them."""
    layers: list[int] = field(default_factory=list)
    """Layer per kernel, also where the id is unknown; -1 outside."""
    period: int = 0
    """Kernels of a layer."""
    num_reduces: int = 0
    """Layers with a collective behind attention."""
    reason: str = ""
    """Why nothing is claimed."""


def assign_roles(names: Sequence[int], verdicts: Sequence[Verdict], num_layers: int) -> Roles:
    """Roles of the kernels of one step, in order of time.

    names: equal numbers for equal names. num_layers: of the model.
    """
    whole = [_token(verdict) for verdict in verdicts]
    tokens = [_plain(token) for token in whole]
    anchors = _anchors(tokens)
    if anchors and "moe" in tokens[anchors[0] :]:
        return Roles(reason="it has expert layers, which have no model here")
    if len(anchors) != num_layers or not anchors:
        return Roles(
            reason=f"{len(anchors)} attention calls were found and the model has {num_layers} "
            "layers; check --model, and whether the step is whole"
        )
    period = _period(np.asarray(names), anchors)
    if period is None:
        return Roles(reason="the kernels between attention calls do not repeat from layer to layer")
    walk = _Walk(num_layers)
    for token in whole[anchors[0] :]:
        walk.step(token)
    before = _before_first(tokens[: anchors[0]], walk.qkv_per_layer())
    keys = [*(key for key, _ in before), *walk.keys]
    layers = [*(layer for _, layer in before), *walk.layers]
    lacking = _incomplete(keys, num_layers)
    if lacking:
        return Roles(reason=lacking)
    num_reduces = len({key for key in keys if key.endswith("attn.reduce")})
    return Roles(keys, layers, period, num_reduces)


def _token(verdict: Verdict) -> str:
    if verdict.kind == WorkKind.COMM:
        return "comm"
    if verdict.kind == WorkKind.FUSED_COMM:
        return "fused"
    return verdict.role or "unknown"


def _plain(token: str) -> str:
    """The product of one with an op inside."""
    return "gemm" if token in ("normed_gemm", "added_gemm", "gated_gemm") else token


def _anchors(tokens: Sequence[str]) -> list[int]:
    """First kernel of each run of attention kernels: a merge or a reduction behind one, with no
    product between, belongs to it."""
    found: list[int] = []
    apart = True
    for place, token in enumerate(tokens):
        if token == "attention":
            if apart:
                found.append(place)
            apart = False
        elif token == "gemm":
            apart = True
    return found


def _period(names: np.ndarray, anchors: Sequence[int]) -> int | None:
    """Kernels from anchor to anchor; None where no distance makes neighbours alike."""
    if len(anchors) < 3:
        return anchors[-1] - anchors[0] or len(names)
    stretches = [names[a:b].tolist() for a, b in pairwise(anchors)]
    for distance in range(1, min(LONGEST_PATTERN, len(stretches) - 1) + 1):
        pairs = zip(stretches, stretches[distance:], strict=False)
        if np.median([_alike(one, two) for one, two in pairs]) >= LEAST_REPEATS:
            return int(np.median([len(one) for one in stretches]))
    return None


def _alike(one: Sequence[int], two: Sequence[int]) -> float:
    """Share of kernels that both have in one order."""
    return 1.0 if one == two else SequenceMatcher(None, one, two, autojunk=False).ratio()


def _incomplete(keys: Sequence[str], num_layers: int) -> str:
    """Which product is missing in too many layers; "" for none."""
    found = set(keys)
    for product in _PRODUCTS:
        have = sum(f"layers.{layer}.{product}" in found for layer in range(num_layers))
        if have < LEAST_COMPLETE * num_layers:
            return f"{product} was recognised in {have} of {num_layers} layers only"
    return ""


def _before_first(tokens: Sequence[str], num_products: int) -> list[tuple[str, int]]:
    """(key, layer) of the kernels ahead of the first attention. Its qkv are the last
    `num_products` matrix products, as in the layers that follow; with 0, where no layer follows,
    those of the last unbroken run."""
    products = [place for place, token in enumerate(tokens) if token == "gemm"]
    if products and not num_products:
        num_products = 1
        while products[-num_products - 1 :][0] == products[-1] - num_products:
            num_products += 1
    first = products[-num_products:][0] if products else len(tokens)
    norm = max((i for i in range(first) if tokens[i] in ("norm", "fused")), default=first)
    found = []
    for place, token in enumerate(tokens):
        if place < norm:
            key = {"embed": "embed", "comm": "embed.reduce"}.get(token, "")
            found.append((key, -1))
        elif place < first:
            key = {"norm": "layers.0.attn.norm", "fused": "embed.reduce"}.get(token, "")
            found.append((key, -1 if token == "fused" else 0))
        else:
            found.append((_of_rope(token, 0), 0))
    return found


def _of_rope(token: str, layer: int) -> str:
    """Between the first product of qkv and attention."""
    if token == "gemm":
        return f"layers.{layer}.attn.qkv"
    belongs = token in ("rope", "kv_write", "norm", "elementwise", "unknown")
    return f"layers.{layer}.attn.rope" if belongs else ""


class _Walk:
    """Goes through the kernels from the first attention on and keeps what comes next."""

    def __init__(self, num_layers: int) -> None:
        self.keys: list[str] = []
        self.layers: list[int] = []
        self._num_layers = num_layers
        self._layer = -1
        self._state = "qkv"

    def qkv_per_layer(self) -> int:
        """Matrix products of qkv in a layer; 0 where only one layer is there."""
        counts = [
            self.keys.count(f"layers.{layer}.attn.qkv") for layer in range(1, self._num_layers)
        ]
        return max(int(np.median(counts)), 1) if counts else 0

    def step(self, whole: str) -> None:
        """Take one kernel."""
        if whole == "normed_gemm" and self._state == "down":
            self._leave()
        if whole == "gated_gemm" and self._state == "out":
            self._state = "mlp"
        self._step(_plain(whole))
        if whole == "gated_gemm" and self._state == "gate_up":
            self._state = "act"
        if whole == "added_gemm" and self._state == "out":
            self._state = "mlp"
        elif whole == "added_gemm" and self._state == "down":
            self._leave()

    def _step(self, token: str) -> None:
        if token == "attention" and self._state != "attn":
            # A layer whose norm went unseen ends here too.
            if self._state not in ("qkv", "rope") or self._layer < 0:
                self._layer += 1
            self._state = "attn"
        layer = self._layer
        inside = self._state not in ("head", "end")
        key = getattr(self, f"_{self._state}")(token)
        if token == "norm" and self._layer != layer:  # the norm that opens the next layer
            layer = self._layer
        self.keys.append(key)
        self.layers.append(layer if inside and layer < self._num_layers else -1)

    def _op(self, name: str) -> str:
        return f"layers.{self._layer}.{name}"

    def _leave(self) -> None:
        self._layer += 1
        self._state = "qkv" if self._layer < self._num_layers else "head"

    def _attn(self, token: str) -> str:
        if token == "gemm":
            self._state = "out"
            return self._op("attn.out")
        if token == "fused":  # the product and the reduce in one
            self._state = "out"
            return self._op("attn.out")
        return self._op("attn.core") if token in ("attention", "elementwise", "kv_write") else ""

    def _out(self, token: str) -> str:
        if token == "gemm":  # the second half of a split product
            return self._op("attn.out")
        if token in ("comm", "fused"):
            self._state = "mlp" if token == "fused" else "out"
            return self._op("attn.reduce")
        if token == "norm":
            self._state = "mlp"
            return self._op("mlp.norm")
        return ""

    def _mlp(self, token: str) -> str:
        if token == "gemm":
            self._state = "gate_up"
        name = {"gemm": "mlp.gate_up", "norm": "mlp.norm", "comm": "attn.reduce"}.get(token)
        return self._op(name) if name else ""

    def _gate_up(self, token: str) -> str:
        if token == "gemm":
            return self._op("mlp.gate_up")
        if token == "activation":
            self._state = "act"
            return self._op("mlp.act")
        if token in ("comm", "fused", "norm") and self._take_down():
            return self._down(token)
        return ""

    def _take_down(self) -> bool:
        """Where the activation is part of a product, the last product was down."""
        key = self._op("mlp.gate_up")
        places = [i for i in range(len(self.keys) - 1, -1, -1) if self.keys[i] == key]
        if len(places) < 2:
            return False
        self.keys[places[0]] = self._op("mlp.down")
        self._state = "down"
        return True

    def _act(self, token: str) -> str:
        if token == "gemm":
            self._state = "down"
            return self._op("mlp.down")
        if token == "fused":
            self._state = "down"
            return self._op("mlp.down")
        return self._op("mlp.act") if token in ("activation", "elementwise") else ""

    def _down(self, token: str) -> str:
        if token == "gemm":
            return self._op("mlp.down")
        if token == "comm":
            return self._op("mlp.reduce")
        if token == "fused":
            key = self._op("mlp.reduce")
            self._leave()
            return key
        if token == "norm":
            self._leave()
            return self._qkv(token) if self._state == "qkv" else "final_norm"
        return ""

    def _qkv(self, token: str) -> str:
        if token == "gemm":
            self._state = "rope"
            return self._op("attn.qkv")
        return self._op("attn.norm") if token == "norm" else ""

    def _rope(self, token: str) -> str:
        return _of_rope(token, self._layer)

    def _head(self, token: str) -> str:
        if token == "gemm":
            self._state = "end"
            return "head"
        return "final_norm" if token == "norm" else ""

    def _end(self, token: str) -> str:
        if token == "gemm":
            return "head"
        if token == "comm":
            return "head.gather"
        return "sample" if token in ("sample", "elementwise") else ""
