"""Steps as the host annotated them: this project's marks, vLLM's, SGLang's, torch's.

A step is an interval on the host. Annotations of one step may nest (SGLang puts `step[DECODE ..]`
inside `execute_..`): the outer one gives the interval, all of them the facts. Torch's own
`ProfilerStep#n` counts only where an engine says nothing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from tpprof.events import Kind, Trace

_PAIR = re.compile(r"(\w+)=([^\s\]]+)")
_SUM = re.compile(r"(sqsq|sqsk|sq|sk)(\d{1,18})")
_N = r"(\d{1,18})"
_DETAILED = re.compile(rf"execute_{_N}_context_{_N}\(([^)]*)\)_generation_{_N}\(([^)]*)\)")
_PLAIN = re.compile(rf"execute_context_{_N}\({_N}(?:_{_N})?\)_generation_{_N}\({_N}(?:_{_N})?\)")
"""Requests and their tokens; some versions add the squares of tokens."""
_NEW = re.compile(r"execute_new_(\d{1,18})_cached_(\d{1,18})")
_SGLANG = re.compile(r"step\[(\w+)([^\]]*)\]")
_TORCH = re.compile(r"ProfilerStep#(\d{1,18})")
_MOST_DIGITS = 18
_SGLANG_PHASES = {"DECODE": "decode", "EXTEND": "prefill", "MIXED": "mixed"}


@dataclass(frozen=True, slots=True)
class Step:
    """One iteration of an engine on one rank."""

    number: int
    """As annotated; the ordinal in the recording where annotations have no number."""
    phase: str
    """`prefill`, `decode`, `mixed`, or as the engine calls it; "" where unknown."""
    start_ns: int
    end_ns: int
    sums: Mapping[str, int] = field(default_factory=dict)
    """`tokens`, `rows`, `sk`, `sqsk`, ... where annotated; of vLLM's detailed form those of context
    and generation added up."""
    is_numbered: bool = True
    """Whether the number is the engine's own, so that it means one step on all ranks."""

    @property
    def label(self) -> str:
        """`step 12 decode`."""
        return f"step {self.number} {self.phase}".rstrip()


@dataclass(frozen=True, slots=True)
class _Facts:
    phase: str
    number: int | None = None
    sums: Mapping[str, int] = field(default_factory=dict)
    is_torch: bool = False


def read_annotation(text: str) -> _Facts | None:
    """What a step's annotation says; None for any other text."""
    if text.startswith("tpinfer.step "):
        pairs = dict(_PAIR.findall(text))
        numbers = _numbers(pairs)
        number = numbers.pop("id", None)
        return _Facts(pairs.get("phase", ""), number, numbers)
    if found := _DETAILED.search(text):
        tokens, context, context_sums, generation, generation_sums = found.groups()
        sums = {"tokens": int(tokens), "rows": int(context) + int(generation)}
        for key, value in _SUM.findall(f"{context_sums} {generation_sums}"):
            if key != "sq":
                sums[key] = sums.get(key, 0) + int(value)
        return _Facts(_phase(int(context), int(generation)), None, sums)
    if found := _PLAIN.search(text):
        return _plain(*found.groups())
    if found := _NEW.search(text):
        new, cached = map(int, found.groups())
        return _Facts(_phase(new, cached), None, {"rows": new + cached})
    if found := _SGLANG.search(text):
        mode, rest = found.groups()
        names = {"bs": "rows", "toks": "tokens"}
        numbers = _numbers(dict(_PAIR.findall(rest)))
        sums = {names[key]: value for key, value in numbers.items() if key in names}
        return _Facts(_SGLANG_PHASES.get(mode, mode.lower()), None, sums)
    if found := _TORCH.fullmatch(text):
        return _Facts("", int(found.group(1)), {}, is_torch=True)
    return None


def _numbers(pairs: Mapping[str, str]) -> dict[str, int]:
    """Values that are numbers an int64 holds."""
    return {
        key: int(value)
        for key, value in pairs.items()
        if value.isdecimal() and len(value) <= _MOST_DIGITS
    }


def _plain(
    context: str,
    context_tokens: str,
    context_squares: str | None,
    generation: str,
    generation_tokens: str,
    generation_squares: str | None,
) -> _Facts:
    sums = {
        "tokens": int(context_tokens) + int(generation_tokens),
        "rows": int(context) + int(generation),
    }
    if context_squares is not None:
        sums["sqsq"] = int(context_squares) + int(generation_squares or generation_tokens)
    return _Facts(_phase(int(context), int(generation)), None, sums)


def _phase(num_context: int, num_generation: int) -> str:
    if num_context and num_generation:
        return "mixed"
    return "prefill" if num_context else "decode"


def find_steps(trace: Trace) -> list[Step]:
    """Steps in order of time, none of which overlap; of several threads the one with most time in
    steps counts."""
    ranges = np.flatnonzero(trace.kind == Kind.RANGE)
    named = {index: trace.strings[index] for index in np.unique(trace.name[ranges]).tolist()}
    facts = {index: said for index, text in named.items() if (said := read_annotation(text))}
    if any(not said.is_torch for said in facts.values()):
        facts = {index: said for index, said in facts.items() if not said.is_torch}
    rows = ranges[np.isin(trace.name[ranges], list(facts))]
    if not len(rows):
        return []
    lanes = trace.lane[rows]
    spent = np.bincount(lanes, weights=trace.end_ns[rows] - trace.start_ns[rows] + 1)
    rows = rows[lanes == spent.argmax()]
    steps: list[Step] = []
    for row in rows.tolist():
        said = facts[int(trace.name[row])]
        start, end = int(trace.start_ns[row]), int(trace.end_ns[row])
        if steps and start < steps[-1].end_ns:
            steps[-1] = _merged(steps[-1], said)
        else:
            number = len(steps) if said.number is None else said.number
            numbered = said.number is not None
            steps.append(Step(number, said.phase, start, end, said.sums, numbered))
    return _with_distinct_numbers(steps)


def _merged(outer: Step, inner: _Facts) -> Step:
    number = outer.number
    if inner.number is not None and not outer.is_numbered:
        number = inner.number
    return Step(
        number=number,
        phase=outer.phase or inner.phase,
        start_ns=outer.start_ns,
        end_ns=outer.end_ns,
        sums={**inner.sums, **outer.sums},
        is_numbered=outer.is_numbered or inner.number is not None,
    )


def _with_distinct_numbers(steps: list[Step]) -> list[Step]:
    """A number that comes twice means nothing: then ordinals count."""
    if len({step.number for step in steps}) == len(steps):
        return steps
    return [
        Step(i, step.phase, step.start_ns, step.end_ns, step.sums, is_numbered=False)
        for i, step in enumerate(steps)
    ]


def step_at(steps: list[Step], moments_ns: np.ndarray) -> np.ndarray:
    """int64 [moments]: place in `steps` of the one open at each moment, -1 where none is."""
    if not steps:
        return np.full(len(moments_ns), -1, np.int64)
    starts = np.array([step.start_ns for step in steps])
    ends = np.array([step.end_ns for step in steps])
    place = np.searchsorted(starts, moments_ns, side="right") - 1
    return np.where((place >= 0) & (moments_ns < ends[place]), place, -1)
