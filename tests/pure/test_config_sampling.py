"""Sampling parameters and engine settings refuse what cannot work, and say what can."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tpinfer.config.dtypes import DType
from tpinfer.config.engine import EngineConfig
from tpinfer.config.errors import ConfigError, TpinferError
from tpinfer.config.generation import parse_generation_defaults
from tpinfer.config.sampling import SamplingParams
from tpinfer.steps.plan import SamplingRecord, SequenceRecord, decode, encode
from tpinfer.steps.sampling_record import (
    candidates_of_step,
    edits_logits,
    has_penalties,
    is_plain_greedy,
    num_candidates,
    sampling_record,
    sums_masses,
)


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
        ("temperature", 10**400),
        ("temperature", float("inf")),
        ("temperature", True),
        ("top_p", float("nan")),
        ("min_p", None),
        ("seed", 1.0),
        ("ignore_eos", 1),
        ("echo", "yes"),
        ("skip_special_tokens", None),
        ("include_stop_in_output", 0),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("repetition_penalty", "1"),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("presence_penalty", -3),
        ("min_tokens", -1),
        ("min_tokens", 129),
        ("min_tokens", True),
        ("n", 0),
        ("n", 129),
        ("logprobs", -1),
        ("logprobs", 65),
        ("logprobs", True),
        ("prompt_logprobs", 65),
        ("prompt_logprobs", 2.0),
        ("stop_token_ids", 5),
        ("stop_token_ids", None),
        ("stop_token_ids", ("a",)),
        ("stop_token_ids", (True,)),
        ("stop_token_ids", tuple(range((1 << 16) + 1))),
        ("banned_token_ids", (1 << 31,)),
        ("allowed_token_ids", ()),
        ("allowed_token_ids", (1.0,)),
        ("allowed_token_ids", "12"),
        ("logit_bias", ((1, 101),)),
        ("logit_bias", ((1, float("nan")),)),
        ("logit_bias", ((1, True),)),
        ("logit_bias", ((1, "x"),)),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", (1, 2)),
        ("logit_bias", ((1, 2.0, 3),)),
        ("logit_bias", ((1, 1.0), (1, 2.0))),
        ("logit_bias", tuple((i, 1.0) for i in range(1025))),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {(): 1.0}),
        ("stop", ("",)),
        ("stop", ("x" * 1025,)),
        ("stop", ("x",) * 65),
        ("stop", (b"x",)),
        ("stop", 5),
    ],
)
def test_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name):
        SamplingParams(**{name: value})


def test_numbers_too_long_to_print_are_refused_in_few_words() -> None:
    with pytest.raises(ConfigError, match="top_k=a huge number is out of range"):
        SamplingParams(top_k=10**5000)


def test_lists_mappings_and_single_texts_are_taken() -> None:
    given: dict[str, Any] = {
        "stop": "end",
        "stop_token_ids": [3],
        "logit_bias": {7: 1, 5: -2.5},
        "allowed_token_ids": [1, 2],
    }
    params = SamplingParams(**given)
    assert (params.stop, params.stop_token_ids, params.allowed_token_ids) == (
        ("end",),
        (3,),
        (1, 2),
    )
    assert params.logit_bias == ((7, 1), (5, -2.5))
    assert hash(params) == hash(replace(params))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"banned_token_ids": (9, 10)}, "banned_token_ids names token 10"),
        ({"allowed_token_ids": (10,)}, "allowed_token_ids names token 10"),
        ({"stop_token_ids": (11,)}, "stop_token_ids names token 11"),
        ({"logit_bias": ((12, 1.0),)}, "logit_bias names token 12"),
        ({"banned_token_ids": tuple(range(10))}, "cover all 10 tokens"),
        (
            {"banned_token_ids": tuple(range(9)), "stop_token_ids": (9,), "min_tokens": 1},
            "cover all 10 tokens",
        ),
        ({"logprobs": 11}, "logprobs=11, but the model has 10 tokens"),
    ],
)
def test_tokens_must_be_the_models(values: dict, words: str) -> None:
    params = SamplingParams(**values)
    with pytest.raises(ConfigError, match=words):
        params.check_vocab(10)
    params.check_vocab(13 if "banned_token_ids" not in values else 11)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"banned_token_ids": (1, 2)}, "leaves no token"),
        ({"stop_token_ids": (1, 2), "min_tokens": 1}, "leaves stop tokens only"),
    ],
)
def test_some_token_must_remain(values: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SamplingParams(allowed_token_ids=(1, 2), **values)
    assert SamplingParams(allowed_token_ids=(1, 2), stop_token_ids=(1, 2)).min_tokens == 0


def test_the_ranks_get_what_they_act_upon() -> None:
    plain = sampling_record(SamplingParams(temperature=0), 2, 77)
    assert plain == SamplingRecord(0.0, seed=77, index=2) and is_plain_greedy(plain)
    params = SamplingParams(
        seed=5, stop_token_ids=(9, 2, 9), min_tokens=3, logit_bias=((4, 1), (2, 0)), logprobs=0,
        banned_token_ids=(7, 6), allowed_token_ids=(8, 1), prompt_logprobs=2, presence_penalty=1,
    )  # fmt: skip
    record = sampling_record(params, 0, 77)
    assert (record.seed, record.stop_token_ids, record.min_tokens) == (5, (2, 9), 3)
    assert record.logit_bias == ((4, 1.0),) and record.banned_token_ids == (6, 7)
    assert (record.num_logprobs, record.num_prompt_logprobs) == (0, 2)
    assert edits_logits(record) and has_penalties(record) and sums_masses(record)
    ignoring = sampling_record(replace(params, ignore_eos=True), 0, 77)
    assert (ignoring.stop_token_ids, ignoring.min_tokens) == ((), 0)
    sent = SequenceRecord(0, (1,), 1, 0, record)
    assert decode(encode(sent)) == sent


@pytest.mark.parametrize(
    ("changes", "count", "by_mass"),
    [
        ({"temperature": 0.0, "top_k": 50}, 1, False),
        ({}, 1, True),
        ({"top_k": 50}, 64, False),
        ({"top_k": 1024, "top_p": 0.5}, 1024, False),
        ({"top_k": 1025}, 1, True),
        ({"top_p": 0.5}, 256, True),
    ],
)
def test_a_row_sends_as_many_candidates_as_it_needs(changes: dict, count: int, by_mass) -> None:
    record = SamplingRecord(**changes)
    assert (num_candidates(record), sums_masses(record)) == (count, by_mass)
    reporting = SamplingRecord(**changes, num_logprobs=5)
    assert candidates_of_step([record, reporting]) == 2 * (count - 1) + 5


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
