"""Names in the program and names in a Hugging Face checkpoint."""

from collections.abc import Container

_WHOLE = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
}
_IN_LAYER = {
    "attn.norm": "input_layernorm",
    "attn.qkv": "self_attn.{segment}_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.out": "self_attn.o_proj",
    "mlp.norm": "post_attention_layernorm",
    "mlp.gate_up": "mlp.{segment}_proj",
    "mlp.down": "mlp.down_proj",
}


def checkpoint_name(parameter: str, segment: str) -> str:
    """Checkpoint tensor behind `segment` of a program parameter.

    `layers.3.attn.qkv.weight`, `q` -> `model.layers.3.self_attn.q_proj.weight`. Raises KeyError
    for a name the program does not have.
    """
    stem, _, kind = parameter.rpartition(".")
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.{kind}"
    _, layer, place = stem.split(".", 2)
    return f"model.layers.{layer}.{_IN_LAYER[place].format(segment=segment)}.{kind}"


def find_name(wanted: str, present: Container[str]) -> str | None:
    """`wanted` as the checkpoint spells it: some leave out the leading `model.`."""
    for name in (wanted, wanted.removeprefix("model.")):
        if name in present:
            return name
    return None
