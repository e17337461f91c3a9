"""What QEMU's rounded rate says of the bytes, and where one number stands for several."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from migrd.core.dma_rate import DmaRate, RateQuality
from migrd.core.rate_reading import (
    GIB,
    MIB,
    Figure,
    RateReading,
    headline,
    of_bitmap,
    of_devices,
    of_page_sampling,
    pages_per_gib,
)

TOTAL = 4 * GIB


def as_qemu_says(hits: int, samples: int, window_s: float, total_bytes: int = TOTAL) -> int:
    """migration/dirtyrate.c, update_dirtyrate: whole numbers all the way."""
    return hits * (total_bytes // MIB) * 1000 // (samples * round(window_s * 1000))


@settings(deadline=None)
@given(st.integers(0, 2048), st.sampled_from([0.25, 1.0, 4.0]))
def test_the_share_that_was_hit_is_within_the_interval(hits: int, window_s: float) -> None:
    mib_per_s = as_qemu_says(hits, 2048, window_s)
    figure = of_page_sampling(mib_per_s, window_s=window_s, samples=2048, total_bytes=TOTAL)
    assert figure.value is not None
    assert figure.high is not None
    assert 0 <= figure.low <= figure.value <= figure.high <= TOTAL
    assert figure.low <= hits * TOTAL / 2048 <= figure.high


def test_nineteen_of_twenty_intervals_hold_the_truth() -> None:
    chance, held, tried = random.Random(1), 0, 0
    for share in (0.001, 0.004, 0.02, 0.1):
        for _ in range(150):
            hits = sum(chance.random() < share for _ in range(1024))
            figure = of_page_sampling(
                as_qemu_says(hits, 1024, 1.0), window_s=1.0, samples=1024, total_bytes=TOTAL
            )
            assert figure.high is not None
            held += figure.low <= share * TOTAL <= figure.high
            tried += 1
    assert held >= 0.93 * tried


def test_no_hit_is_no_proof_of_silence() -> None:
    figure = of_page_sampling(0, window_s=1.0, samples=512, total_bytes=GIB)
    assert figure.value == figure.low == 0
    assert figure.high is not None
    assert figure.high >= 3 * GIB / 512


def test_a_bitmap_leaves_only_the_rounding() -> None:
    assert of_bitmap(7, window_s=2.0) == Figure(15 * MIB, 14 * MIB, 16 * MIB)
    assert of_bitmap(0, window_s=2.0) == Figure(0, 0, 2 * MIB)


@settings(deadline=None)
@given(st.integers(1, 24 << 40))
def test_about_as_many_pages_are_sampled_as_wanted_within_what_qemu_takes(total: int) -> None:
    per_gib = pages_per_gib(total, wanted=2048, least=128, most=4096)
    assert 128 <= per_gib <= 4096
    if GIB <= total <= 16 * GIB:
        assert 2048 <= per_gib * total / GIB <= 2048 * 1.1
    assert pages_per_gib(None, wanted=2048, least=128, most=4096) == 128


def dma(pages_per_s: float | None, quality: RateQuality = RateQuality.MEASURED) -> DmaRate:
    low, high = (None, None) if pages_per_s is None else (pages_per_s / 2, pages_per_s * 2)
    return DmaRate(quality, 4096, GIB, GIB, 1.0, pages_per_s, low, high)


def test_devices_are_added_up_where_something_is_proven() -> None:
    silent = dma(None, RateQuality.UNPROVEN)
    both = of_devices([dma(100.0), silent, dma(50.0)], cost_s=0.01)
    assert both.rate == Figure(150 * 4096, 75 * 4096, 300 * 4096)
    assert both.cost_s == 0.01
    none = of_devices([silent], cost_s=0.01)
    assert (none.rate, none.why) == (None, "unproven")
    assert of_devices([], cost_s=0).why == "nothing_mapped"


def test_the_window_nearest_to_a_second_stands_for_all() -> None:
    figure = Figure(1.0, 0.0, 2.0)
    short, middle, long = (RateReading(s, 4096, figure) for s in (0.25, 1.0, 4.0))
    unknown = RateReading(1.0, 4096, None)
    assert headline([short, unknown, middle, long]) == middle
    assert headline([unknown, long, short]) == short
    assert headline([unknown]) is None
