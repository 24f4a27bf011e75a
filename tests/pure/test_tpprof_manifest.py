"""Cost manifests: the ledger's numbers come back from the file, and damaged files are named."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tpprof.classify.manifest import Manifest, beside, model_manifest, read_manifest
from tpprof.errors import TraceError

from tests.pure.cost_cases import Step, ledgers, steps
from tests.pure.models import tiny
from tests.traces.cpu_ranks import CPU_CEILINGS
from tpinfer.config.dtypes import DType
from tpinfer.costs.ledger import CostLedger
from tpinfer.costs.manifest import cost_manifest
from tpinfer.costs.ops import StepAggregates
from tpinfer.sharding.partition import partition_model

_SUMS = st.builds(StepAggregates, *[st.integers(0, 1 << 20)] * 8)


def ledger(size: int = 2, rank: int = 1, **changes: object) -> CostLedger:
    spec = tiny(**changes)
    return CostLedger(
        spec, partition_model(spec, size, None, "auto"), rank, DType.BFLOAT16, DType.FLOAT32
    )


def content(of: CostLedger) -> dict[str, Any]:
    """The file a recording brings along, as JSON values."""
    ceilings = msgspec.to_builtins(CPU_CEILINGS, str_keys=True)
    return json.loads(json.dumps({"manifest": cost_manifest(of), "ceilings": ceilings}))


def written(values: object, directory: Path) -> Path:
    path = directory / "rank0.manifest.json"
    path.write_text(json.dumps(values))
    return path


def check_prices(found: Manifest, of: CostLedger, sums: list[StepAggregates]) -> None:
    """Every op of every step costs what the ledger says."""
    flops, moved, sent = found.prices([one.named() for one in sums])
    assert list(found.place) == list(of.op_ids())
    for row, one in enumerate(sums):
        for op, column in found.place.items():
            cost = of.cost(op, one)
            told = (flops[row, column], moved[row, column], sent[row, column])
            # No op of a step that can be has negative costs; sums at random may.
            expected = (cost.flops, cost.bytes_moved, cost.bytes_sent)
            if min(cost.flops, cost.bytes_read, cost.bytes_written, cost.bytes_sent) >= 0:
                assert told == expected, op


def test_who_meets_in_an_op() -> None:
    """Ranks that share a KV head meet among themselves; all ranks need no mention."""
    one = ledger(4, 2, num_heads=8, num_kv_heads=2)
    found = model_manifest(one)
    told = {op: ranks for op, ranks in zip(found.place, found.ranks, strict=True) if ranks}
    assert told == {
        op: (2, 3) for op in one.op_ids() if op.endswith(("attn.gather_q", "attn.merge"))
    }
    assert told


@given(ledgers(), st.lists(steps(), min_size=1, max_size=3))
def test_prices_are_the_ledgers(group: list[CostLedger], some: list[Step]) -> None:
    for one in group:
        sums = [step.aggregates(one.spec.sliding_window) for step in some]
        check_prices(model_manifest(one), one, sums)


@given(st.lists(_SUMS, min_size=1, max_size=4), st.sampled_from([1, 2, 4]))
def test_prices_are_the_ledgers_for_any_sums(sums: list[StepAggregates], size: int) -> None:
    one = ledger(size, size - 1, sliding_window=16, sliding_layers=(True, False))
    check_prices(model_manifest(one), one, sums)


@given(ledgers(), steps())
def test_working_sets_are_the_ledgers(group: list[CostLedger], step: Step) -> None:
    """Weights and context: what chooses the level of memory, live and from a trace."""
    for one in group:
        sums = step.aggregates(one.spec.sliding_window)
        [found] = model_manifest(one).working_sets([sums.named()]).tolist()
        true = one.step_working_set_bytes(sums)
        # A bias that only rank 0 adds is held by all.
        biases = one.spec.num_layers * 2 * one.spec.hidden_size * one.compute_dtype.num_bytes
        assert 0 <= true - found <= (biases if one.rank else 0)


def test_a_file_gives_what_the_ledger_does(tmp_path: Path) -> None:
    one = ledger()
    found = read_manifest(written(content(one), tmp_path))
    check_prices(found, one, [StepAggregates(7, 3, 0, 90, 200, 49, 90, 200)])
    assert (found.tp, found.compute_dtype, found.num_layers) == (2, DType.BFLOAT16, 2)
    assert found.ceilings == CPU_CEILINGS
    assert found.kinds[found.place["layers.1.attn.reduce"]] == "reduce"


def test_ops_that_need_what_a_step_does_not_tell_have_no_price() -> None:
    one = ledger()
    found = model_manifest(one)
    flops, moved, sent = found.prices([{"tokens": 4, "rows": 4}, {"tokens": 4}, {}])
    place = found.place
    dark = {op for op, column in place.items() if flops[0, column] < 0}
    whole = {"layers.0.attn.core", "layers.1.attn.core", "head.gather"}
    of_some = {"sample.local", "sample.mass", "mass.gather", "sample.draw", "draw.gather"}
    assert dark == whole | of_some | {"prompt_logprobs"}
    assert moved[1, place["layers.0.mlp.down"]] > 0 and flops[1, place["head"]] == -1
    depends = [column for op, column in place.items() if op != "sample.search"]  # it costs nothing
    assert (flops[2, depends] == -1).all() and (sent[2, depends] == -1).all()
    assert found.working_sets([{"tokens": 4}, {"sk": 5}]).tolist()[0] == -1
    assert found.working_sets([{"tokens": 4}, {"sk": 5}]).tolist()[1] > 0
    assert found.prices([])[0].shape == (0, len(place))


def test_a_wire_without_limit(tmp_path: Path) -> None:
    values = content(ledger(1, 0))
    values["ceilings"]["collective_bytes_per_s"] = None
    ceilings = read_manifest(written(values, tmp_path)).ceilings
    assert ceilings is not None and np.isinf(ceilings.collective_bytes_per_s)
    values["ceilings"] = None
    assert read_manifest(written(values, tmp_path)).ceilings is None


def test_which_file_lies_beside_a_trace(tmp_path: Path) -> None:
    path = written({}, tmp_path)
    assert beside(str(tmp_path / "rank0.trace.json.gz"), 0) == path
    assert beside(str(tmp_path / "rank0.trace.json.gz"), 1) is None


def _set(values: dict[str, Any], path: str, value: object) -> None:
    *way, last = path.split(".")
    place: Any = values
    for key in way:
        place = place[int(key) if key.isdecimal() else key]
    place[int(last) if last.isdecimal() else last] = value


DAMAGE: Mapping[str, tuple[str, object]] = {
    "newer": ("manifest.format_version", 2),
    "no ops": ("manifest.ops", None),
    "unknown term": ("manifest.ops.0.flops", {"moons": 3}),
    "huge factor": ("manifest.ops.0.flops", {"tokens": 1e300}),
    "text as factor": ("manifest.ops.0.flops", {"tokens": "many"}),
    "ranks beyond tp": ("manifest.ops.1.ranks", [1, 2]),
    "ranks turned round": ("manifest.ops.1.ranks", [1, 0]),
    "op twice": ("manifest.ops.1.id", "embed"),
    "term twice": ("manifest.terms.1", "one"),
    "no ranks": ("manifest.tp", 0),
    "unknown dtype": ("manifest.compute_dtype", "float3"),
    "unknown rate": ("ceilings.flops_per_s", {"float3": 1e9}),
    "no rate": ("ceilings.flops_per_s", {}),
    "rate of zero": ("ceilings.flops_per_s", {"float32": 0.0}),
    "no memory": ("ceilings.memory", []),
    "memory without rate": ("ceilings.memory.0.bytes_per_s", 0.0),
    "negative time": ("ceilings.kernel_floor_s", -1.0),
    "wire that stands": ("ceilings.collective_bytes_per_s", -3.0),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    values = content(ledger())
    _set(values, *DAMAGE[name])
    with pytest.raises(TraceError) as error:
        read_manifest(written(values, tmp_path))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"manifest": 1}', b"[" * 100_000]
)
def test_what_is_no_manifest_is_named(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rank0.manifest.json"
    path.write_bytes(text)
    with pytest.raises(TraceError, match="manifest"):
        read_manifest(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read"):
        read_manifest(tmp_path / "rank0.manifest.json")


_JSON = st.none() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
_PATHS = st.sampled_from(
    ["manifest", "manifest.tp", "manifest.terms.2", "manifest.ops.3.id", "manifest.ops.3.kind",
     "manifest.ops.3.flops", "manifest.compute_dtype", "ceilings", "ceilings.memory.0",
     "ceilings.memory.0.capacity_bytes", "ceilings.memory.0.bytes_per_s", "ceilings.flops_per_s",
     "ceilings.collective_latency_s", "ceilings.origin"]
)  # fmt: skip


@given(_PATHS, _JSON | st.lists(_JSON, max_size=2) | st.dictionaries(st.text(max_size=3), _JSON))
def test_any_value_anywhere_is_read_or_named(path: str, value: object) -> None:
    values = content(ledger())
    _set(values, path, value)
    with tempfile.TemporaryDirectory() as directory:
        try:
            found = read_manifest(written(values, Path(directory)))
        except TraceError:
            return
    flops, moved, sent = found.prices([StepAggregates(7, 3, 0, 90, 200, 49, 90, 200).named()])
    assert min(flops.min(), moved.min(), sent.min()) >= -1
