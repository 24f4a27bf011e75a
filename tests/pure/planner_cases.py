"""Small models, machines and step prices for the tests of the planner."""

from dataclasses import dataclass, replace

from tpinfer.config.huggingface import read_model_spec
from tpinfer.config.model import ModelSpec
from tpinfer.config.model_name import shape_or_model_directory
from tpinfer.config.topology import Topology
from tpinfer.config.topology_reader import load_topology, parse_topology
from tpinfer.costs.ops import StepAggregates
from tpinfer.planner.placement import EngineSettings
from tpinfer.planner.plan import Plan
from tpinfer.planner.precision import precision_named
from tpinfer.planner.predict import Planner
from tpinfer.planner.split import Split
from tpinfer.planner.workload import Slo, Workload
from tpinfer.scheduling.limits import SchedulerLimits

SETTINGS = EngineSettings(64)


@dataclass(frozen=True, slots=True)
class FlatPrices:
    """Steps that cost so much, and each of their tokens so much."""

    step_s: float = 1e-3
    token_s: float = 1e-6

    def step(self, sums: StepAggregates) -> Split:
        """Fixed time is memory, that of tokens compute; a little host."""
        return Split(self.token_s * sums.tokens, self.step_s, host=1e-4)


def shape(name: str) -> ModelSpec:
    """A well-known model."""
    return read_model_spec(shape_or_model_directory(name))


def two_layers(name: str) -> ModelSpec:
    """The same with two layers."""
    return replace(shape(name), num_layers=2)


def limits(**changes: int) -> SchedulerLimits:
    """A roomy cache, and few tokens a step."""
    found = SchedulerLimits(16, 4000, 16, 256, 4096, prefix_caching=False)
    return replace(found, **changes)


def machine(name: str = "dgx-h100", price: float | None = None) -> Topology:
    """A shipped one."""
    return replace(load_topology(name), usd_per_gpu_hour=price)


def four_hosts() -> Topology:
    """Four of the DGX on a fabric."""
    return parse_topology(
        """
version: 1
name: four
hosts:
  h0..h3:
    gpus: {sku: h100-sxm-80g, ids: 0..7}
    links: [{kind: NVL, ids: 0..7, bw: 450GB/s}]
fabric: [{kind: NET, type: ib, hosts: h0..h3, bw: 50GB/s}]
placement: {tp: 8}
cost: {per_gpu_hour: 2.50USD/h}
""",
        "four.yaml",
    )


def planner(
    model: str = "llama-3.1-8b",
    topology: Topology | None = None,
    work: Workload | None = None,
    precision: str = "bf16",
    slo: Slo | None = None,
) -> Planner:
    """Of a model on a DGX, for 16 requests at a time."""
    return Planner(
        shape(model),
        topology or machine(price=2.5),
        precision_named(precision),
        work or Workload(128, 32, 16),
        slo,
    )


def made_up(
    tp: int = 1,
    dp: int = 1,
    tpot_s: float = 0.01,
    ttft_s: float = 0.1,
    rate: float = 1000.0,
    **changes: object,
) -> Plan:
    """A plan with these numbers."""
    split = Split(tpot_s / 2, tpot_s / 4, tpot_s / 8, tpot_s / 16, tpot_s / 16)
    found = Plan(
        tp, 1, dp, SETTINGS, "memory",
        mode="datasheet", origin="a test", relative=(0.2, 0.25),
        ttft_s=ttft_s, tpot_s=tpot_s, output_tokens_per_s=rate,
        cost_per_mtok=2.5 * tp * dp / 3600 / rate * 1e6,
        ttft_split=Split(ttft_s / 2, queue=ttft_s / 2), tpot_split=split,
        kv_capacity_tokens=100_000 * tp * dp, weight_bytes=16_000_000_000 // tp, num_running=64.0,
    )  # fmt: skip
    return replace(found, **changes)  # pyright: ignore[reportArgumentType]
