"""Rotary settings of a config.json, in transformers 4's keys and 5's, as one `RopeScaling`.

Defaults of absent keys follow transformers 5's `modeling_rope_utils`.
"""

from tpinfer.config.json_keys import JsonKeys
from tpinfer.config.model import RopeScaling

ROPE_KINDS = ("default", "linear", "llama3", "yarn")
DEFAULT_THETA = 10000.0


def parse_rope(keys: JsonKeys, max_position: int) -> tuple[float, RopeScaling]:
    """(theta, scaling) of `keys`.

    transformers 4 writes `rope_theta` beside `rope_scaling`, 5 writes both into `rope_parameters`;
    where both forms are present, `rope_scaling` wins as it does there. Raises ConfigError.
    """
    name = "rope_scaling" if keys.raw("rope_scaling") else "rope_parameters"
    theta = keys.number("rope_theta", DEFAULT_THETA)
    if keys.number("partial_rotary_factor", 1.0) != 1.0:
        raise keys.error("partial_rotary_factor", "only whole heads are rotated; 1.0 is supported")
    rope = keys.nested(name)
    if rope is None:
        return theta, RopeScaling()
    theta = rope.number("rope_theta", theta)
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise rope.error("partial_rotary_factor", "only whole heads are rotated; 1.0 is supported")
    kind_key = "rope_type" if "rope_type" in rope else "type"
    kind = rope.raw(kind_key) or "default"
    if kind not in ROPE_KINDS:
        raise rope.error(kind_key, f"supported kinds are {', '.join(ROPE_KINDS)}")
    if kind == "default":
        return theta, RopeScaling()
    if kind == "linear":
        return theta, RopeScaling("linear", rope.number("factor"))
    holder = keys if "original_max_position_embeddings" in keys else rope
    original = holder.count("original_max_position_embeddings", max_position, null=max_position)
    if kind == "llama3":
        return theta, _llama3(rope, original)
    return theta, _yarn(rope, original, max_position)


def _llama3(rope: JsonKeys, original: int) -> RopeScaling:
    scaling = RopeScaling(
        kind="llama3",
        factor=rope.number("factor"),
        original_max_position=original,
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise rope.error(
            "high_freq_factor", f"it must exceed low_freq_factor {scaling.low_freq_factor}"
        )
    return scaling


def _yarn(rope: JsonKeys, original: int, max_position: int) -> RopeScaling:
    scaling = RopeScaling(
        kind="yarn",
        factor=rope.number("factor", max_position / original),
        original_max_position=original,
        beta_fast=_or_default(rope, "beta_fast", 32.0),
        beta_slow=_or_default(rope, "beta_slow", 1.0),
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.number("mscale", 0.0, positive=False),
        mscale_all_dim=rope.number("mscale_all_dim", 0.0, positive=False),
        truncate=rope.flag("truncate", True),
    )
    if scaling.beta_fast <= scaling.beta_slow:
        raise rope.error("beta_fast", f"it must exceed beta_slow {scaling.beta_slow}")
    return scaling


def _or_default(rope: JsonKeys, key: str, default: float) -> float:
    """A number where 0 stands for the default, as in transformers."""
    return rope.number(key, default, positive=False) or default
