"""Rank programs of the engine's tests: many requests through a small cache, and what is left
behind."""

import random
from contextlib import closing
from dataclasses import replace
from typing import Any

from tpinfer.launching.seat import Seat

NUM_REQUESTS = 64


def mixed_requests(count: int = NUM_REQUESTS, seed: int = 7) -> list[Any]:
    """Short and long prompts, some with a beginning in common; greedy and sampled; 1 to 3
    continuations."""
    from tpinfer.config.sampling import SamplingParams
    from tpinfer.engine.requests import GenerationRequest

    draw = random.Random(seed)
    shared = [draw.randrange(3, 1000) for _ in range(40)]
    requests = []
    for number in range(count):
        prompt = [draw.randrange(3, 1000) for _ in range(draw.choice((1, 3, 17, 40, 70)))]
        if number % 3 == 0:
            prompt = shared[: draw.choice((16, 33, 40))] + prompt
        params = SamplingParams(
            temperature=0.0 if number % 2 else 0.8,
            top_k=0 if number % 4 else 20,
            seed=number,
            max_tokens=draw.choice((1, 2, 4, 8, 8, 60)),
            ignore_eos=bool(number % 5),
            n=1 if number % 8 else 3,
        )
        requests.append(GenerationRequest(prompt, params, priority=number % 2))
    return requests


def _config(seat: Seat, **settings: Any) -> Any:
    from tpinfer.config.dtypes import DType
    from tpinfer.config.engine import EngineConfig
    from tpinfer.embedded.locate import embedded_model

    return EngineConfig(
        model_dir=embedded_model(),
        tp=seat.world,
        dtype=DType.FLOAT32,
        wait_timeout_s=60,
        **settings,
    )


def tokens_of(engine: Any, requests: list[Any]) -> list[list[list[int]]]:
    """Token ids by request and continuation; checks that each one ends exactly once."""
    tokens = [[[] for _ in range(request.params.n)] for request in requests]
    ended: dict[tuple[int, int], int] = {}
    for event in engine.generate(requests):
        if event.token_id >= 0:
            tokens[event.index][event.sample].append(event.token_id)
        if event.finish_reason:
            key = event.index, event.sample
            ended[key] = ended.get(key, 0) + 1
    wanted = {(i, k) for i, request in enumerate(requests) for k in range(request.params.n)}
    assert ended == dict.fromkeys(wanted, 1), "each continuation has exactly one last event"
    return tokens


def crowd(seat: Seat, runs: list[list[int]], num_blocks: int) -> dict[str, Any] | None:
    """All requests at once through a cache of few blocks, once for each (depth, host blocks) of
    `runs`; then each alone through a large one."""
    from tpinfer.engine.rank_engine import open_engine

    block_bytes = _largest_block_bytes(seat)
    requests = mixed_requests()
    found: dict[str, Any] = {"together": [], "stats": []}
    for generation, (depth, host_blocks) in enumerate(runs):
        config = _config(
            seat,
            kv_bytes=num_blocks * block_bytes,
            kv_host_bytes=host_blocks * block_bytes,
            max_num_seqs=24,
            max_num_batched_tokens=64,
            steps_in_flight=depth,
        )
        with closing(open_engine(config, replace(seat, generation=generation))) as engine:
            if seat.rank:
                engine.serve()
            else:
                found["together"].append(tokens_of(engine, requests))
                engine.scheduler.check_idle()
                found["stats"].append(vars_of(engine.scheduler.stats()))
    alone = replace(seat, generation=len(runs))
    with closing(open_engine(_config(seat, prefix_caching=False), alone)) as engine:
        if seat.rank:
            engine.serve()
            return None
        found["alone"] = [tokens_of(engine, [request])[0] for request in requests]
    return found


def vars_of(record: Any) -> dict[str, Any]:
    """Fields of a slotted dataclass."""
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def shared_prefix(seat: Seat) -> dict[str, Any] | None:
    """32 requests that begin with the same 512 tokens: the first alone, then the others
    together."""
    from tpinfer.config.sampling import SamplingParams
    from tpinfer.engine.rank_engine import open_engine
    from tpinfer.engine.requests import GenerationRequest

    draw = random.Random(3)
    prefix = [draw.randrange(3, 1000) for _ in range(512)]
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    prompts = [[*prefix, *(draw.randrange(3, 1000) for _ in range(9))] for _ in range(32)]
    requests = [GenerationRequest(prompt, params) for prompt in prompts]
    with closing(open_engine(_config(seat, max_num_batched_tokens=512), seat)) as engine:
        if seat.rank:
            engine.serve()
            return None
        tokens_of(engine, requests)
        results = engine.results()
        records, _ = engine._metrics.records_and_ceilings(engine._executor)
        return {
            "cached": [result.num_cached_tokens for result in results],
            "tokens": sum(record.aggregates.tokens for record in records),
            "ttft_s": [result.timing.ttft_s for result in results if result.timing],
        }


def fails_locally(
    seat: Seat, failing_rank: int, at_op: str, at_step: int, depth: int = 1
) -> dict[str, Any] | None:
    """One rank runs out of memory in one op of one step; what becomes of the requests."""
    from tpinfer.config.sampling import SamplingParams
    from tpinfer.engine.rank_engine import open_engine
    from tpinfer.engine.requests import GenerationRequest

    with closing(open_engine(_config(seat, steps_in_flight=depth), seat)) as engine:
        if seat.rank == failing_rank:
            _break_op(engine._assembly.worker, at_op, at_step)
        if seat.rank:
            engine.serve()
            return None
        params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
        events = list(engine.generate([GenerationRequest([5, 6, 7], params)] * 2))
        first = [result.outputs[0] for result in engine.results()]
        again = list(engine.generate([GenerationRequest([5, 6, 7], params)]))
        engine.scheduler.check_idle()
        return {
            "reasons": [output.finish_reason for output in first],
            "errors": [output.error for output in first],
            "num_events": len(events),
            "again": [event.token_id for event in again],
            "last": again[-1].finish_reason,
        }


def _break_op(worker: Any, at_op: str, at_step: int) -> None:
    from tpinfer.layers.step_inputs import Activations, Op, StepInputs

    calls = 0

    def broken(op: Op) -> Op:
        def call(acts: Activations, step: StepInputs) -> None:
            nonlocal calls
            calls += 1
            if calls == at_step:
                raise MemoryError("no memory for this op")
            op.call(acts, step)

        return replace(op, call=call)

    worker.program = [broken(op) if op.id == at_op else op for op in worker.program]


def fails_in_a_crowd(
    seat: Seat, runs: list[list[int]], at_ops: list[str], num_blocks: int
) -> list[dict[str, Any]]:
    """A crowd through a small cache, once for each (depth, rank) of `runs`; that rank finds no
    memory again and again: in each of `at_ops` once, some steps apart. Who ended by it, and who was
    in those steps."""
    from tpinfer.engine.rank_engine import open_engine

    requests = _crowd_with_logprobs()
    alone: list[list[list[int]]] = []
    with closing(open_engine(_config(seat, prefix_caching=False), seat)) as engine:
        if seat.rank:
            engine.serve()
        else:
            alone = [tokens_of(engine, [request])[0] for request in requests]
    found = []
    for generation, (depth, failing_rank) in enumerate(runs, 1):
        config = _config(
            seat,
            kv_bytes=num_blocks * _largest_block_bytes(seat),
            max_num_seqs=6,
            max_num_batched_tokens=40,
            steps_in_flight=depth,
        )
        with closing(open_engine(config, replace(seat, generation=generation))) as engine:
            broken: list[str] = []
            if seat.rank == failing_rank:
                _break_one_after_the_other(engine._assembly.worker, at_ops, broken)
            if seat.rank:
                engine.serve()
            else:
                hit = _note_who_fails(engine)
                tokens_of(engine, requests)
                engine.scheduler.check_idle()
            outputs = [output for live in engine._finished for output in live.outputs]
            told = [
                {
                    "reason": output.finish_reason,
                    "step": hit.get((output.live.index, output.sequence.sampling.index)),
                    "tokens": list(output.sequence.token_ids),
                    "alone": alone[output.live.index][output.sequence.sampling.index],
                    "num_logprobs": len(output.logprobs),
                    "error": output.error,
                }
                for output in outputs
            ]
            found.append({"outputs": told, "broken": broken})
    return found


def _note_who_fails(engine: Any) -> dict[tuple[int, int], int]:
    """(request, continuation) -> the failed step that it was in, unfinished; filled on the way."""
    scheduler, hit = engine.scheduler, {}
    fail = scheduler.fail

    def noted(scheduled: Any, reason: str = "error") -> Any:
        for one in scheduled.sequences:
            if one.finish_reason is None:
                hit[one.index, one.sampling.index] = scheduled.plan.step_id
        return fail(scheduled, reason)

    scheduler.fail = noted
    return hit


def _crowd_with_logprobs() -> list[Any]:
    """Every fourth of the mixed requests wants log-probabilities of its prompt and output."""
    requests = mixed_requests(26, seed=11)
    for number in range(0, len(requests), 4):
        params = replace(requests[number].params, logprobs=2, prompt_logprobs=1)
        requests[number] = replace(requests[number], params=params)
    return requests


def _largest_block_bytes(seat: Seat) -> int:
    from tpinfer.config.huggingface import read_model_spec
    from tpinfer.embedded.locate import embedded_model
    from tpinfer.sharding.partition import partition_model

    spec = read_model_spec(embedded_model())
    most_heads = max(map(partition_model(spec, seat.world).num_kv_heads, range(seat.world)))
    return spec.num_layers * 2 * spec.head_dim * 4 * 16 * most_heads


def _break_one_after_the_other(worker: Any, at_ops: list[str], broken_ops: list[str]) -> None:
    """Let the ops fail in turn, each in the fourth step after the failure before."""
    from tpinfer.layers.step_inputs import Activations, Op, StepInputs

    left, num_steps = list(at_ops), 0

    def broken(op: Op, is_first: bool) -> Op:
        def call(acts: Activations, step: StepInputs) -> None:
            nonlocal num_steps
            num_steps += is_first
            if left and op.id == left[0] and num_steps >= 4:
                num_steps = 0
                broken_ops.append(left.pop(0))
                raise MemoryError("no memory for this op")
            op.call(acts, step)

        return replace(op, call=call)

    worker.program = [broken(op, place == 0) for place, op in enumerate(worker.program)]
