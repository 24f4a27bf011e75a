"""Tokens of a step as the runtime itself would choose them on each placement (`costs.chunk`)."""

from dataclasses import replace

from tpinfer.config.dtypes import DType
from tpinfer.config.engine import DEFAULT_BATCHED_TOKENS
from tpinfer.config.errors import ConfigError
from tpinfer.config.model import ModelSpec
from tpinfer.config.topology import Topology
from tpinfer.costs.chunk import LinearFormat, choose_chunk
from tpinfer.costs.ledger import CostLedger
from tpinfer.planner.placement import place
from tpinfer.planner.precision import Precision
from tpinfer.sharding.partition import cut_evenly, partition_model


class Chunks:
    """Chosen once for each placement that differs."""

    def __init__(self, spec: ModelSpec, topology: Topology, precision: Precision) -> None:
        self._spec = spec
        self._topology = topology
        self._precision = precision
        self._found: dict[tuple[float, ...], int] = {}

    def tokens(
        self, sizes: tuple[int, int, int], max_num_seqs: int, memory_utilization: float
    ) -> int:
        """Of a step on (tp, pp, dp) ranks; the default where they cannot be placed, which their
        plan says. On GPUs replicas share nothing and choose alike."""
        tp, pp, dp = sizes
        on_cpu = any(host.computes_on_cpu for host in self._topology.hosts)
        key = tp, pp, dp if on_cpu else 1, max_num_seqs, memory_utilization
        if key not in self._found:
            try:
                self._found[key] = self._choose(tp, pp, key[2], max_num_seqs, memory_utilization)
            except ConfigError:
                self._found[key] = DEFAULT_BATCHED_TOKENS
        return self._found[key]

    def _choose(self, tp: int, pp: int, dp: int, max_num_seqs: int, share: float) -> int:
        placement = place(self._topology, tp, pp, dp)
        placed = replace(self._topology, placement=placement)
        partition = partition_model(self._spec, tp, placement.shares, "auto")
        precision = self._precision
        known = next((dtype for dtype in DType if dtype == precision.product), DType.BFLOAT16)
        linears = LinearFormat(precision.weight_bytes, known)
        kinds = precision.activation, precision.kv
        longest = max(
            stop - start for start, stop in cut_evenly(self._spec.num_layers, (1.0,) * pp)
        )
        slides = tuple(self._spec.sliding_layers[:longest])
        stage = replace(self._spec, num_layers=longest, sliding_layers=slides)
        ledgers = [CostLedger(stage, partition, rank, *kinds) for rank in range(tp)]
        found = []
        for group in placed.groups(tp)[:pp]:
            ceilings = [placed.ceilings_of(*at, num_ranks=tp) for at in group]
            found.append(choose_chunk(ledgers, ceilings, max_num_seqs, share, linears).tokens)
        return min(found)
