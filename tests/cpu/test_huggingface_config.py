"""`parse_model_spec` reads what transformers writes, and means by it what transformers does."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tpinfer.config.huggingface import parse_model_spec, read_model_spec

FAMILIES = {
    "LlamaForCausalLM": LlamaConfig,
    "MistralForCausalLM": MistralConfig,
    "Qwen2ForCausalLM": Qwen2Config,
    "Qwen3ForCausalLM": Qwen3Config,
}
ROPES = [
    None,
    {"rope_type": "default", "rope_theta": 500000.0},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
        "rope_theta": 5e5,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6},
]


@st.composite
def settings_of_a_family(draw):
    architecture = draw(st.sampled_from(sorted(FAMILIES)))
    num_kv_heads = draw(st.integers(1, 4))
    num_heads = num_kv_heads * draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 32))
    chosen = {
        "num_hidden_layers": draw(st.integers(1, 5)),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "hidden_size": num_heads * head_dim,
        "intermediate_size": draw(st.integers(1, 500)),
        "vocab_size": draw(st.integers(8, 1000)),
        "tie_word_embeddings": draw(st.booleans()),
        "dtype": draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        "max_position_embeddings": draw(st.sampled_from([256, 4096])),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "rope_parameters": deepcopy(draw(st.sampled_from(ROPES))),
        "eos_token_id": draw(st.sampled_from([None, 3, [3, 5]])),
    }
    if architecture != "MistralForCausalLM" and draw(st.booleans()):
        chosen["num_key_value_heads"] = None
    if architecture != "LlamaForCausalLM":
        chosen["sliding_window"] = draw(st.sampled_from([None, 64]))
    if architecture.startswith("Qwen"):
        chosen["use_sliding_window"] = draw(st.booleans())
        chosen["max_window_layers"] = draw(st.integers(0, 4))
    else:
        chosen["head_dim"] = draw(st.sampled_from([None, 16]))
    if architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM"):
        chosen["attention_bias"] = draw(st.booleans())
    return architecture, chosen


def check(spec, config: PreTrainedConfig) -> None:
    head_dim = getattr(config, "head_dim", None)
    assert spec.head_dim == (head_dim or config.hidden_size // config.num_attention_heads)
    for ours, theirs in {
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "vocab_size": "vocab_size",
        "max_position": "max_position_embeddings",
        "rms_norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
        "bos_token_id": "bos_token_id",
    }.items():
        assert getattr(spec, ours) == getattr(config, theirs), ours
    rope = config.rope_parameters
    assert spec.rope_theta == rope["rope_theta"]
    assert spec.rope_scaling.kind == rope["rope_type"]
    assert spec.rope_scaling.factor == rope.get("factor", 1.0)
    assert spec.rope_scaling.original_max_position == rope.get(
        "original_max_position_embeddings", 0
    )
    eos = config.eos_token_id
    assert list(spec.eos_token_ids) == (
        [] if eos is None else eos if isinstance(eos, list) else [eos]
    )
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    for layer in range(spec.num_layers):
        slides = kinds is None or kinds[layer] == "sliding_attention"
        assert spec.window(layer) == (window if slides else None)


@settings(max_examples=120, deadline=None)
@given(settings_of_a_family())
def test_both_key_generations_agree_with_transformers(drawn):
    architecture, chosen = drawn
    config = FAMILIES[architecture](architectures=[architecture], **chosen)
    written = json.loads(json.dumps(config.to_dict()))
    spec = parse_model_spec(written, "config.json")
    check(spec, config)
    assert spec.dtype == chosen["dtype"]
    assert parse_model_spec(as_version_4(written), "config.json") == spec


def as_version_4(written: dict) -> dict:
    """The same settings in transformers 4's keys."""
    older = dict(written)
    older["torch_dtype"] = older.pop("dtype")
    rope = dict(older.pop("rope_parameters"))
    older["rope_theta"] = rope.pop("rope_theta")
    older["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    older.pop("layer_types", None)
    return older


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_absent_keys_mean_what_they_mean_to_transformers(architecture):
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 64,
        "num_attention_heads": 32,
        "num_hidden_layers": 30,
        "vocab_size": 99,
    }
    spec = parse_model_spec({"architectures": [architecture], **sizes}, "config.json")
    check(spec, FAMILIES[architecture](**sizes))


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_biases_and_norms_are_those_of_the_built_model(architecture):
    import torch
    from transformers import AutoModelForCausalLM

    config = FAMILIES[architecture](
        architectures=[architecture],
        hidden_size=32,
        intermediate_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=1,
        vocab_size=16,
        attention_bias=True,
        mlp_bias=True,
    )
    spec = parse_model_spec(config.to_dict(), "config.json")
    with torch.device("meta"):
        names = AutoModelForCausalLM.from_config(config).state_dict()
    layer = "model.layers.0."
    assert spec.qkv_bias == (layer + "self_attn.q_proj.bias" in names)
    assert spec.out_bias == (layer + "self_attn.o_proj.bias" in names)
    assert spec.mlp_bias == (layer + "mlp.up_proj.bias" in names)
    assert spec.qk_norm == (layer + "self_attn.q_norm.weight" in names)


def test_save_pretrained_reads_back(tmp_path: Path):
    LlamaConfig(architectures=["LlamaForCausalLM"], num_hidden_layers=3).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9], "bos_token_id": 4}')
    spec = read_model_spec(tmp_path)
    assert (spec.num_layers, spec.eos_token_ids, spec.bos_token_id) == (3, (7, 9), 4)


def test_supported_rope_kinds_exist_in_transformers():
    assert {"linear", "llama3", "yarn"} <= set(ROPE_INIT_FUNCTIONS)
