"""QEMU to QEMU without migrd: what the lab itself must be able to do."""

from pathlib import Path

import pytest

from migrd.demo.image import GuestImage, Pattern
from migrd.demo.proof import prove_continuity, verify_memory
from tests.lab.bare_qemu import BareQemu, QmpError, migrate

pytestmark = pytest.mark.real

IMAGE = GuestImage(working_set_pages=2000, pattern=Pattern.RANDOM)


async def move_and_prove(
    source: BareQemu, destination: BareQemu, *, multifd_channels: int = 0
) -> None:
    await source.qmp("cont")
    await source.heartbeats_at_least(10)
    await migrate(source, destination, multifd_channels=multifd_channels)
    await destination.heartbeats_at_least(10)
    await destination.qmp("stop")
    directory = destination.qmp_path.parent
    await verify_memory(IMAGE, destination.memory_bytes, destination.save_memory, directory)
    prove_continuity([source.serial, destination.serial], switches=1)


@pytest.mark.parametrize(("first", "second"), [("7.2", "10"), ("10", "7.2")])
async def test_the_guest_moves_between_the_versions(
    first: str, second: str, qemu_binaries: dict[str, Path], short_tmp_path: Path
) -> None:
    async with (
        BareQemu(qemu_binaries[first], short_tmp_path, IMAGE, name="source") as source,
        BareQemu(
            qemu_binaries[second], short_tmp_path, IMAGE, name="destination", incoming=True
        ) as destination,
    ):
        await move_and_prove(source, destination)


@pytest.mark.parametrize("multifd_channels", [0, 2])
async def test_the_guest_moves_on_q35_over_one_and_several_channels(
    qemu_binary: Path, short_tmp_path: Path, multifd_channels: int
) -> None:
    machine = "pc-q35-7.2"
    async with (
        BareQemu(qemu_binary, short_tmp_path, IMAGE, name="source", machine=machine) as source,
        BareQemu(
            qemu_binary, short_tmp_path, IMAGE, name="there", machine=machine, incoming=True
        ) as destination,
    ):
        await move_and_prove(source, destination, multifd_channels=multifd_channels)


async def test_the_guest_moves_there_and_back(qemu_binary: Path, short_tmp_path: Path) -> None:
    taps = []
    async with BareQemu(qemu_binary, short_tmp_path, IMAGE, name="home") as home:
        taps.append(home.serial)
        await home.qmp("cont")
        await home.heartbeats_at_least(10)
        async with BareQemu(qemu_binary, short_tmp_path, IMAGE, name="away", incoming=True) as away:
            taps.append(away.serial)
            await migrate(home, away)
            await away.heartbeats_at_least(10)
            await home.kill()  # a QEMU takes one incoming migration in its life
            async with BareQemu(
                qemu_binary, short_tmp_path, IMAGE, name="back", incoming=True
            ) as back:
                taps.append(back.serial)
                await migrate(away, back)
                await back.heartbeats_at_least(10)
    assert len(prove_continuity(taps, switches=2).blackouts_s) == 2


async def test_a_qemu_that_cannot_start_says_why(qemu_binary: Path, short_tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="unsupported machine type"):
        await BareQemu(qemu_binary, short_tmp_path, IMAGE, machine="nonesuch").__aenter__()


async def test_a_refused_command_raises_what_qemu_says(
    qemu_binary: Path, short_tmp_path: Path
) -> None:
    async with BareQemu(qemu_binary, short_tmp_path, IMAGE) as qemu:
        with pytest.raises(QmpError, match="nonesuch"):
            await qemu.qmp("nonesuch")
