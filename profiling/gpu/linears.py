"""Products with the weights of Llama-3.1-8B on one GPU: torch's against the own kernels, by rows
and tile; and all of a step's ops but rope and attention behind each other in one recorded graph.

    python profiling/gpu/linears.py --out profiling/results/gpu/linears.json [--rows 1,4,16,32,64]

Each time is that of one of several products behind each other in a recorded graph, over copies of
the weight that no cache holds: the median of several replays. gate_up is timed with its gate too.
Without a GPU the script says so and ends with exit code 3.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

import first_call  # noqa: E402

SHAPES = {
    "qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336),
    "head": (128256, 4096),
}  # fmt: skip
"""(N, K) of the weights."""
NUM_LAYERS, HIDDEN, REPEATS = 32, 4096, 7


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "profiling/results/gpu/linears.json")
    parser.add_argument("--rows", default="1,4,16,32,64")
    args = parser.parse_args()
    if not first_call.has_gpu():
        print("linears: no GPU is visible here; run it on a machine that has one")
        return 3
    found: dict[str, Any] = {"command": sys.argv, "date": time.strftime("%Y-%m-%d %H:%M:%S")}
    found["machine"] = first_call.part_machine(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    steps = found["step without attention, us"] = {}
    for rows in (64, 1, 32):
        for how in ("torch", "dependent", "chosen"):
            steps[f"{rows} rows, {how}"] = whole_step_us(rows, how)
            print(f"{rows} rows, {how}: {steps[f'{rows} rows, {how}']:.0f} us", flush=True)
            args.out.write_text(json.dumps(found, indent=1) + "\n")
    found["products"] = by_tile([int(rows) for rows in args.rows.split(",")])
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    for name, times in found["products"].items():
        print(name, {tile: f"{us:.1f}" for tile, us in times.items()})
    return 0


def by_tile(sizes: list[int]) -> dict[str, dict[str, float]]:
    """Shape and rows -> us of torch's product and of each tile that compiles."""
    import torch
    import torch.nn.functional as F

    from tpinfer.layers.product_tiles import split_space, tiles_for
    from tpinfer.layers.skinny import device_timer, in_turn
    from tpinfer.layers.triton_linear import (
        launches_dependent,
        skinny_product,
    )
    from tpinfer.layers.triton_norm import gate

    device = torch.device("cuda")
    timer, dependent = device_timer(device), launches_dependent(device)
    found: dict[str, dict[str, float]] = {}
    for name, (columns, inner) in SHAPES.items():
        weight = torch.randn(columns, inner, device=device, dtype=torch.bfloat16)
        space = split_space(columns, device)
        for rows in sizes:
            x = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
            calls: dict[str, Any] = {"torch": partial(F.linear, x)}
            gates = name == "gate_up"
            if gates:
                calls["torch, then the gate"] = lambda weight, x=x: gate(F.linear(x, weight))
            for tile in tiles_for(rows, columns):
                for gated in {False, gates}:

                    def own(
                        weight: Any, x: Any = x, tile: Any = tile, space: Any = space,
                        gated: bool = gated,
                    ) -> Any:  # fmt: skip
                        return skinny_product(
                            x, weight, None, tile, space, gates=gated, dependent=dependent
                        )

                    calls[f"{tile}{' gated' * gated}"] = own
            times = found[f"{name}, {rows} rows"] = {}
            for label, call in calls.items():
                try:
                    times[label] = timer([partial(call, one) for one in in_turn(weight)]) * 1e6
                except Exception as failure:  # a tile that does not fit this device
                    print(f"{name}, {rows} rows, {label}: {str(failure)[:100]}")
        del weight
    return found


def whole_step_us(rows: int, how: str) -> float:
    """A graph of all ops of a step but rope and attention, through the ops that the runtime binds.
    how: `torch` for torch's products alone, `chosen` for those chosen by time, `dependent` for
    these launched dependent."""
    import torch

    from tpinfer.layers.matmul import MatMul, plain_matmul
    from tpinfer.layers.skinny import SkinnyProducts, device_timer
    from tpinfer.layers.step_inputs import Activations
    from tpinfer.layers.triton_ops import TritonLayerOps

    device = torch.device("cuda")
    torch.cuda.empty_cache()
    products = SkinnyProducts(device_timer(device), how == "dependent")
    bind = plain_matmul if how == "torch" else products.bind

    def bound(name: str) -> MatMul:
        columns, inner = SHAPES[name]
        weight = torch.empty(columns, inner, device=device, dtype=torch.bfloat16).normal_(0, 0.01)
        return bind(weight, None)

    names = [f"layers.{i}.{name}" for i in range(NUM_LAYERS) for name in list(SHAPES)[:-1]]
    matmuls = {name: bound(name.rpartition(".")[2]) for name in names} | {"head": bound("head")}
    ops, norm = TritonLayerOps(matmuls), torch.ones(HIDDEN, device=device, dtype=torch.bfloat16)
    calls: list[Any] = []
    for i in range(NUM_LAYERS):
        calls += [
            ops.bind_norm(norm, 1e-5, adds_delta=i > 0), ops.bind_qkv(f"layers.{i}.qkv"),
            lambda acts, _: setattr(acts, "mixed", acts.qkv[:, :HIDDEN]),
            ops.bind_out(f"layers.{i}.out", is_whole=True),
            ops.bind_norm(norm, 1e-5, adds_delta=True), ops.bind_gate_up(f"layers.{i}.gate_up"),
            ops.bind_activation(), ops.bind_down(f"layers.{i}.down", is_whole=True),
        ]  # fmt: skip
    calls += [ops.bind_final_norm(norm, 1e-5), ops.bind_head()]
    step: Any = SimpleNamespace(logit_rows=torch.arange(rows, device=device))
    acts = Activations()
    residual = torch.randn(rows, HIDDEN, device=device, dtype=torch.bfloat16)

    def run() -> None:
        acts.residual, acts.delta = residual, None
        for call in calls:
            call(acts, step)

    return replayed_us(run)


def replayed_us(run: Callable[[], None]) -> float:
    """Median time of what `run` launches, recorded and replayed."""
    import torch

    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    times = []
    for _ in range(REPEATS):
        ends[0].record()
        graph.replay()
        ends[1].record()
        ends[1].synchronize()
        times.append(ends[0].elapsed_time(ends[1]) * 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
