"""Run reports from made-up recordings and splits, for the tests of what people read."""

from collections.abc import Mapping
from dataclasses import replace

from tests.pure.recorded_runs import CEILINGS
from tpinfer.config.ceilings import Ceilings, MemoryLevel
from tpinfer.config.dtypes import DType
from tpinfer.costs.kv_capacity import MemoryPlan
from tpinfer.engine.attribution import Attribution, RankSplit
from tpinfer.engine.run_report import RunReport

MEMORY = MemoryPlan(
    weight_bytes=5_500_000,
    activation_bytes=18_800_000,
    kv_bytes=101_000_000,
    kv_bytes_per_token=3072,
    replicated_kv_bytes_per_token=0,
    num_blocks=2048,
    block_size=16,
)


def attribution(*ranks: Mapping[str, int], caused: tuple[int, ...] = (), **more: str):
    """One leaf split per rank; `warning` adds one."""
    caused = caused or (0,) * len(ranks)
    splits = [
        RankSplit(rank, sum(leaves.values()), dict(leaves), {}, caused[rank])
        for rank, leaves in enumerate(ranks)
    ]
    warnings = (more["warning"],) if "warning" in more else ()
    return Attribution(tuple(splits), CEILINGS.origin, warnings)


def report(
    ttft: Attribution | None,
    decode: Attribution | None = None,
    num_decode_tokens: int = 0,
    *,
    ceilings: Ceilings = CEILINGS,
    working_set_bytes: int = 40_000,
    dtype: DType = DType.FLOAT32,
    memory: tuple[MemoryPlan, ...] = (MEMORY,),
    num_requests: int = 1,
) -> RunReport:
    """A run's report with these splits."""
    return RunReport(
        num_requests=num_requests,
        ttft=ttft,
        decode=decode,
        num_decode_tokens=num_decode_tokens,
        ceilings=ceilings,
        level=ceilings.memory_level(working_set_bytes),
        working_set_bytes=working_set_bytes,
        dtype=dtype,
        memory=memory,
        floors=(),
        choices=(),
    )


def with_levels(*levels: MemoryLevel) -> Ceilings:
    """CEILINGS with another memory."""
    return replace(CEILINGS, memory=levels)
