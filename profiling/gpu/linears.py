"""Products with the weights of Llama-3.1-8B on one GPU: torch's against the own kernels, by rows
and tile; and all of a step's products of one row behind each other in one recorded graph.

    python profiling/gpu/linears.py --out profiling/results/gpu/linears.json [--rows 1,4,16,32,64]

Each time is the median of several, behind a write that leaves nothing of the weight in L2. Without
a GPU the script says so and ends with exit code 3.
"""

import argparse
import json
import statistics
import sys
import time
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
NUM_LAYERS, REPEATS = 32, 7


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
    found["machine"] = first_call.part_machine(SimpleNamespace())
    found["products"] = by_tile([int(rows) for rows in args.rows.split(",")])
    found["step of one row, us"] = {
        f"{'dependent' if dependent else 'one behind the other'}": whole_step_us(dependent)
        for dependent in (False, True)
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    for name, times in found["products"].items():
        print(name, {tile: f"{us:.1f}" for tile, us in times.items()})
    print(found["step of one row, us"])
    return 0


def by_tile(sizes: list[int]) -> dict[str, dict[str, float]]:
    """Shape and rows -> us of torch's product and of each tile that compiles."""
    import torch
    import torch.nn.functional as F

    from tpinfer.layers.skinny import device_timer
    from tpinfer.layers.triton_linear import (
        launches_dependent,
        skinny_product,
        split_space,
        tiles_for,
    )

    device = torch.device("cuda")
    timer, dependent = device_timer(device), launches_dependent(device)
    found: dict[str, dict[str, float]] = {}
    for name, (columns, inner) in SHAPES.items():
        weight = torch.randn(columns, inner, device=device, dtype=torch.bfloat16)
        space = split_space(columns, device)
        for rows in sizes:
            x = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
            calls: dict[str, Any] = {"torch": lambda x=x, weight=weight: F.linear(x, weight)}
            for tile in tiles_for(rows, columns):
                calls[str(tile)] = lambda tile=tile, x=x, weight=weight, space=space: (
                    skinny_product(x, weight, None, tile, space, dependent=dependent)
                )
            times = found[f"{name}, {rows} rows"] = {}
            for label, call in calls.items():
                try:
                    call()
                    times[label] = statistics.median(timer(call) for _ in range(REPEATS)) * 1e6
                except Exception as failure:  # a tile that does not fit this device
                    print(f"{name}, {rows} rows, {label}: {str(failure)[:100]}")
        del weight
    return found


def whole_step_us(dependent: bool) -> float:
    """A graph of all products of one row, with the norms, gates and additions inside them."""
    import torch

    from tpinfer.layers.skinny import SkinnyMatMul, SkinnyProducts, device_timer

    device = torch.device("cuda")
    torch.cuda.empty_cache()
    products = SkinnyProducts(device_timer(device), dependent)

    def bound(name: str) -> SkinnyMatMul:
        columns, inner = SHAPES[name]
        weight = torch.empty(columns, inner, device=device, dtype=torch.bfloat16).normal_(0, 0.01)
        made = products.bind(weight, None)
        assert isinstance(made, SkinnyMatMul)
        return made

    names = ("qkv", "out", "gate_up", "down")
    layers = [{name: bound(name) for name in names} for _ in range(NUM_LAYERS)]
    head = bound("head")
    residual = torch.randn(1, 4096, device=device, dtype=torch.bfloat16)
    norm = torch.ones(4096, device=device, dtype=torch.bfloat16), 1e-5

    def step() -> None:
        for layer in layers:
            qkv = layer["qkv"].normed(residual, norm)
            layer["out"].add_to(residual, qkv[:, :4096])
            layer["down"].add_to(residual, layer["gate_up"].gated(residual, norm))
        head.normed(residual, norm)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
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
