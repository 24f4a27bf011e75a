"""What one rank decides before it connects: dtypes, threads, where it runs, tokens of a step.

The decisions are those of `costs`; here the facts of this machine and this process are put to them.
"""

from dataclasses import replace

from tpinfer.config.engine import EngineConfig
from tpinfer.config.model import ModelSpec
from tpinfer.config.topology import Topology
from tpinfer.config.units import format_rate
from tpinfer.costs.choices import Choice, ExecutionChoices, choose_execution
from tpinfer.costs.chunk import choose_chunk
from tpinfer.costs.ledger import CostLedger
from tpinfer.launching.seat import Seat
from tpinfer.machine.discover import Machine
from tpinfer.machine.rank_cores import rank_binding
from tpinfer.sharding.partition import Partition


def decide(
    config: EngineConfig,
    seat: Seat,
    spec: ModelSpec,
    partition: Partition,
    topology: Topology | None,
    machine: Machine,
) -> tuple[EngineConfig, ExecutionChoices, tuple[int, ...] | None]:
    """(settings with nothing left open, choices, cores to bind the rank to or None)."""
    binding = rank_binding(seat, machine, topology) if seat.device == "cpu" else None
    ceilings = topology.ceilings_of_rank(seat.rank, partition.size) if topology else None
    facts = seat.local_world, machine.num_cores, machine.cpu_flags
    choices = choose_execution(config, spec, seat.device, *facts, binding, ceilings)
    if topology is not None and topology.placement and topology.placement.by_rates:
        choices = choices.with_choice(_shares_choice(topology))
    config, choices = _with_chunk(config, spec, partition, topology, choices)
    if config.steps_in_flight is None:
        is_gpu = choices.device_type == "cuda"
        config = replace(config, steps_in_flight=2 if is_gpu else 1)
        if is_gpu:
            why = "the device runs one while the host plans the next"
            choices = choices.with_choice(Choice("steps in flight", "2", why))
    return config, choices, binding.cores if binding else None


def _shares_choice(topology: Topology) -> Choice:
    if topology.shares is None:
        return Choice("shares", "even", f"every device of {topology.file} reads as fast")
    rates = ", ".join(format_rate(rate) for rate in topology.shares)
    total = sum(topology.shares)
    parts = " : ".join(f"{100 * rate / total:.0f} %" for rate in topology.shares)
    return Choice("shares", parts, f"memory of the ranks reads {rates} by {topology.file}")


def make_ledger(
    spec: ModelSpec, partition: Partition, rank: int, choices: ExecutionChoices
) -> CostLedger:
    """The ledger of one rank."""
    return CostLedger(spec, partition, rank, choices.compute_dtype, choices.kv_dtype)


def _with_chunk(
    config: EngineConfig,
    spec: ModelSpec,
    partition: Partition,
    topology: Topology | None,
    choices: ExecutionChoices,
) -> tuple[EngineConfig, ExecutionChoices]:
    """The tokens of a step, chosen from the rates of all ranks' devices where the user gave none;
    so all ranks come to the same number."""
    if config.max_num_batched_tokens is not None or topology is None:
        why = "the default" if config.max_num_batched_tokens is None else "asked for"
        return config, choices.with_choice(Choice("chunk", f"{config.batched_tokens} tokens", why))
    ranks = range(partition.size)
    chunk = choose_chunk(
        [make_ledger(spec, partition, rank, choices) for rank in ranks],
        [topology.ceilings_of_rank(rank, partition.size) for rank in ranks],
        config.max_num_seqs,
        config.memory_utilization,
    )
    choices = choices.with_choice(Choice("chunk", f"{chunk.tokens} tokens", chunk.reason))
    return replace(config, max_num_batched_tokens=chunk.tokens), choices
