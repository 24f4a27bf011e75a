"""Cliffs that published runs are known for come out of the datasheet alone, and of topology files.

Measured values are those of TensorRT-LLM's performance pages (0.17 to 1.0).
"""

import pytest

from tests.pure.planner_cases import machine, shape
from tpinfer.planner.placement import EngineSettings
from tpinfer.planner.point_model import PointModels
from tpinfer.planner.precision import precision_named
from tpinfer.planner.predict import Planner
from tpinfer.planner.published import Point
from tpinfer.planner.traits import Traits
from tpinfer.planner.workload import Workload

MODEL = "llama-3.1-70b"
MODELS = PointModels({MODEL: shape(MODEL)})
RUNS = {
    (128, 128): 30000, (128, 2048): 3000, (2048, 128): 3000, (2048, 2048): 1500,
    (5000, 500): 1500, (20000, 2000): 1000,
}  # fmt: skip
"""Requests of a run by (input, output) tokens."""


def tokens_per_s(device: str, precision: str, tp: int, lengths: tuple[int, int]) -> float:
    point = Point(
        device, "trtllm", "TRT-LLM", precision, MODEL, tp, 1, *lengths, None, RUNS[lengths], 1.0
    )
    return MODELS.value(point, Traits())


@pytest.mark.parametrize(
    ("device", "precision", "measured"),
    [
        ("l40s", "fp8", (0.96, 1.19, 0.99, 1.24, 1.04, 1.29)),
        ("a100-sxm-80g", "fp16", (1.73, 1.86, 1.67, 1.83, 1.77, 1.95)),
        ("h100-sxm-80g", "fp8", (1.32, 1.48, 1.48, 1.61, 1.53, 1.64)),
    ],
)
def test_eight_ranks_over_four(device: str, precision: str, measured: tuple[float, ...]) -> None:
    for lengths, gain in zip(RUNS, measured, strict=True):
        eight, four = (tokens_per_s(device, precision, tp, lengths) for tp in (8, 4))
        assert eight / four == pytest.approx(gain, rel=0.12), lengths


def test_one_card_starves_for_room_and_two_are_many_times_faster() -> None:
    """70B in fp8 on cards of 80 GB: 745 tokens a second on one, 5,822 on two."""
    one, two = (tokens_per_s("h100-sxm-80g", "fp8", tp, (128, 2048)) for tp in (1, 2))
    assert one == pytest.approx(745, rel=0.2) and two == pytest.approx(5822, rel=0.2)
    assert 7 < two / one < 9


def gain(topology: str, lengths: tuple[int, int]) -> float:
    """Of 8 ranks over 4, with as many requests as fit and the chunk of each."""
    work = Workload(*lengths, concurrency=1024)
    made = Planner(shape(MODEL), machine(topology), precision_named("fp8"), work)
    rates = []
    for sizes in ((8, 1, 1), (4, 1, 1)):
        settings = made.with_chunk(sizes, EngineSettings(1024))
        rates.append(made.estimate(made.fit(sizes, settings), settings).output_tokens_per_s or 0.0)
    return rates[0] / rates[1]


@pytest.mark.parametrize("lengths", RUNS)
def test_eight_cards_on_pcie_hardly_gain_and_on_nvlink_they_do(lengths: tuple[int, int]) -> None:
    assert 0.9 < gain("pcie-2numa", lengths) < 1.4
    assert 1.25 < gain("dgx-h100", lengths) < 1.9
