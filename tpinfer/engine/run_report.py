"""What a finished run has to tell: the numbers behind the attribution table."""

from dataclasses import dataclass

from tpinfer.config.ceilings import Ceilings, MemoryLevel
from tpinfer.config.dtypes import DType
from tpinfer.costs.kv_capacity import MemoryPlan
from tpinfer.engine.attribution import Attribution, FloorRow


@dataclass(frozen=True, slots=True)
class RunReport:
    """What the attribution table of a run shows."""

    num_requests: int
    ttft: Attribution | None
    """Accepted to first token, summed over requests; None when nobody got a token."""
    decode: Attribution | None
    """First token to last, summed over requests."""
    num_decode_tokens: int
    """Tokens behind first ones: what `decode` is divided by for one output token."""
    ceilings: Ceilings
    """Rank 0's."""
    level: MemoryLevel
    """Memory level that the largest step's working set fits."""
    working_set_bytes: int
    """Weights and KV that the largest step of rank 0 touches."""
    dtype: DType
    memory: tuple[MemoryPlan, ...]
    """Per rank."""
    floors: tuple[FloorRow, ...]
    """Kernel time against its floor on rank 0."""
    choices: tuple[str, ...]
    """What was decided for this machine, a line each."""
