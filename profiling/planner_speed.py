"""Time that the planner takes: a simulation of 10,000 requests, and 10,000 plans by closed form.

    python profiling/planner_speed.py

The requests (512 tokens in, 128 out, 64 in flight) go through the runtime's own scheduler, with the
steps of Llama-3.1-8B on one H100. The plans are all placements of a model on four DGX H100 hosts,
each with many engine settings. Prints seconds, and exits with 1 where a target is missed.
"""

import sys
import time
from dataclasses import replace

from tpinfer.config.huggingface import read_model_spec
from tpinfer.config.model_name import shape_or_model_directory
from tpinfer.config.topology import Topology
from tpinfer.config.topology_reader import load_topology, parse_topology
from tpinfer.planner.placement import EngineSettings
from tpinfer.planner.precision import precision_named
from tpinfer.planner.predict import Planner
from tpinfer.planner.search import estimate_all, search
from tpinfer.planner.workload import Workload

NUM_REQUESTS, NUM_PLANS = 10_000, 10_000
MOST_SIMULATION_S, MOST_PLANS_S = 20.0, 10.0
FOUR_HOSTS = """
version: 1
name: four-dgx-h100
hosts:
  h0..h3:
    gpus: {sku: h100-sxm-80g, ids: 0..7}
    links: [{kind: NVL, via: nvswitch, ids: 0..7, bw: 450GB/s}]
fabric: [{kind: NET, type: ib, rails: 8, hosts: h0..h3, bw: 50GB/s}]
placement: {tp: 8}
"""


def planner(model: str, topology: Topology, work: Workload) -> Planner:
    """Of a well-known shape in bf16."""
    spec = read_model_spec(shape_or_model_directory(model))
    return Planner(spec, topology, precision_named("bf16"), work)


def simulation_s() -> float:
    """One simulation, its step model included."""
    began = time.perf_counter()
    made = planner("llama-3.1-8b", load_topology("dgx-h100"), Workload(512, 128, 64))
    settings = EngineSettings(64)
    plan = made.simulate(made.fit((1, 1, 1), settings), settings, NUM_REQUESTS)
    took = time.perf_counter() - began
    print(
        f"{NUM_REQUESTS} requests simulated in {took:.2f} s: TTFT {1e3 * (plan.ttft_s or 0):.1f} "
        f"ms, TPOT {1e3 * (plan.tpot_s or 0):.2f} ms (target {MOST_SIMULATION_S:.0f} s)"
    )
    return took


def plans_s(model: str) -> float:
    """Seconds for 10,000 plans; where there are fewer, in proportion."""
    work = Workload(512, 128, 512)
    topology = parse_topology(FOUR_HOSTS, "four-dgx-h100.yaml")
    began = time.perf_counter()
    estimates, misfits = estimate_all(planner(model, topology, work), EngineSettings(512))
    took = time.perf_counter() - began
    count = len(estimates) + len(misfits)
    print(
        f"{model}: {count} plans ({len(misfits)} placements do not fit) in {took:.2f} s "
        f"(target {MOST_PLANS_S:.0f} s for {NUM_PLANS})"
    )
    began = time.perf_counter()
    found = search(planner(model, topology, replace(work)), EngineSettings(512))
    print(f"{model}: with {found.num_simulated} simulated {time.perf_counter() - began:.2f} s")
    return took * max(1.0, NUM_PLANS / count)


def main() -> int:
    """Measure and print."""
    is_met = simulation_s() <= MOST_SIMULATION_S
    for model in ("llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b"):
        is_met = plans_s(model) <= MOST_PLANS_S and is_met
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
