"""Figures for people, and foreign text made harmless."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrd.cli.text import ago, printable, rate, size, span, word


@given(st.text(st.characters()))
def test_no_printable_text_can_steer_a_terminal(text: str) -> None:
    shown = printable(text)
    assert all(unicodedata.category(c)[0] not in "CZ" or c == " " for c in shown)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126)))
def test_plain_text_is_shown_as_it_is(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x9b31m", "\\x9b31m"),
        ("a\nb\tc\rd", "a\\nb\\tc\\rd"),
        ("a\u202eb", "a\\u202eb"),
        ("a\u2028b", "a\\u2028b"),
        ("\ud800", "\\ud800"),
        ("\U000e0001", "\\U000e0001"),
        ("no\u00a0break", "no break"),
        ("é日本😀", "é日本😀"),
    ],
)
def test_what_could_steer_is_written_out(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_endless_text_is_cut_and_says_so() -> None:
    assert printable("x" * 10_000).endswith("… (10000 characters)")


@pytest.mark.parametrize(
    ("amount", "shown"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (117 * 2**20, "117 MiB"),
        (2**30 - 1, "1.0 GiB"),
        (2**60, "1024 PiB"),
    ],
)
def test_sizes_have_binary_units(amount: float | None, shown: str) -> None:
    assert size(amount) == shown


def test_a_rate_says_per_second() -> None:
    assert rate(117 * 2**20) == "117 MiB/s"
    assert rate(None) == "-"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "-"),
        (0, "0 ms"),
        (0.0002, "0.2 ms"),
        (0.042, "42 ms"),
        (0.9996, "1.00 s"),
        (1.239, "1.24 s"),
        (9.999, "10.0 s"),
        (59.96, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.7, "1 h 00 min"),
        (3600 * 3.12, "3 h 07 min"),
        (86400 * 2 + 3600 * 4, "2 d 4 h"),
    ],
)
def test_durations_are_short_and_never_show_sixty_seconds(
    seconds: float | None, shown: str
) -> None:
    assert span(seconds) == shown


@pytest.mark.parametrize(
    ("passed_s", "shown"),
    [(3, "3 s ago"), (64, "1 min ago"), (7300, "2 h ago"), (90_000, "1 d ago"), (-5, "0 s ago")],
)
def test_a_moment_is_told_as_how_long_ago(passed_s: float, shown: str) -> None:
    assert ago(1000.0, 1000.0 + passed_s) == shown


def test_codes_become_words_and_stay_harmless() -> None:
    assert word("rolled_back") == "rolled back"
    assert word("\x1b_x") == "\\x1b x"
