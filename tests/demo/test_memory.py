"""The comparison must find every planted fault, and pass what is right, on a real guest's RAM."""

import asyncio
import os
import random
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from migrd.demo.image import PAGE_BYTES, GuestImage, Pattern
from migrd.demo.memory import compare_range
from migrd.demo.proof import ProofFailed, heartbeats, prove_continuity, verify_memory
from tests.lab.bare_qemu import BareQemu, migrate, until

pytestmark = pytest.mark.real

MEMORY_MIB = 8
MEMORY_BYTES = MEMORY_MIB << 20
BASE = 2 << 20
GUEST = GuestImage(
    working_set_pages=300,
    cold_pages=50,
    pages_per_s=20_000,
    pattern=Pattern.HOT_SPOT,
    noise=True,
    base_bytes=BASE,
)
PLACES = {
    "the first byte": 0,
    "an unused byte of the stack's page": 0x5000,
    "the statistics page": 0x6800,
    "a constant of a cursor": 0x6088,
    "a parameter": 0x8018,
    "the code": 0x8400,
    "after the code": 0x8C00,
    "the interrupt table": 0xA204,
    "an unused interrupt": 0xA300,
    "the page tables": 0x10000 + 0x2000 + 3 * 8,
    "the last byte below 640 KiB": 0x9FFFF,
    "the first byte above 1 MiB": 0x100000,
    "just below the working set": BASE - 1,
    "a count of visits": BASE + 7,
    "a signature": BASE + 5 * PAGE_BYTES + 8,
    "the noise of a page": BASE + 77 * PAGE_BYTES + 1234,
    "the last byte of the working set": BASE + 300 * PAGE_BYTES - 1,
    "a cold page": BASE + 310 * PAGE_BYTES + 4095,
    "just after the cold pages": BASE + 350 * PAGE_BYTES,
    "the last byte": MEMORY_BYTES - 1,
}


@pytest.fixture
async def dump(qemu_binaries: dict[str, Path], short_tmp_path: Path, tmp_path: Path) -> Path:
    """The RAM of a guest that has run a while."""
    binary = qemu_binaries["7.2"]
    async with BareQemu(binary, short_tmp_path, GUEST, memory_mib=MEMORY_MIB) as qemu:
        await qemu.qmp("cont")
        await qemu.heartbeats_at_least(20)
        await qemu.qmp("stop")
        await qemu.save_memory(0, MEMORY_BYTES, tmp_path / "ram")
    return tmp_path / "ram"


def flip(path: Path, address: int) -> None:
    with path.open("r+b") as file:
        file.seek(address)
        byte = file.read(1)[0]
        file.seek(address)
        file.write(bytes([byte ^ 1 << address % 8]))


def compare(path: Path) -> None:
    compare_range(GUEST, path, 0, MEMORY_BYTES)


def complaint(path: Path) -> str | None:
    """The address at which the comparison finds the first difference."""
    try:
        compare(path)
    except ProofFailed as failure:
        found = re.search(r"address (0x[0-9a-f]+):", str(failure))
        return found and found[1]
    return None


def test_each_planted_fault_is_found_where_it_is(dump: Path) -> None:
    compare(dump)
    chooser = random.Random(1)
    anywhere = [chooser.randrange(0x100000, MEMORY_BYTES) for _ in range(40)]
    missed = []
    for address in [*PLACES.values(), *anywhere]:
        flip(dump, address)
        if complaint(dump) != hex(address):
            missed.append(hex(address))
        flip(dump, address)
    assert not missed
    compare(dump)


def test_a_page_that_is_one_round_old_is_found(dump: Path) -> None:
    page = BASE + 200 * PAGE_BYTES
    with dump.open("r+b") as file:
        file.seek(page)
        count = int.from_bytes(file.read(8), "little")
        assert count > 0
        file.seek(page)
        file.write((count - 1).to_bytes(8, "little"))
    with pytest.raises(ProofFailed, match=f"address {page:#x}: found"):
        compare(dump)


def test_two_pages_swapped_are_found(dump: Path) -> None:
    ram = bytearray(dump.read_bytes())
    first, second = (slice(BASE + n * PAGE_BYTES, BASE + (n + 1) * PAGE_BYTES) for n in (40, 41))
    ram[first], ram[second] = ram[second], ram[first]
    dump.write_bytes(ram)
    with pytest.raises(ProofFailed, match="memory differs first"):
        compare(dump)


def test_memory_without_the_guest_is_said_to_be_so(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(bytes(MEMORY_BYTES))
    with pytest.raises(ProofFailed, match="no lab guest"):
        compare(path)


def rewind(path: Path, visits: int) -> None:
    """Make the guest say that it is so many visits less far, outside its hot spot."""
    with path.open("r+b") as file:
        file.seek(0x60C0)
        count = int.from_bytes(file.read(8), "little")
        file.seek(0x60C0)
        file.write((count - visits).to_bytes(8, "little"))


def test_a_visit_in_progress_is_no_fault_but_only_on_the_page_that_is_next(dump: Path) -> None:
    """The guest may be stopped between writing a page and moving its cursor on."""
    rewind(dump, 1)
    compare(dump)
    rewind(dump, 1)
    assert complaint(dump) is not None


def ram_in(path: Path) -> tuple[str, ...]:
    """Arguments for a guest whose RAM is a file that others can read and write."""
    backend = f"memory-backend-file,id=ram,size={MEMORY_MIB}M,mem-path={path},share=on"
    return ("-object", backend, "-machine", "memory-backend=ram")


async def test_the_guest_itself_finds_a_page_that_was_changed_under_it(
    qemu_binary: Path, short_tmp_path: Path
) -> None:
    ram = short_tmp_path / "ram"
    async with BareQemu(
        qemu_binary,
        short_tmp_path,
        GUEST,
        memory_mib=MEMORY_MIB,
        arguments=ram_in(ram),
    ) as qemu:
        await qemu.qmp("cont")
        await qemu.heartbeats_at_least(20)
        await qemu.qmp("stop")
        flip(ram, BASE + 200 * PAGE_BYTES)
        await qemu.qmp("cont")

        async def has_noticed() -> bool:
            return heartbeats([qemu.serial])[-1].integrity_errors == 1

        await until(has_noticed, "the guest notices")
        await qemu.qmp("stop")
        with pytest.raises(ProofFailed, match="the guest found 1 pages changed"):
            prove_continuity([qemu.serial], switches=0)
        with pytest.raises(ProofFailed, match="found 1 pages changed, page 200 last"):
            await verify_memory(GUEST, MEMORY_BYTES, qemu.save_memory, short_tmp_path)


@pytest.mark.parametrize("pattern", Pattern)
async def test_each_pattern_is_predicted_byte_for_byte_after_a_move(
    pattern: Pattern, qemu_binary: Path, short_tmp_path: Path
) -> None:
    image = GuestImage(working_set_pages=3000, cold_pages=100, pattern=pattern, noise=True)
    async with (
        BareQemu(qemu_binary, short_tmp_path, image, name="source") as source,
        BareQemu(qemu_binary, short_tmp_path, image, name="dest", incoming=True) as destination,
    ):
        await source.qmp("cont")
        await source.heartbeats_at_least(20)
        await migrate(source, destination)
        await destination.heartbeats_at_least(20)
        await destination.qmp("stop")
        match = await verify_memory(image, 64 << 20, destination.save_memory, short_tmp_path)
        assert match.visits > 2000
        continuity = prove_continuity([source.serial, destination.serial], switches=1)
        assert continuity.blackouts_s[0] < 1.0


def thread_states(pid: int) -> set[str]:
    stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return {stat.rpartition(")")[2].split()[0] for stat in stats}


async def freeze(qemu: BareQemu) -> None:
    """Stop the process between any two instructions, and see all its threads stand still."""
    os.kill(qemu.pid, signal.SIGSTOP)

    async def stands_still() -> bool:
        return thread_states(qemu.pid) == {"T"}

    await until(stands_still, "all threads stop")


@pytest.mark.parametrize("pattern", Pattern)
async def test_a_guest_frozen_at_any_instant_is_predicted(
    pattern: Pattern, qemu_binary: Path, short_tmp_path: Path
) -> None:
    """SIGSTOP, unlike QEMU's own stop, comes in the middle of a visit too."""
    image = replace(GUEST, pattern=pattern, free_run=True)
    ram = short_tmp_path / "ram"
    chooser = random.Random(pattern.value)
    visits = []
    async with BareQemu(
        qemu_binary, short_tmp_path, image, memory_mib=MEMORY_MIB, arguments=ram_in(ram)
    ) as qemu:
        await qemu.qmp("cont")
        await qemu.heartbeats_at_least(3)
        for _ in range(30):
            await asyncio.sleep(chooser.uniform(0, 0.01))
            await freeze(qemu)
            progress = await asyncio.to_thread(compare_range, image, ram, 0, MEMORY_BYTES)
            os.kill(qemu.pid, signal.SIGCONT)
            visits.append(sum(progress.visits))
    assert visits == sorted(visits)
    assert visits[-1] > visits[0]  # it went on in between


async def test_ram_above_4_gib_is_compared_too(qemu_binary: Path, short_tmp_path: Path) -> None:
    image = GuestImage(
        working_set_pages=6000,
        pages_per_s=40_000,
        pattern=Pattern.RANDOM,
        noise=True,
        low_memory_end_bytes=32 << 20,  # 4096 pages below, the others from 4 GiB on
    )
    machine = "pc-i440fx-7.2,max-ram-below-4g=32M"
    async with BareQemu(qemu_binary, short_tmp_path, image, memory_mib=48, machine=machine) as qemu:
        await qemu.qmp("cont")
        await qemu.heartbeats_at_least(30)
        await qemu.qmp("stop")
        match = await verify_memory(image, 48 << 20, qemu.save_memory, short_tmp_path)
        assert match.visits > 6000


async def test_a_guest_of_256_mib_is_compared_quickly(
    qemu_binaries: dict[str, Path], short_tmp_path: Path
) -> None:
    image = GuestImage(working_set_pages=60_000, pages_per_s=50_000, noise=True)
    binary = qemu_binaries["10"]
    async with BareQemu(binary, short_tmp_path, image, memory_mib=256) as qemu:
        await qemu.qmp("cont")
        await qemu.heartbeats_at_least(10)
        await qemu.qmp("stop")
        match = await verify_memory(image, 256 << 20, qemu.save_memory, short_tmp_path)
        assert match.compared_bytes > 255 << 20
        assert match.took_s < 6  # 1.5 s on an idle machine
