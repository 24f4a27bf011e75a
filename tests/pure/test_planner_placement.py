"""What fits where, and what it leaves for the cache."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pure.planner_cases import SETTINGS, four_hosts, machine, shape, two_layers
from tpinfer.config.dtypes import DType
from tpinfer.config.errors import ConfigError, TopologyError
from tpinfer.config.topology import Placement
from tpinfer.costs.kv_capacity import MemoryRequest, plan_memory
from tpinfer.costs.ledger import CostLedger
from tpinfer.embedded.locate import shape_names
from tpinfer.planner.fit import RESERVED_BYTES, Fit, Fitter
from tpinfer.planner.placement import EngineSettings, num_devices, place, sizes_to_try
from tpinfer.planner.precision import precision_named
from tpinfer.planner.workload import Workload
from tpinfer.sharding.parameters import decoder_parameters
from tpinfer.sharding.partition import partition_model

WORK = Workload(128, 32, 16)
NUM_PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mistral-7b": 7_248_023_552,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}
"""As the models' own checkpoints have."""


def fit(model: str, sizes: tuple[int, int, int], precision: str = "bf16", **changes: int) -> Fit:
    fitter = Fitter(shape(model), machine(), precision_named(precision))
    return fitter.fit(sizes, replace(SETTINGS, **changes), WORK)


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_presets_have_the_parameters_of_their_checkpoints(name: str) -> None:
    spec = shape(name)
    found = decoder_parameters(spec, partition_model(spec, 1), DType.BFLOAT16)
    assert sum(one.shard.num_local_elements(0) for one in found) == NUM_PARAMETERS[name]


def test_every_shape_is_a_preset_that_is_counted() -> None:
    assert set(shape_names()) == {*NUM_PARAMETERS, "qwen3-0.6b-slice"}


def test_a_rank_holds_what_the_loader_would_load() -> None:
    for tp in (1, 2, 8):
        spec = shape("llama-3.1-8b")
        found = fit("llama-3.1-8b", (tp, 1, 1))
        parameters = decoder_parameters(spec, partition_model(spec, tp), DType.BFLOAT16)
        expected = max(sum(p.local_bytes(rank) for p in parameters) for rank in range(tp))
        assert found.weight_bytes == expected


def test_the_cache_is_the_one_that_the_runtime_would_make() -> None:
    spec = shape("llama-3.1-8b")
    for tp in (1, 4):
        found = fit("llama-3.1-8b", (tp, 1, 1))
        ledger = CostLedger(
            spec, partition_model(spec, tp, None, "auto"), 0, DType.BFLOAT16, DType.BFLOAT16
        )
        free = 80_000_000_000 - round(RESERVED_BYTES) - found.weight_bytes
        request = MemoryRequest(int(free * 0.9), None, 16, 64, 2048, spec.max_position)
        assert found.kv_capacity_tokens == plan_memory(ledger, request).capacity_tokens


@pytest.mark.parametrize(
    ("model", "sizes", "binding", "words"),
    [
        ("llama-3.1-70b", (1, 1, 1), "weights", "141 GB a rank do not fit its 80 GB; use 2 ranks"),
        ("llama-3.1-405b", (8, 1, 1), "weights", "101 GB"),
        ("llama-3.1-8b", (16, 1, 1), "devices", "16 ranks, and dgx-h100.yaml has 8"),
        ("llama-3.1-8b", (64, 1, 1), "heads", "use --tp between 1 and 32"),
        ("llama-3.1-8b", (1, 33, 1), "layers", "more than the 32 layers"),
    ],
)
def test_what_does_not_fit_says_why(
    model: str, sizes: tuple[int, int, int], binding: str, words: str
) -> None:
    found = fit(model, sizes)
    assert not found.fits and found.binding == binding
    assert words in found.reason
    assert found.kv_capacity_tokens == 0


def test_no_link_is_a_reason() -> None:
    hosts = replace(four_hosts(), fabric=())
    found = Fitter(shape("llama-3.1-8b"), hosts, precision_named("bf16"))
    assert found.fit((8, 1, 1), SETTINGS, WORK).fits
    apart = found.fit((16, 1, 1), SETTINGS, WORK)
    assert apart.binding == "links" and "nothing joins" in apart.reason


def test_a_request_too_long_for_what_is_left_of_the_cache() -> None:
    fitter = Fitter(shape("llama-3.1-70b"), machine(), precision_named("fp8"))
    found = fitter.fit((1, 1, 1), EngineSettings(256, 8192), Workload(100_000, 1000, 1))
    assert found.binding == "kv_capacity"
    assert "a request of 101000 tokens needs 6313 KV blocks" in found.reason


def test_weights_shrink_with_their_format() -> None:
    sizes = [fit("llama-3.1-8b", (1, 1, 1), name).weight_bytes for name in ("bf16", "fp8", "int4")]
    assert sizes == sorted(sizes, reverse=True)
    # Embedding and head stay as they are: 2 * 128256 * 4096 values of two bytes.
    whole = 2 * 2 * 128_256 * 4096
    assert abs((sizes[1] - whole) * 2 - (sizes[0] - whole)) < 0.001 * sizes[0]


@settings(max_examples=60, deadline=None)
@given(
    model=st.sampled_from(["llama-3.1-8b", "qwen3-4b", "mistral-7b", "llama-2-7b"]),
    precision=st.sampled_from(["bf16", "fp8", "int8", "int4"]),
    tp=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2]),
    dp=st.sampled_from([1, 2]),
    axis=st.sampled_from(["tp", "pp", "dp"]),
)
def test_more_ranks_never_hold_fewer_tokens(
    model: str, precision: str, tp: int, pp: int, dp: int, axis: str
) -> None:
    fitter = Fitter(two_layers(model), four_hosts(), precision_named(precision))
    sizes = {"tp": tp, "pp": pp, "dp": dp}
    found = []
    for factor in (1, 2):
        grown = {**sizes, axis: sizes[axis] * factor}
        if grown["pp"] > 2:
            return
        found.append(fitter.fit((grown["tp"], grown["pp"], grown["dp"]), SETTINGS, WORK))
    assert found[0].fits and found[1].fits
    assert found[1].kv_capacity_tokens >= found[0].kv_capacity_tokens
    assert found[1].weight_bytes <= found[0].weight_bytes


def test_groups_stay_within_hosts_and_use_each_device_once() -> None:
    topology = four_hosts()
    for tp, pp, dp in sizes_to_try(topology, shape("llama-3.1-8b")):
        assert tp * pp * dp <= num_devices(topology)
        try:
            found = place(topology, tp, pp, dp)
        except TopologyError:
            assert tp > 8 or 8 % tp
            continue
        places = [at for group in found.groups for at in group]
        assert len(set(places)) == len(places)
        if tp <= 8:
            assert all(len({host for host, _ in group}) == 1 for group in found.groups)


def test_a_files_own_placement_is_kept() -> None:
    topology = replace(machine(), placement=Placement(4, groups=((("h0", "1"),) * 4,)))
    assert place(topology, 4, 1, 1) is topology.placement


def test_ranks_of_a_cpu_share_its_memory() -> None:
    fitter = Fitter(shape("qwen3-0.6b"), machine("cpu-laptop"), precision_named("bf16"))
    one, two = (fitter.fit((tp, 1, 1), SETTINGS, WORK) for tp in (1, 2))
    assert one.fits and two.fits
    assert two.weight_bytes < one.weight_bytes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_num_seqs": 0}, "--max-num-seqs 0 must be 1 or more"),
        ({"max_num_batched_tokens": -1}, "--max-num-batched-tokens -1"),
        ({"memory_utilization": 1.5}, "--memory-utilization 1.5 must be above 0 and at most 1"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(SETTINGS, **changes)
