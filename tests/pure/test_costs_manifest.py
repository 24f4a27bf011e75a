"""The cost manifest: a golden for one small model, and numbers that come back from it alone."""

import json
from pathlib import Path
from typing import Any

from hypothesis import given

from tests.pure.cost_cases import Step, ledgers, steps
from tests.pure.golden import check_golden
from tests.pure.models import tiny
from tpinfer.config.dtypes import DType
from tpinfer.costs.ledger import CostLedger
from tpinfer.costs.manifest import cost_manifest
from tpinfer.sharding.partition import partition_model


def lines_of(manifest: dict[str, Any]) -> str:
    """JSON with one op a line."""
    head = {key: value for key, value in manifest.items() if key != "ops"}
    ops = ",\n".join(f"    {json.dumps(op)}" for op in manifest["ops"])
    return json.dumps(head, indent=2).removesuffix("\n}") + f',\n  "ops": [\n{ops}\n  ]\n}}\n'


def test_golden(tmp_path: Path) -> None:
    """Rank 1 of 2 of a one-layer model with every feature on, in bfloat16 over a float32 cache."""
    spec = tiny(
        num_layers=2, num_heads=9, num_kv_heads=3, qkv_bias=True, out_bias=True, mlp_bias=True,
        qk_norm=True, sliding_window=16, sliding_layers=(True, False),
    )  # fmt: skip
    partition = partition_model(spec, 2)
    ledger = CostLedger(spec, partition, 1, DType.BFLOAT16, DType.FLOAT32)
    text = lines_of(cost_manifest(ledger))
    assert json.loads(text) == cost_manifest(ledger)
    check_golden("cost_manifest.json", text, tmp_path)


@given(ledgers(), steps())
def test_a_reader_of_the_file_finds_the_ledgers_numbers(
    group: list[CostLedger], step: Step
) -> None:
    """A profiler has the JSON and the step's aggregates by name, nothing else."""
    for ledger in group:
        sums = step.aggregates(ledger.spec.sliding_window)
        manifest = json.loads(json.dumps(cost_manifest(ledger)))
        terms = dict(zip(manifest["terms"], sums.values(), strict=True))
        assert [op["id"] for op in manifest["ops"]] == list(ledger.op_ids())
        assert (manifest["rank"], manifest["tp"]) == (ledger.rank, ledger.partition.size)
        assert manifest["weight_bytes"] == ledger.weight_bytes
        for op in manifest["ops"]:
            assert op["kind"] == ledger.kind(op["id"]).value
            cost = ledger.cost(op["id"], sums)
            for field in ("flops", "bytes_read", "bytes_written", "bytes_sent"):
                found = sum(factor * terms[name] for name, factor in op[field].items())
                assert round(found) == getattr(cost, field), (op["id"], field)
