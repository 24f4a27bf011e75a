"""Names that a recorder sees on a rank's main thread: steps, ops, and what the host does between.

An `Annotate` makes a context manager of a name. `torch_ranges` is for torch's profiler,
`nvtx_ranges` for Nsight; nobody is asked where nobody records.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack

from tpinfer.config.errors import ConfigError
from tpinfer.costs.ops import StepAggregates
from tpinfer.layers.step_inputs import Activations, Op, OpCall, StepInputs

Annotate = Callable[[str], AbstractContextManager[object]]
DOMAIN = "tpinfer"
"""NVTX domain of our ranges."""


def step_name(step_id: int, phase: str, aggregates: StepAggregates) -> str:
    """`tpinfer.step id=12 phase=decode tokens=1 ...`: what a cost manifest's formulas need."""
    sums = " ".join(f"{name}={value}" for name, value in aggregates.named().items())
    return f"tpinfer.step id={step_id} phase={phase} {sums}"


def op_name(op_id: str) -> str:
    """`tpinfer.op layers.0.attn.qkv`."""
    return f"tpinfer.op {op_id}"


def annotated(program: Sequence[Op], annotate: Annotate) -> list[Op]:
    """The same program, each op inside a range of its name."""

    def wrap(op: Op) -> OpCall:
        name, call = op_name(op.id), op.call

        def run(acts: Activations, step: StepInputs) -> None:
            with annotate(name):
                call(acts, step)

        return run

    return [Op(op.id, wrap(op)) for op in program]


def torch_ranges() -> Annotate:
    """Ranges for torch's profiler, about 1.5 us each while it records.

    `record_function` would cost 11 us and, on a decode step of CPU-sized ops, double it.
    """
    from torch._C._profiler import _RecordFunctionFast

    return _RecordFunctionFast


def nvtx_ranges() -> Annotate:
    """Push/pop ranges in the NVTX domain `tpinfer`. Raises ConfigError without the nvtx package."""
    try:
        import nvtx
    except ImportError as error:
        raise ConfigError(
            f"--nvtx needs the package nvtx ({error}); pip install 'tpinfer[nvtx]'"
        ) from error

    def annotate(name: str) -> AbstractContextManager[object]:
        return nvtx.annotate(name, domain=DOMAIN)

    return annotate


def together(annotates: list[Annotate]) -> Annotate | None:
    """One that does what all do; None of none."""
    if len(annotates) < 2:
        return annotates[0] if annotates else None

    def both(name: str) -> ExitStack:
        stack = ExitStack()
        for annotate in annotates:
            stack.enter_context(annotate(name))
        return stack

    return both
