"""Clocks are sampled from a made-up driver and a made-up kernel, whole or broken; the file of the
samples comes back as it was, and damaged ones say nothing."""

import threading
import time
from itertools import count
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pure.fake_nvml import FakeDriver, Fields, nvswitch
from tpinfer.cli.topo_probe import describe_clocks
from tpinfer.config.clock_samples import (
    NO_REASON,
    REASON_WORDS,
    ClockSamples,
    clock_samples_path,
    describe_reasons,
    read_clock_samples,
    write_clock_samples,
)
from tpinfer.config.measured import Clocks
from tpinfer.machine.clocks import (
    ClockSampler,
    CpuClocks,
    DeviceLimits,
    GpuClocks,
    Reading,
    find_gpu,
    gpu_source,
    measured_clocks,
)

BUSY: Fields = {
    ("name", 3): "NVIDIA H100 80GB HBM3",
    ("compute_clock_mhz", 3): 1980,
    ("memory_clock_mhz", 3): 2619,
    ("compute_clock_now_mhz", 3): 1410,
    ("memory_clock_now_mhz", 3): 2619,
    ("clock_reasons", 3): 0x4 | 0x40,
    ("power_mw", 3): 698_500,
    ("power_limit_mw", 3): 700_000,
    ("temperature_c", 3): 71,
}


class Scripted:
    """Satisfies `ClockSource`: readings one after the other, the last one for ever."""

    limits = DeviceLimits("gpu", "made up", 2000, 3000, 700)

    def __init__(self, *readings: Reading) -> None:
        self._readings = list(readings)

    def read(self) -> Reading:
        return self._readings.pop(0) if len(self._readings) > 1 else self._readings[0]


def sampled(*readings: Reading, **more: int) -> ClockSamples:
    """Of one reading a millisecond."""
    moments = count(1_000_000, 1_000_000)
    sampler = ClockSampler(Scripted(*readings), now_ns=lambda: next(moments), **more)
    for _ in readings:
        sampler.sample()
    return msgspec.structs.replace(sampler.samples(), clock_pairs=[(5, 7)])


def test_a_card_that_says_all():
    clocks = GpuClocks(FakeDriver(BUSY), 3)
    assert clocks.limits == DeviceLimits("gpu", "NVIDIA H100 80GB HBM3", 1980, 2619, 700.0)
    reasons = ("sw_power_cap", "hw_thermal_slowdown")
    assert clocks.read() == Reading(1410, 2619, 698.5, 71, reasons)
    assert describe_reasons(reasons) == "power cap and thermal"


@pytest.mark.parametrize("gone", sorted(BUSY, key=str))
def test_any_field_may_be_missing_or_broken(gone: tuple[str | int, ...]):
    whole = GpuClocks(FakeDriver(BUSY), 3)
    for broken in ({k: v for k, v in BUSY.items() if k != gone}, {**BUSY, gone: "[N/A]"}):
        clocks = GpuClocks(FakeDriver(broken), 3)
        pairs = [(clocks.limits, whole.limits), (clocks.read(), whole.read())]
        changed = {
            (name, getattr(one, name))
            for one, other in pairs
            for name in one.__slots__
            if getattr(one, name) != getattr(other, name)
        }
        device = "GPU 3" if gone not in broken else "[N/A]"
        assert [value for _, value in changed] == [device if gone[0] == "name" else None]


def test_a_card_that_says_nothing():
    clocks = GpuClocks(FakeDriver({}), 0)
    assert clocks.limits == DeviceLimits("gpu", "GPU 0", None)
    assert clocks.read() == Reading()


def test_zeros_are_broken_fields_but_no_reason_is_an_answer():
    zeros: Fields = {key: 0 if key[0] != "name" else "GPU" for key in BUSY}
    assert GpuClocks(FakeDriver(zeros), 3).read() == Reading(reasons=())


def test_every_bit_has_words():
    driver = FakeDriver({("clock_reasons", 0): 0x1FF})
    names = GpuClocks(driver, 0).read().reasons
    assert names is not None and len(names) == 9
    assert set(names) <= set(REASON_WORDS)
    assert describe_reasons(names[:1]) == describe_reasons(None) == NO_REASON


def test_the_card_of_a_rank_is_found_by_uuid_then_by_bus():
    driver = FakeDriver(nvswitch())
    assert find_gpu(driver, "00000005-0000", None) == 5
    assert find_gpu(driver, "GPU-00000002-0000", 0x17) == 2
    assert find_gpu(driver, "a slice's", 0x13) == 3
    assert find_gpu(driver, "", 0x99) is None
    assert find_gpu(FakeDriver({}), "GPU-1", 0) is None


def test_the_source_of_what_torch_describes():
    class Properties:
        uuid = "00000004-0000"

    source, _ = gpu_source(FakeDriver(nvswitch()), Properties())
    assert source is not None and source.limits.device == "NVIDIA H100 80GB HBM3"
    alone, _ = gpu_source(FakeDriver({("count",): 1}), object())
    assert alone is not None and alone.read() == Reading()
    assert gpu_source(FakeDriver({("count",): 2}), object())[0] is None


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_cores_of_a_rank(tmp_path: Path):
    root = tmp_path / "sys/devices/system/cpu"
    for core, now in enumerate((800_000, 3_100_000, 2_000_000)):
        put(root / f"cpu{core}/cpufreq/scaling_cur_freq", f"{now}\n")
        put(root / f"cpu{core}/cpufreq/cpuinfo_max_freq", "3900000\n")
        put(root / f"cpu{core}/cpufreq/scaling_max_freq", "3900000\n")
        put(root / f"cpu{core}/thermal_throttle/core_throttle_count", "7\n")
    clocks = CpuClocks((0, 1), tmp_path)
    assert clocks.says_something
    assert clocks.limits == DeviceLimits("cpu", "CPU", 3900.0)
    assert clocks.read() == Reading(3100.0, reasons=())
    put(root / "cpu1/thermal_throttle/core_throttle_count", "9\n")
    assert clocks.read().reasons == ("cpu_thermal",)
    assert clocks.read().reasons == ()
    put(root / "cpu1/cpufreq/scaling_cur_freq", "<unknown>\n")
    assert clocks.read().compute_mhz == 800.0
    put(root / "cpu0/cpufreq/scaling_max_freq", "2000000\n")
    assert CpuClocks((0, 1), tmp_path).read().reasons == ("cpu_frequency_limit",)


def test_a_kernel_without_the_files(tmp_path: Path):
    clocks = CpuClocks(range(4), tmp_path)
    assert not clocks.says_something
    assert clocks.read() == Reading()


def test_few_of_many_cores_are_looked_at(tmp_path: Path):
    root = tmp_path / "sys/devices/system/cpu"
    for core in range(64):
        put(root / f"cpu{core}/cpufreq/scaling_cur_freq", f"{core + 1}000\n")
    assert CpuClocks(range(64), tmp_path).read().compute_mhz == 49.0


def test_the_thread_samples_and_ends():
    source = Scripted(Reading(1500, reasons=()))
    sampler = ClockSampler(source, rank=2, period_s=0.002)
    before = threading.active_count()
    with sampler:
        time.sleep(0.05)
    assert threading.active_count() == before
    samples = sampler.samples()
    assert samples.is_sound() and len(samples) >= 3
    assert samples.rank == 2 and set(samples.compute_mhz) == {1500}
    (first, _), (last, _) = samples.clock_pairs
    assert first <= samples.monotonic_ns[0] <= samples.monotonic_ns[-1] <= last


@pytest.mark.parametrize("num_samples", [1, 16, 17, 100, 1000])
def test_a_long_recording_is_thinned_and_keeps_its_ends(num_samples: int):
    readings = [Reading(1000 + i) for i in range(num_samples)]
    samples = sampled(*readings, most_samples=16)
    assert samples.is_sound() and len(samples) <= 16
    assert samples.monotonic_ns[0] == 1_000_000
    assert samples.monotonic_ns[-1] > num_samples * 1_000_000 / 2
    assert samples.period_ns == 20_000_000 * 2 ** (
        (samples.period_ns // 20_000_000).bit_length() - 1
    )


def test_what_the_measured_layer_keeps():
    samples = sampled(
        Reading(345, 2619, reasons=("gpu_idle",)),
        Reading(1400, 2619, reasons=("sw_power_cap",)),
        Reading(1501, 2619, reasons=()),
        Reading(1700, None, reasons=("hw_thermal_slowdown", "sw_power_cap")),
    )
    reasons = ("sw_power_cap", "hw_thermal_slowdown")
    assert measured_clocks(samples) == Clocks(1501, 2619, reasons, 2000, 3000)
    assert measured_clocks(sampled(Reading())) == Clocks(None, None, (), 2000, 3000)


@pytest.mark.parametrize(
    ("clocks", "text"),
    [
        (None, "nothing here tells them"),
        (Clocks(), "no frequency told"),
        (Clocks(3100, most_compute_mhz=3900), "compute 3100 of 3900 MHz"),
        (Clocks(throttled_by=("cpu_thermal",)), "no frequency told, held back by thermal"),
        (
            Clocks(1410, 2619, ("sw_power_cap", "hw_thermal_slowdown"), 1980),
            "compute 1410 of 1980 MHz, memory 2619 MHz, held back by power cap and thermal",
        ),
    ],
)
def test_what_the_probe_prints(clocks: Clocks | None, text: str):
    assert describe_clocks(clocks) == text


numbers = st.none() | st.floats(1, 1e5, allow_nan=False)
readings = st.builds(
    Reading, numbers, numbers, numbers, numbers,
    st.none() | st.lists(st.sampled_from(list(REASON_WORDS)), unique=True).map(tuple),
)  # fmt: skip


@given(st.lists(readings, max_size=5))
def test_samples_come_back_from_the_file(taken: list[Reading]):
    samples = sampled(*taken)
    encoded = msgspec.json.encode(samples)
    assert msgspec.json.decode(encoded, type=ClockSamples) == samples
    assert samples.is_sound()
    assert set(samples.busy()) <= set(range(len(samples)))


def test_files_that_say_nothing(tmp_path: Path):
    path = clock_samples_path(tmp_path, 1)
    assert path.name == "rank1.clocks.json"
    samples = sampled(Reading(5), Reading(6))
    write_clock_samples(samples, path)
    assert read_clock_samples(path) == samples
    wrong = [
        msgspec.structs.replace(samples, format_version=99),
        msgspec.structs.replace(samples, compute_mhz=[1.0]),
        msgspec.structs.replace(samples, monotonic_ns=[9, 9]),
        msgspec.structs.replace(samples, clock_pairs=[]),
        msgspec.structs.replace(samples, period_ns=0),
    ]
    for one in wrong:
        write_clock_samples(one, path)
        assert read_clock_samples(path) is None
    for content in (b"", b"[]", b"\xff", b'{"rank": 0}', b"[" * 100_000):
        path.write_bytes(content)
        assert read_clock_samples(path) is None
    assert read_clock_samples(tmp_path / "none") is None
