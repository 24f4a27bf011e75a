"""Time to draw tokens from the logits of a 152k vocabulary, beside plain torch.

    python profiling/sampler_speed.py [--threads 1] [--plain] [--json OUT]

For each kind of request and for batches of 1 and 32: the median in ms a row of our sampler on one
rank, and of the usual way with torch on the same logits: softmax and multinomial, with a sort for
top-p. Then greedy and temperature on logits cut over two ranks, with the gathers replaced by
copies: what a rank computes.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tpinfer.decoding.native_passes import load_native_passes
from tpinfer.decoding.sampler import bind_sampler
from tpinfer.decoding.vocab_passes import TorchPasses, VocabPasses
from tpinfer.layers.step_inputs import Activations, SamplingRow, StepInputs
from tpinfer.sharding.spec import Range
from tpinfer.steps.plan import SamplingRecord
from tpinfer.steps.sampling_record import is_plain_greedy

VOCAB_SIZE = 151_936
BATCHES = (1, 32)
HISTORY = 500
SECONDS_A_CASE = 0.4
KINDS = {
    "greedy": SamplingRecord(0.0),
    "temperature 0.8": SamplingRecord(0.8),
    "top-k 50": SamplingRecord(0.8, top_k=50),
    "top-p 0.9": SamplingRecord(0.8, top_p=0.9),
    "top-p 0.9, flat": SamplingRecord(3.0, top_p=0.9),
    "min-p 0.05": SamplingRecord(0.8, min_p=0.05),
    "three penalties": SamplingRecord(
        0.8, repetition_penalty=1.1, frequency_penalty=0.2, presence_penalty=0.2
    ),
    "logprobs 5": SamplingRecord(0.8, num_logprobs=5),
}
EMPTY = torch.empty(0, dtype=torch.int64)


def made_up_logits(batch: int) -> torch.Tensor:
    """float32 [batch, V]: a bell with forty likely tokens, as a language model has them. At a
    temperature of 3 the bell outweighs them."""
    logits = torch.randn(batch, VOCAB_SIZE) * 2
    likely = torch.randint(0, VOCAB_SIZE, (batch, 40))
    return logits.scatter_(1, likely, 12 + 8 * torch.rand(batch, 40))


def step_of(record: SamplingRecord, batch: int) -> StepInputs:
    """A step of equal rows with a history of random tokens."""
    rows = [
        SamplingRow(record, HISTORY + i, torch.randint(0, VOCAB_SIZE, (HISTORY + i,)), HISTORY // 2)
        for i in range(batch)
    ]
    unused: dict[str, Any] = dict.fromkeys(
        ("token_ids", "positions", "slots", "cos", "sin", "logit_rows", "drawn"), EMPTY
    )
    return StepInputs(**unused, spans=(), sampling=rows, all_greedy=is_plain_greedy(record))


def ours(
    logits: torch.Tensor, record: SamplingRecord, ranges: Sequence[Range], passes: VocabPasses
) -> Callable[[], Any]:
    """Our sampler on the first of `ranges`, as a call."""

    def copies(out: torch.Tensor, mine: torch.Tensor) -> None:
        out.copy_(mine.unsqueeze(0).expand_as(out))

    def no_logits(acts: Activations, tokens: torch.Tensor) -> torch.Tensor:
        raise AssertionError("no prompt row asks for logits")

    program = bind_sampler(copies, ranges, 0, no_logits, passes)
    step = step_of(record, logits.shape[0])
    local = logits[:, ranges[0][0] : ranges[0][1]].contiguous()

    def call() -> None:
        acts = Activations()
        acts.logits = local  # penalties wear it down over the rounds, which costs nothing
        for op in program:
            op.call(acts, step)

    return call


def plain(logits: torch.Tensor, record: SamplingRecord) -> Callable[[], Any]:
    """The usual way with torch, as a call."""
    step = step_of(record, logits.shape[0])

    def call() -> object:
        found = logits
        if record.repetition_penalty != 1:
            found = _penalized(logits, step.sampling)
        if record.temperature == 0:
            return found.argmax(-1)
        if record.num_logprobs >= 0:
            torch.log_softmax(found, -1).topk(record.num_logprobs, -1)
        found = found / record.temperature
        if record.top_k:
            least = found.topk(record.top_k, -1).values[:, -1:]
            found = found.masked_fill(found < least, float("-inf"))
        chances = torch.softmax(found, -1)
        if record.min_p:
            chances = chances * (chances >= record.min_p * chances.amax(-1, keepdim=True))
        if record.top_p < 1:
            falling, order = chances.sort(-1, descending=True)
            falling = falling * (falling.cumsum(-1) - falling < record.top_p)
            return order.gather(-1, torch.multinomial(falling, 1))
        return torch.multinomial(chances, 1)

    return call


def _penalized(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    found = logits.clone()
    for i, row in enumerate(rows):
        record, tokens = row.record, row.token_ids
        seen = found[i, tokens]
        penalty = record.repetition_penalty
        found[i, tokens] = torch.where(seen > 0, seen / penalty, seen * penalty)
        counts = torch.bincount(tokens[row.num_prompt_tokens :], minlength=VOCAB_SIZE)
        found[i] -= record.frequency_penalty * counts + record.presence_penalty * (counts > 0)
    return found


def ms_a_row(call: Callable[[], Any], batch: int) -> float:
    """Median time of a call over its rows, in ms; a warm-up call first."""
    call()
    took_ns: list[int] = []
    until_ns = time.perf_counter_ns() + int(SECONDS_A_CASE * 1e9)
    while len(took_ns) < 3 or time.perf_counter_ns() < until_ns:
        began_ns = time.perf_counter_ns()
        call()
        took_ns.append(time.perf_counter_ns() - began_ns)
    return statistics.median(took_ns) / batch / 1e6


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (1)")
    parser.add_argument("--plain", action="store_true", help="our sampler without compiled passes")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    native, said = (None, "by --plain") if args.plain else load_native_passes(args.threads)
    passes = native or TorchPasses()
    print(f"passes over the logits: {'compiled' if native else 'torch'} ({said})")
    found: dict[str, dict[str, float]] = {}
    print(f"V = {VOCAB_SIZE}, {args.threads} thread(s); ms a row")
    print(f"{'':24}" + "".join(f"{f'ours, {b}':>12}{f'torch, {b}':>12}" for b in BATCHES))
    with torch.inference_mode():
        for name, record in KINDS.items():
            figures: dict[str, float] = {}
            for batch in BATCHES:
                logits = made_up_logits(batch)
                call = ours(logits, record, [(0, VOCAB_SIZE)], passes)
                figures[f"ours_{batch}"] = ms_a_row(call, batch)
                figures[f"torch_{batch}"] = ms_a_row(plain(logits, record), batch)
            found[name] = figures
            print(f"{name:24}" + "".join(f"{value:12.3f}" for value in figures.values()))
        half = VOCAB_SIZE // 2
        for name in ("greedy", "temperature 0.8"):
            figures = {}
            for batch in BATCHES:
                logits = made_up_logits(batch)
                call = ours(logits, KINDS[name], [(0, half), (half, VOCAB_SIZE)], passes)
                figures[f"ours_{batch}"] = ms_a_row(call, batch)
            label = f"{name}, half"
            found[label] = figures
            print(f"{label:24}" + "".join(f"{value:12.3f}{'':12}" for value in figures.values()))
    if args.json:
        args.json.write_text(json.dumps({"vocab_size": VOCAB_SIZE, "ms_a_row": found}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
