"""One rank's part of a sharded model, run alone: what it computes is timed, its collectives do
nothing."""

import statistics
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch

from tpinfer.collectives.choose import CollectiveChoice
from tpinfer.collectives.gathered import GatheredGroup
from tpinfer.config.engine import EngineConfig
from tpinfer.config.model_name import model_directory
from tpinfer.launching.seat import Seat
from tpinfer.steps.plan import SamplingRecord, SequenceRecord, StepPlan
from tpinfer.worker import assemble as assembling

NUM_STEPS, NUM_SKIPPED = 60, 12


class AloneGroup(GatheredGroup):
    """As if every other rank had nothing to add."""

    name = "none"
    can_record = True

    def all_reduce(self, t: torch.Tensor) -> None:
        """The sum is this rank's part."""

    def all_gather(self, out: torch.Tensor, t: torch.Tensor) -> None:
        """Everybody sends what this rank does."""
        out.copy_(t.unsqueeze(0).expand_as(out))

    def all_to_all(self, out: torch.Tensor, t: torch.Tensor) -> None:
        """The others send what this rank would send to them."""
        out.copy_(t)

    def broadcast(self, t: torch.Tensor, src: int) -> None:
        """All have it."""

    def send(self, t: torch.Tensor, dst: int) -> None:
        """Nobody takes it."""

    def recv(self, t: torch.Tensor, src: int) -> None:
        """Nobody sends."""

    def barrier(self) -> None:
        """Nobody to wait for."""

    def abort(self) -> None:
        """Nobody to tell."""

    def close(self) -> None:
        """Nothing was opened."""


def shard_step_s(
    shape: str, tp: int, num_layers: int, context: int, device: torch.device, **settings: Any
) -> tuple[float, int]:
    """(median seconds of a decode step of one row, bytes that it reads) of rank 0 of `tp` of
    `num_layers` layers of a shape, with `context` tokens in the cache; two steps in flight."""

    def alone(*_: Any, **__: Any) -> tuple[AloneGroup, CollectiveChoice]:
        return AloneGroup(0, tp), CollectiveChoice("none", "", "one rank's part alone")

    place = "cpu" if device.type == "cpu" else str(device)
    config = EngineConfig(
        model_dir=model_directory(f"shape:{shape}"), tp=tp, load_format="random",
        num_layers_override=num_layers, max_num_seqs=1, max_model_len=context + NUM_STEPS + 8,
        device=device.type, kv_bytes=2 << 30, steps_in_flight=2, **settings,
    )  # fmt: skip
    opened = assembling.open_group
    assembling.open_group = alone
    try:
        seat = Seat(0, tp, 0, tp, place, "alone", 0, "single")
        assembly = assembling.assemble(config, seat, lambda text: None)
    finally:
        assembling.open_group = opened
    try:
        return _decode_s(assembly, context), _step_bytes(assembly, context)
    finally:
        assembly.close()


def _decode_s(assembly: Any, context: int) -> float:
    worker, size = assembly.worker, assembly.config.block_size
    for tensor in assembly.cache.kv.tensors():
        tensor.fill_(1)
    tokens = tuple(i % 1000 for i in range(context))
    worker.admit(SequenceRecord(0, tokens, context, context - 1, SamplingRecord(temperature=0.0)))
    num_blocks = -(-(context + NUM_STEPS + 8) // size)
    blocks: Sequence[Sequence[int]] = ((0, *range(num_blocks)),)
    spent, waiting, last_s = [], None, perf_counter()
    for step in range(NUM_STEPS):
        plan = StepPlan(step, (0,), (1,), (1,), new_blocks=blocks if step == 0 else ())
        issued = worker.issue(plan)
        if waiting is not None:
            waiting()
        waiting, now_s = issued, perf_counter()
        spent.append(now_s - last_s)
        last_s = now_s
    if waiting is not None:
        waiting()
    return statistics.median(spent[NUM_SKIPPED:])


def _step_bytes(assembly: Any, context: int) -> int:
    ledger = assembly.ledger(0)
    return ledger.weight_bytes_read + context * ledger.kv_bytes_per_token
