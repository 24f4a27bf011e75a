"""A step's sums for the ledger's formulas, as far as an annotation tells them."""

from tpinfer.config.model import ModelSpec
from tpprof.classify.steps import Step

_WHERE_ASKED_FOR = (
    "full_rows", "candidates", "logprob_rows", "prompt_rows", "prompt_passes", "prompt_candidates",
)  # fmt: skip
"""Sums of what only some requests want."""


def completed(step: Step, spec: ModelSpec) -> dict[str, int]:
    """The sums with what follows from them; a sum that cannot be told is left out, so that no op
    that depends on it gets a price.

    Rows of a decode step have one token each unless it says otherwise, and where each has one the
    squares are known. Sampling is taken as greedy.
    """
    found = dict(step.sums)
    if "rows" in found:
        for name in _WHERE_ASKED_FOR:
            found.setdefault(name, 0)
        if step.phase == "decode":
            found.setdefault("tokens", found["rows"])
        if found.get("tokens") == found["rows"]:
            found.setdefault("sqsq", found["rows"])
    window, context = spec.sliding_window, found.get("sk")
    if window is not None and context is not None and context <= window and "sqsk" in found:
        # Then no sequence is longer than the window: a sliding layer sees all of each.
        if {"sqsq", "tokens"} <= set(found):
            pairs = found["sqsk"] - (found["sqsq"] - found["tokens"]) // 2
            found.setdefault("pairs_window", pairs)
        found.setdefault("sk_window", context)
    return found
