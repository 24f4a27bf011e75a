"""config.json: both generations of keys, and errors that name file, key, value and remedy."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpinfer.config.dtypes import DType
from tpinfer.config.errors import ConfigError
from tpinfer.config.huggingface import (
    find_model_directory,
    parse_model_spec,
    read_generation_defaults,
    read_model_spec,
)

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 100,
}
QWEN = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 128}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def parse(config: dict[str, Any], **changes: Any):
    return parse_model_spec(config | changes, "dir/config.json")


def test_sizes_and_defaults():
    spec = parse(LLAMA, torch_dtype="bfloat16")
    assert (spec.head_dim, spec.num_kv_heads, spec.dtype) == (64, 3, DType.BFLOAT16)
    assert (spec.qkv_bias, spec.mlp_bias, spec.tie_embeddings, spec.qk_norm) == (False,) * 4
    assert parse(LLAMA, dtype="float16").dtype is DType.FLOAT16
    assert parse(LLAMA).dtype is DType.FLOAT32


def test_kv_heads_absent_and_null():
    absent = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    assert parse(absent).num_kv_heads == 9
    assert parse(LLAMA, num_key_value_heads=None).num_kv_heads == 9
    wide = absent | {"num_attention_heads": 64, "hidden_size": 640}
    assert parse(wide, architectures=["MistralForCausalLM"]).num_kv_heads == 8


def test_traits_of_each_family():
    qwen2 = parse(LLAMA, architectures=["Qwen2ForCausalLM"], attention_bias=False)
    assert (qwen2.qkv_bias, qwen2.out_bias) == (True, False)
    assert parse(QWEN).qk_norm
    assert parse(LLAMA, attention_bias=True).out_bias
    assert not parse(LLAMA, architectures=["MistralForCausalLM"], attention_bias=True).qkv_bias
    by_type = {k: v for k, v in LLAMA.items() if k != "architectures"} | {"model_type": "mistral"}
    assert parse(by_type).architecture == "MistralForCausalLM"


def test_rope_in_both_generations_of_keys():
    older = parse(
        LLAMA,
        rope_theta=5e5,
        rope_scaling={**LLAMA3, "rope_type": "llama3", "original_max_position_embeddings": 8192},
    )
    newer = parse(
        LLAMA,
        rope_parameters={
            **LLAMA3,
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "original_max_position_embeddings": 8192,
        },
    )
    assert older == newer
    assert older.rope_scaling.original_max_position == 8192
    assert parse(LLAMA, rope_theta=1e6).rope_theta == 1e6


def test_yarn_defaults():
    spec = parse(LLAMA, max_position_embeddings=4096, rope_scaling={"type": "yarn", "factor": 4.0})
    rope = spec.rope_scaling
    assert (rope.original_max_position, rope.beta_fast, rope.beta_slow) == (4096, 32.0, 1.0)
    assert rope.attention_factor is None and rope.truncate


def test_sliding_windows():
    mistral = LLAMA | {"architectures": ["MistralForCausalLM"]}
    assert parse(mistral, sliding_window=7).window(0) == 7
    assert parse(mistral, sliding_window=None).sliding_layers == ()
    assert parse(QWEN, sliding_window=7, max_window_layers=1).sliding_layers == ()
    some = parse(QWEN, use_sliding_window=True, sliding_window=7, max_window_layers=1)
    assert [some.window(i) for i in range(3)] == [None, 7, 7]
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    listed = parse(QWEN, use_sliding_window=True, sliding_window=7, layer_types=kinds)
    assert [listed.window(i) for i in range(3)] == [7, None, None]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures"),
        ({"architectures": None, "model_type": "gemma"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 2}, "num_key_value_heads"),
        ({"hidden_size": 577}, "hidden_size"),
        ({"hidden_size": 27}, "head_dim"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"dtype": "int8"}, "dtype"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_scaling.low_freq_factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -1}}, "rope_parameters.factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types"),
        ({"eos_token_id": [1, -1]}, "eos_token_id"),
        ({"eos_token_id": [1, 10**6]}, "eos_token_id"),
    ],
)
def test_what_cannot_work_is_named(changes, key):
    with pytest.raises(ConfigError) as caught:
        parse(LLAMA, **changes)
    message = str(caught.value)
    assert message.startswith("dir/config.json: ") and f"{key} is" in message and ";" in message


def test_an_unsupported_architecture_lists_the_supported_ones():
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel.*LlamaForCausalLM.*Qwen3ForCausalLM"):
        parse(LLAMA, architectures=["GPT2LMHeadModel"])


def test_generation_config_decides_special_tokens(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": 5}))
    assert read_model_spec(tmp_path).eos_token_ids == (5,)
    assert read_generation_defaults(tmp_path).do_sample is False
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6], "do_sample": true}')
    assert read_model_spec(tmp_path).eos_token_ids == (5, 6)
    assert read_generation_defaults(tmp_path).do_sample is True


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"eos_token_id": 1000000}', "eos_token_id is 1000000"),
        ('{"do_sample": true, "temperature": -1}', "temperature=-1.0"),
        ('{"do_sample": true, "top_p": 1.5}', "top_p=1.5"),
    ],
)
def test_generation_config_is_named_where_it_cannot_work(tmp_path: Path, text: str, words: str):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_model_spec(tmp_path)
        read_generation_defaults(tmp_path)
    assert f"generation_config.json: {words}" in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="is no file"):
        read_model_spec(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_file_is_named(tmp_path: Path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_model_spec(tmp_path)


def test_models_are_found_by_path_and_in_the_cache(tmp_path: Path):
    assert find_model_directory(str(tmp_path)) == tmp_path
    repository = tmp_path / "models--me--tiny"
    for name in ("aaa", "bbb"):
        (repository / "snapshots" / name).mkdir(parents=True)
        (repository / "snapshots" / name / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("aaa\n")
    assert find_model_directory("me/tiny", tmp_path).name == "aaa"
    with pytest.raises(ConfigError, match="me/other"):
        find_model_directory("me/other", tmp_path)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
JSON_VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=4,
)
KEYS = (
    *("architectures", "model_type", "num_hidden_layers", "hidden_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "dtype"),
    *("rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "layer_types"),
    *("use_sliding_window", "sliding_window", "max_window_layers", "attention_bias", "hidden_act"),
    *("tie_word_embeddings", "eos_token_id", "bos_token_id", "quantization_config"),
)
ROPE_KEYS = ("rope_type", "type", "factor", "low_freq_factor", "original_max_position_embeddings")


@settings(max_examples=400)
@given(key=st.sampled_from(KEYS), rope_key=st.sampled_from(ROPE_KEYS), value=JSON_VALUES)
def test_any_damaged_value_is_taken_or_named(key: str, rope_key: str, value: Any):
    rope = LLAMA3 | {"rope_type": "llama3", rope_key: value}
    for changes in ({key: value}, {key: [value]}, {"rope_scaling": rope}):
        try:
            parse(QWEN, **changes)
        except ConfigError as error:
            assert str(error).startswith("dir/config.json: ")


def test_a_damaged_layer_count_does_not_fill_the_memory():
    with pytest.raises(ConfigError, match=f"num_hidden_layers is {2**70}; at most 10000 layers"):
        parse(LLAMA, num_hidden_layers=2**70)
