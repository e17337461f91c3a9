import asyncio
import shutil
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from migrd.demo.errors import ImageError
from migrd.demo.image import ROM_BYTES, GuestImage, Pattern
from migrd.demo.memory import visit_order
from migrd.demo.proof import heartbeats
from tests.lab.bare_qemu import BareQemu


@pytest.mark.parametrize("pages_per_s", [1, 19, 20, 700, 1000, 1001, 1500, 9999, 250_000])
def test_the_pace_asked_for_is_the_pace_of_its_ticks(pages_per_s: int) -> None:
    guest = GuestImage(pages_per_s=pages_per_s)
    pages_per_tick, reload = guest.pace
    assert 1 <= reload <= 65535
    asked = max(19, pages_per_s)  # the slowest tick of the timer
    assert pages_per_tick * guest.ticks_per_s == pytest.approx(asked, rel=0.002)


def test_a_burst_works_faster_to_keep_the_mean_pace() -> None:
    guest = GuestImage(pages_per_s=10_000, pattern=Pattern.BURST, burst_on_s=0.25, burst_period_s=1)
    assert guest.pace[0] * guest.ticks_per_s == pytest.approx(40_000, rel=0.002)


@pytest.mark.parametrize(
    ("parameters", "complaint"),
    [
        ({"working_set_pages": -1}, "working_set_pages is negative"),
        ({"pages_per_s": -5}, "pages_per_s is negative"),
        ({"heartbeat_interval_s": 0}, r"heartbeat_interval_s outside 0.001\.\.10"),
        ({"base_bytes": 4096}, "base_bytes below 1 MiB"),
        ({"pattern": Pattern.HOT_SPOT, "working_set_pages": 1}, "hot spot needs"),
        ({"burst_on_s": 2.0}, "burst_on_s outside"),
        ({"hot_spot_pages_percent": 100}, "hot_spot_pages_percent outside"),
    ],
)
def test_a_parameter_out_of_range_is_refused(parameters: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ImageError, match=complaint):
        GuestImage(**parameters)


def test_the_rom_ends_with_the_reset_vector_and_begins_with_the_guest() -> None:
    guest = GuestImage(working_set_pages=77)
    rom = guest.rom()
    assert len(rom) == ROM_BYTES
    assert rom.startswith(guest.code())
    assert rom[-16] == 0xEA  # a far jump, at the address where the processor starts


def test_the_guest_is_assembled_once_and_kept_outside_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = GuestImage().rom()
    assert len(list((tmp_path / "migrd" / "guest").iterdir())) == 2

    def no_tools(*_: object, **__: object) -> None:
        raise AssertionError("assembled again")

    monkeypatch.setattr(subprocess, "run", no_tools)
    assert GuestImage().rom() == first


def test_without_a_place_to_keep_it_the_guest_is_assembled_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = GuestImage().rom()
    (tmp_path / "migrd").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert GuestImage().rom() == expected


def test_without_binutils_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ImageError, match="install binutils"):
        GuestImage().rom()


@pytest.mark.parametrize("pages", [1, 2, 3, 5, 64, 1000, 4097])
def test_a_random_round_visits_each_page_once_and_each_round_differs(pages: int) -> None:
    orders = [visit_order(pages, generation, is_random=True) for generation in range(4)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(pages))
    if pages >= 64:
        assert not np.array_equal(orders[0], orders[1])
        # Random, not merely shuffled in blocks: neighbours in time are far apart in memory.
        steps = np.abs(np.diff(orders[0]))
        assert steps.mean() == pytest.approx(pages / 3, rel=0.25)


@pytest.mark.real
async def test_the_guest_counts_at_the_pace_asked_for(
    qemu_binary: Path, short_tmp_path: Path
) -> None:
    guest = GuestImage(working_set_pages=500, pages_per_s=2000, heartbeat_interval_s=0.02)
    async with BareQemu(qemu_binary, short_tmp_path, guest) as qemu:
        await qemu.qmp("cont")
        await qemu.heartbeats_at_least(40)
        beats = heartbeats([qemu.serial])
    assert [beat.sequence for beat in beats] == list(range(1, len(beats) + 1))
    assert {beat.integrity_errors for beat in beats} == {0}
    # In the guest's own time the pace is exact, whatever this machine had to do meanwhile,
    # but for ticks that came in heaps and were not made up.
    for before, after in pairwise(beats):
        assert after.dirtied_pages - before.dirtied_pages <= 2 * (after.ticks - before.ticks)
    last = beats[-1]
    assert last.dirtied_pages == pytest.approx(2 * last.ticks, rel=0.2)
    assert last.generation == last.dirtied_pages // 500


@pytest.mark.real
async def test_a_burst_has_rests(qemu_binary: Path, short_tmp_path: Path) -> None:
    guest = GuestImage(pages_per_s=5000, pattern=Pattern.BURST, burst_on_s=0.1, burst_period_s=0.4)
    async with BareQemu(qemu_binary, short_tmp_path, guest) as qemu:
        await qemu.qmp("cont")
        await qemu.heartbeats_at_least(80)
        beats = heartbeats([qemu.serial])
    still = sum(before.dirtied_pages == after.dirtied_pages for before, after in pairwise(beats))
    assert 0.5 * len(beats) < still < 0.95 * len(beats)


@pytest.mark.real
async def test_a_free_running_guest_outruns_every_pace(
    qemu_binary: Path, short_tmp_path: Path
) -> None:
    guest = GuestImage(working_set_pages=2000, pages_per_s=100, free_run=True)
    async with BareQemu(qemu_binary, short_tmp_path, guest) as qemu:
        await qemu.qmp("cont")
        await qemu.heartbeats_at_least(50)
        last = heartbeats([qemu.serial])[-1]
    assert last.dirtied_pages > 50_000
    assert last.integrity_errors == 0


@pytest.mark.real
async def test_a_rom_made_by_the_fixture_boots(
    lab_guest: Callable[..., Path], qemu_binary: Path, short_tmp_path: Path
) -> None:
    rom = await asyncio.to_thread(lab_guest, working_set_pages=10, heartbeat_interval_s=0.05)
    async with BareQemu(
        qemu_binary,
        short_tmp_path,
        GuestImage(),
        machine="pc-q35-7.2",
        arguments=("-bios", str(rom)),  # the later one counts
    ) as qemu:
        await qemu.qmp("cont")
        await qemu.heartbeats_at_least(3)
        assert heartbeats([qemu.serial])[-1].integrity_errors == 0
