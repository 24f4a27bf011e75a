"""The ledger as a file: formulas per op in program order, for a profiler that sees only a trace
and step aggregates."""

from tpinfer.costs.ledger import CostLedger
from tpinfer.costs.ops import TERMS

FORMAT_VERSION = 1


def cost_manifest(ledger: CostLedger) -> dict[str, object]:
    """JSON values: the terms, and per op its id, kind and four formulas as {term: factor}; of a
    collective also the ranks that meet in it, as [first, last], where those are not all."""
    ops = []
    for op_id in ledger.op_ids():
        priced = ledger.op_formula(op_id)
        op = {
            "id": op_id,
            "kind": ledger.kind(op_id).value,
            "flops": priced.flops.to_json(),
            "bytes_read": priced.bytes_read.to_json(),
            "bytes_written": priced.bytes_written.to_json(),
            "bytes_sent": priced.bytes_sent.to_json(),
        }
        met = ledger.ranks_met(op_id)
        if 0 < len(met) < ledger.partition.size:
            op["ranks"] = [met[0], met[-1]]
        ops.append(op)
    return {
        "format_version": FORMAT_VERSION,
        "rank": ledger.rank,
        "tp": ledger.partition.size,
        "compute_dtype": ledger.compute_dtype.value,
        "kv_dtype": ledger.kv_dtype.value,
        "terms": list(TERMS),
        "weight_bytes": ledger.weight_bytes,
        "kv_bytes_per_token": ledger.kv_bytes_per_token,
        "ops": ops,
    }
