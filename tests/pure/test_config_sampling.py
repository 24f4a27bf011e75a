"""Sampling parameters and engine settings refuse what cannot work, and say what can."""

from pathlib import Path

import pytest

from tpinfer.config.dtypes import DType
from tpinfer.config.engine import EngineConfig
from tpinfer.config.errors import ConfigError, TpinferError
from tpinfer.config.generation import parse_generation_defaults
from tpinfer.config.sampling import SamplingParams


def test_defaults_sample_everything():
    params = SamplingParams()
    assert not params.greedy
    assert SamplingParams(temperature=0).greedy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 2),
        ("seed", -1),
        ("seed", 1 << 63),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("stop_token_ids", (-1,)),
    ],
)
def test_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tp", 0),
        ("tp", 1.0),
        ("load_format", "pickle"),
        ("collective", "smoke"),
        ("device", "tpu"),
        ("dtype", DType.INT8),
        ("memory_utilization", 0),
        ("memory_utilization", 1.1),
        ("kv_bytes", 0),
        ("block_size", -16),
        ("wait_timeout_s", 0),
        ("num_layers_override", 2),
    ],
)
def test_engine_settings_are_checked(name, value):
    with pytest.raises(ConfigError, match=name):
        EngineConfig(Path("model"), **{name: value})


def test_a_slice_of_layers_needs_random_weights():
    assert EngineConfig(Path("m"), load_format="random", num_layers_override=2).tp == 1


def test_every_error_has_the_same_root():
    assert issubclass(ConfigError, TpinferError)
    assert issubclass(ConfigError, ValueError)


def test_a_checkpoint_that_samples_gives_its_defaults():
    text = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1]}
    defaults = parse_generation_defaults(text, "generation_config.json")
    params = defaults.sampling_params((1, 2), top_k=5, temperature=None)
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 5, 0.95)
    assert params.stop_token_ids == (1, 2)
    assert defaults.eos_token_ids == (1,)


def test_a_checkpoint_that_does_not_sample_is_greedy():
    defaults = parse_generation_defaults({"temperature": 0.6, "max_new_tokens": 9}, "g.json")
    assert defaults.sampling_params(()).greedy
    assert defaults.sampling_params(()).max_tokens == 9
    assert defaults.sampling_params((), temperature=0.5).temperature == 0.5


@pytest.mark.parametrize("bad", [{"top_k": -1}, {"top_p": 0}, {"eos_token_id": "x"}])
def test_generation_config_errors_name_file_and_key(bad):
    with pytest.raises(ConfigError, match=rf"g\.json: {next(iter(bad))} is"):
        parse_generation_defaults(bad, "g.json")
