"""Quantities as people type them."""

from contextlib import suppress

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrd.cli.units import bytes_per_s, rate, seconds, setting, whole_ms, whole_s


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("unlimited", 0),
        ("1000", 1000),
        ("100MiB/s", 100 * 2**20),
        ("100mi", 100 * 2**20),
        ("100 MiB", 100 * 2**20),
        ("1.5G", 1_500_000_000),
        ("1Gbit/s", 125_000_000),
        ("1Mibit/s", 2**17),
    ],
)
def test_rates_are_read_with_their_units(text: str, expected: int) -> None:
    assert bytes_per_s(text) == expected


@pytest.mark.parametrize(
    "text", ["", "fast", "-1", "1e9", "10 parsecs", "1MiB/h", "NaN", "10Gbps", "1Mb/s"]
)
def test_what_is_no_rate_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(click.BadParameter, match="100MiB/s"):
        rate(text)


@pytest.mark.parametrize(
    ("text", "expected"), [("300", 300), ("300ms", 300), ("1.5s", 1500), ("1,5 s", 1500)]
)
def test_a_bare_number_is_in_the_unit_of_the_option(text: str, expected: int) -> None:
    assert whole_ms(text) == expected


def test_minutes_and_hours_are_understood() -> None:
    assert whole_s("10min") == 600
    assert whole_s("2h") == 7200
    assert seconds("1d", unit="s") == 86400


def test_what_is_no_duration_is_refused_with_an_example() -> None:
    with pytest.raises(click.BadParameter, match="10min"):
        whole_s("soon")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("memory_mib=2048", ("memory_mib", 2048)),
        ("debug=true", ("debug", True)),
        ("name=web=1", ("name", "web=1")),
        ("empty=", ("empty", "")),
        ("offset=-3", ("offset", -3)),
        ("version=1.0", ("version", "1.0")),
    ],
)
def test_settings_get_their_natural_type(text: str, expected: tuple[str, object]) -> None:
    key, value = setting(text)
    assert (key, value, type(value)) == (*expected, type(expected[1]))


@pytest.mark.parametrize("text", ["memory", "=1"])
def test_a_setting_without_key_or_value_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="key=value"):
        setting(text)


@given(st.text(max_size=30))
def test_no_text_breaks_the_reading(text: str) -> None:
    for read in (rate, whole_ms, whole_s, setting):
        with suppress(click.BadParameter):
            read(text)
