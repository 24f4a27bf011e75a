"""Timing and attribution of finished requests, from what the ranks recorded of themselves."""

import itertools
from collections.abc import Sequence
from functools import reduce

import msgspec

from tpinfer.config.ceilings import Ceilings
from tpinfer.costs.step_record import StepRecord
from tpinfer.costs.step_time import StepTime
from tpinfer.engine.attribution import Attribution, Attributor
from tpinfer.engine.executor import Executor
from tpinfer.engine.live import LiveOutput, LiveRequest
from tpinfer.engine.requests import Completion, GenerationResult, RequestAttribution, Timing
from tpinfer.engine.run_report import RunReport
from tpinfer.machine.probe import probe_ceilings, probe_host_copy
from tpinfer.scheduling.request import Sequence as Finished
from tpinfer.steps.plan import Command
from tpinfer.worker.assemble import Assembly
from tpinfer.worker.measurements import exchange, gather_bytes


class Metrics:
    """One rank's side of measuring; rank 0 asks, the others answer."""

    def __init__(self, assembly: Assembly) -> None:
        self._assembly = assembly
        self._worker = assembly.worker
        self._ceilings: list[Ceilings] = []
        self._attributor: Attributor | None = None

    def answer(self, command: Command) -> None:
        """Do this rank's part of a command from rank 0."""
        if command.name == "collect":
            self._collect()
        elif command.name == "probe":
            self._probe()
        else:
            raise ValueError(
                f"command {command.name!r} is not known to this version; restart all ranks"
            )

    def step_costs(self, executor: Executor) -> StepTime | None:
        """What the scheduler weighs steps by, where it weighs any: under a time budget, or with
        host memory to move blocks to. A collective call then."""
        assembly = self._assembly
        limits = assembly.limits
        if limits.step_budget_ns is None and not limits.num_host_blocks:
            return None
        self._know_ceilings(executor)
        host_rate = probe_host_copy(assembly.device)
        return StepTime(assembly.ledger(0), self._ceilings[0], limits.block_size, host_rate)

    def move(self, assembly: Assembly) -> None:
        """Go on with the ranks of a new generation; what the last one recorded is gone with it."""
        self._assembly, self._worker = assembly, assembly.worker
        self._attributor = None

    def forget(self) -> None:
        """A new run begins: what was gathered belongs to the last one."""
        self._attributor = None

    def results(
        self, finished: Sequence[LiveRequest], executor: Executor
    ) -> list[GenerationResult]:
        """Tokens, times and attribution of each request, in order."""
        attributor = self._gather(executor)
        return [make_result(live, attributor) for live in finished]

    def report(self, finished: Sequence[LiveRequest], executor: Executor) -> RunReport:
        """All requests together."""
        attributor, assembly = self._gather(executor), self._assembly
        sequences = [output.sequence for live in finished for output in live.outputs]
        splits = [_request_attribution(sequence, attributor) for sequence in sequences]
        found = [split for split in splits if split is not None]
        decodes = [split.decode for split in found if split.decode is not None]
        working_set = attributor.working_set_bytes(0)
        ceilings = self._ceilings[0]
        return RunReport(
            num_requests=len(finished),
            ttft=reduce(Attribution.__add__, [split.ttft for split in found]) if found else None,
            decode=reduce(Attribution.__add__, decodes) if decodes else None,
            num_decode_tokens=sum(max(0, len(s.token_ids) - 1) for s in sequences),
            ceilings=ceilings,
            level=ceilings.memory_level(working_set),
            working_set_bytes=working_set,
            dtype=assembly.choices.compute_dtype,
            memory=assembly.memory_by_rank,
            floors=tuple(attributor.floors(0)),
            choices=tuple(assembly.choices.explain()),
        )

    def records_and_ceilings(
        self, executor: Executor
    ) -> tuple[Sequence[StepRecord], Sequence[Ceilings]]:
        """Rank 0's steps of this run, and every rank's ceilings. A collective call."""
        return self._gather(executor).records(0), self._ceilings

    def _gather(self, executor: Executor) -> Attributor:
        """Ask all ranks once per run for their records, and once per engine for the ceilings."""
        if self._attributor is None:
            executor.command(Command("collect"))
            measured = self._collect()
            self._know_ceilings(executor)
            ranks = range(len(measured))
            ledgers = [self._assembly.ledger(rank) for rank in ranks]
            self._attributor = Attributor(
                measured, ledgers, self._ceilings, self._assembly.emulation
            )
        return self._attributor

    def _know_ceilings(self, executor: Executor) -> None:
        if not self._ceilings:
            self._ceilings = self._topology_ceilings() or self._measure(executor)

    def _collect(self):
        assembly = self._assembly
        return exchange(assembly.group, self._worker.take_measurements(), assembly.device)

    def _topology_ceilings(self) -> list[Ceilings]:
        """Per rank from the topology file; empty where it names none for some rank."""
        topology, world = self._assembly.topology, self._assembly.seat.world
        if topology is None:
            return []
        found = [topology.ceilings_of_rank(rank, world) for rank in range(world)]
        return [ceilings for ceilings in found if ceilings is not None] if all(found) else []

    def _measure(self, executor: Executor) -> list[Ceilings]:
        executor.command(Command("probe"))
        return self._probe()

    def _probe(self) -> list[Ceilings]:
        """Measure on all ranks at once, since they share the machine's memory while they work."""
        assembly = self._assembly
        mine = probe_ceilings(
            assembly.group, (assembly.choices.compute_dtype,), budget_s=0.3, device=assembly.device
        )
        if assembly.group.size == 1:
            return [mine]
        payloads = gather_bytes(assembly.group, msgspec.msgpack.encode(mine), assembly.device)
        return [msgspec.msgpack.decode(payload, type=Ceilings) for payload in payloads]


def make_result(live: LiveRequest, attributor: Attributor | None) -> GenerationResult:
    """What a request came to; where its time went only with an attributor."""
    first = live.outputs[0].sequence
    return GenerationResult(
        prompt_token_ids=list(first.prompt_token_ids),
        outputs=[_completion(output, attributor) for output in live.outputs],
        prompt_logprobs=live.prompt_logprobs or None,
        num_cached_tokens=first.num_cached_tokens,
    )


def _completion(output: LiveOutput, attributor: Attributor | None) -> Completion:
    sequence = output.sequence
    return Completion(
        sample=sequence.sampling.index,
        token_ids=list(sequence.token_ids),
        text=output.text,
        finish_reason=output.finish_reason or "abort",
        stop_reason=output.stop_reason,
        error=output.error,
        logprobs=output.logprobs or None,
        timing=_timing(sequence),
        attribution=_request_attribution(sequence, attributor) if attributor else None,
    )


def _timing(sequence: Finished) -> Timing | None:
    times = sequence.token_times_ns
    if not times:
        return None
    gaps = [(b - a) / 1e9 for a, b in itertools.pairwise(times)]
    return Timing(
        ttft_s=(times[0] - sequence.accepted_ns) / 1e9,
        tpot_s=(times[-1] - times[0]) / 1e9 / len(gaps) if gaps else 0.0,
        e2e_s=(times[-1] - sequence.accepted_ns) / 1e9,
        itl_s=gaps,
    )


def _request_attribution(sequence: Finished, attributor: Attributor) -> RequestAttribution | None:
    times = sequence.token_times_ns
    if not times:
        return None
    decode = attributor.attribute(times[0], times[-1]) if len(times) > 1 else None
    return RequestAttribution(
        ttft=attributor.attribute(sequence.accepted_ns, times[0], sequence.admitted_ns),
        decode=decode,
    )
