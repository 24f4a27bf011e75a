"""Measured all-reduces of known fabrics, as two curves each.

Fits of `min(a + b (n - 1) + bytes / B1, c + d (n - 1) + bytes / B2)` for n = 2, 4, 8 and 512 B to
512 MiB to the tables of github.com/ai-dynamo/aiconfigurator (engines' own all-reduce inside a CUDA
graph, and nccl-tests); mean errors of 6 to 10 %. Rates are kept as a share of the link's, so that
a topology with slower links gets slower collectives.
"""

from dataclasses import dataclass

from tpinfer.planner.collective_times import CollectiveTimes, Curve
from tpinfer.planner.datasheet import DATASHEETS


@dataclass(frozen=True, slots=True)
class Fit:
    """Microseconds, microseconds a peer, GB/s, of the short and of the long curve."""

    short: tuple[float, float, float]
    long: tuple[float, float, float]
    link_gbps: float
    """Rate of the link it was measured on, GB/s in one direction."""
    is_one_shot: bool
    """Whether the short curve reads every peer's whole message."""
    origin: str


_AIC = "tables of github.com/ai-dynamo/aiconfigurator"
FITS = {
    ("nvlink3", "nccl"): Fit((9.2, 1.8, 65), (36, 0, 196), 300, False, f"NCCL on A100, {_AIC}"),
    ("nvlink3", "vllm"): Fit((4.7, 0.2, 164), (11.4, 0.3, 189), 300, True, f"vLLM on A100, {_AIC}"),
    ("nvlink4", "nccl"): Fit((5.1, 1.6, 150), (28.3, 0.13, 353), 450, False, f"NCCL, H100, {_AIC}"),
    ("nvlink4", "vllm"): Fit((4.2, 0.08, 263), (9.6, 0, 329), 450, True, f"vLLM on H100, {_AIC}"),
    ("nvlink4", "sglang"): Fit(
        (2.3, 0.23, 313), (5.9, 0.4, 335), 450, True, f"SGLang, H100, {_AIC}"
    ),
    ("nvlink4", "trtllm"): Fit((2.7, 0.07, 279), (29, 0, 358), 450, True, f"TRT-LLM, H100, {_AIC}"),
    ("nvlink5", "nccl"): Fit((8.1, 2.5, 259), (28.8, 5.2, 640), 900, False, f"NCCL, B200, {_AIC}"),
    ("nvlink5", "vllm"): Fit((6.6, 0.09, 160), (19.5, 0, 588), 900, True, f"vLLM on B200, {_AIC}"),
    ("pcie4", "nccl"): Fit((4, 3.4, 12.8), (4, 3.4, 12.8), 32, False, "assumed: 0.4 of the link"),
    ("pcie5", "nccl"): Fit((4, 3.4, 25.6), (4, 3.4, 25.6), 64, False, f"NCCL, PCIe 5, {_AIC}"),
    ("xgmi", "nccl"): Fit((12, 2, 60), (30, 2, 300), 448, False, "assumed"),
}


def fabric_times(
    fabric: str, engine: str, num_ranks: int, link_bytes_per_s: float
) -> CollectiveTimes:
    """Collectives of `engine` over `num_ranks` devices of one host: its own fit, else another
    engine's on that fabric, else NCCL's."""
    if num_ranks == 1:
        return CollectiveTimes(1, (), origin="one rank")
    names = (engine, "vllm", "nccl")
    fit = next(FITS[fabric, name] for name in names if (fabric, name) in FITS)
    scale = link_bytes_per_s / (fit.link_gbps * 1e9)
    curves = tuple(
        Curve((a + b * (num_ranks - 1)) * 1e-6, rate * 1e9 * scale, one_shot)
        for (a, b, rate), one_shot in ((fit.short, fit.is_one_shot), (fit.long, False))
    )
    return CollectiveTimes(num_ranks, curves, 10e-6, link_bytes_per_s, fit.origin)


def fabric_of(sku: str | None) -> str | None:
    """The NVLink fabric that a card comes with, as `FITS` names it; None for others."""
    sheet = DATASHEETS.get(sku or "")
    return sheet.fabric if sheet and sheet.fabric.startswith("nvlink") else None


def nccl_times(num_ranks: int, bytes_per_s: float, has_switch: bool) -> CollectiveTimes:
    """An all-reduce inside one host by NCCL's own model of its protocols.

    Constants of NCCL 2.30's src/graph/tuning.cc: microseconds of the base and of an NVLink hop, and
    each protocol's part of the bandwidth; ring takes 2 (n - 1) hops. Against measured tables it is
    12 % off on H100 and H200, 25 % low on A100 and 30 % low on B200: it ranks, a probe measures.
    `has_switch`: NVLink SHARP adds in the switch, in 25 us and at the links' whole rate.
    """
    hops = 2 * (num_ranks - 1)
    attainable = bytes_per_s * _NCCL_LINK_SHARE
    curves = [
        Curve((base + hop * hops) * 1e-6, min(attainable * share, most))
        for base, hop, share, most in _NCCL_RING
    ]
    if has_switch and num_ranks > 2:
        curves.append(Curve(25e-6, attainable))
    return CollectiveTimes(
        num_ranks, tuple(curves), 10e-6, bytes_per_s, "NCCL's own model, not measured"
    )


_NCCL_LINK_SHARE = 0.8
"""20.6 of 25 GB/s a link of an H100, 20 of 25 on an A100."""
_NCCL_RING = (
    (6.6, 0.6, 0.5, 141e9),
    (14.0, 1.9, 0.92, float("inf")),
    (8.4, 3.4, 1.0, float("inf")),
)
"""LL, LL128, Simple: base us, us a hop, part of the bandwidth, and the most that it reaches."""
