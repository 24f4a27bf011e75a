"""Quantities: the right factor for each unit, and no bare numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpinfer.config import units
from tpinfer.config.errors import ConfigError


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (units.parse_size, "80GiB", 80 * 2**30),
        (units.parse_size, "512 kB", 512e3),
        (units.parse_size, "7B", 7),
        (units.parse_rate, "450GB/s", 450e9),
        (units.parse_rate, "400Gb/s", 50e9),
        (units.parse_rate, "900GB/s bidir", 450e9),
        (units.parse_rate, "1.5TiB/s", 1.5 * 2**40),
        (units.parse_flops, "989TFLOPS", 989e12),
        (units.parse_flops, "1979TOPS", 1979e12),
        (units.parse_time, "3us", 3e-6),
        (units.parse_time, "3µs", 3e-6),
        (units.parse_time, "1.5 ms", 1.5e-3),
        (units.parse_price, "3.99USD/h", 3.99),
    ],
)
def test_values(parse, text, value):
    assert parse(text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (units.parse_size, "80"),
        (units.parse_size, "80Gb"),
        (units.parse_size, "GB"),
        (units.parse_size, "80GB/s"),
        (units.parse_size, "-1GB"),
        (units.parse_rate, "450"),
        (units.parse_rate, "450GB"),
        (units.parse_rate, "450Gbps"),
        (units.parse_rate, "0GB/s"),
        (units.parse_flops, "989T"),
        (units.parse_time, "3"),
        (units.parse_time, "3 moons"),
        (units.parse_price, "3EUR/h"),
    ],
)
def test_refused_with_the_text_and_a_remedy(parse, text):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert repr(text) in str(caught.value) and ";" in str(caught.value)


@given(st.floats(1, 1e17))
def test_formatting_reads_back(value):
    close = pytest.approx(value, rel=6e-3)
    assert units.parse_size(units.format_size(value)) == close
    assert units.parse_rate(units.format_rate(value)) == close
    assert units.parse_flops(units.format_flops(value)) == close


@given(st.floats(1e-9, 1e4))
def test_times_read_back(seconds):
    assert units.parse_time(units.format_time(seconds)) == pytest.approx(seconds, rel=6e-3)


def test_what_people_see():
    assert units.format_size(5_900_000) == "5.9 MB"
    assert units.format_rate(24e9) == "24 GB/s"
    assert units.format_time(3.2e-6) == "3.2 us"
    assert units.format_price(3.99) == "3.99 USD/h"
