"""The direct engine's harvest and mover over the kernel's own dirty tracking, without any VMM.

What the mock device wrote is known bit for bit, for the tests play it; what the threads wrote is
known by what is in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator, Iterator, Mapping

import pytest

from migrd.core.bitmap import DirtyBitmap
from migrd.core.harvest_round import Tracker
from migrd.daemon import KERNEL_PARTS
from migrd.direct.manifest import Manifest
from migrd.direct.offer import OfferedHwpt, OfferedProcess, OfferedSource
from migrd.direct.receiver import Receiver
from migrd.direct.sender import Sender
from migrd.engine.dirty_ports import OnLoss
from migrd.engine.harvest import Harvest
from migrd.engine.threads import in_thread
from migrd.errors import MigrdError
from tests.contract.dirty_source import dirty_pages
from tests.lab.guest.direct_machine import Machine
from tests.lab.guest.raw import Iommufd as RawIommufd

MIGRATION_ID = "direct-on-the-mock"
HOST = "127.0.0.1"


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.close()


@contextlib.asynccontextmanager
async def harvested(
    machine: Machine, sources: list[OfferedSource] | None = None
) -> AsyncIterator[Harvest]:
    """Tracking is on, and all pages are pending."""
    made = await in_thread(KERNEL_PARTS.sources, sources or machine.sources())
    harvest = Harvest(machine.memory, made, on_loss=OnLoss.GIVE_UP)
    try:
        await harvest.start()
        yield harvest
    finally:
        await harvest.close()


class Owner:
    """In the place of the process that is to run the guest."""

    def __init__(self) -> None:
        self.fds: dict[int, int] = {}
        self.state = b""

    async def rebuild(self, manifest: Manifest, region_fds: Mapping[int, int]) -> None:
        self.close()
        self.fds = {region: os.dup(fd) for region, fd in region_fds.items()}

    async def take_device_data(self, device: str, chunk: bytes) -> None:
        raise AssertionError("there are no devices")

    async def load(self, state_fd: int | None) -> None:
        if state_fd is not None:
            self.state = os.pread(state_fd, 1 << 16, 0)

    def close(self) -> None:
        for fd in self.fds.values():
            os.close(fd)
        self.fds = {}


@contextlib.asynccontextmanager
async def transfer(machine: Machine, owner: Owner) -> AsyncIterator[tuple[Sender, Receiver]]:
    """Connected; the destination has made its memory."""
    receiver = Receiver(
        HOST,
        (0, 0),
        tls=None,
        peer_name=None,
        migration_id=MIGRATION_ID,
        epoch=1,
        owner=owner,
    )
    async with receiver:
        sender = Sender(
            machine.memory,
            machine.fds,
            address=receiver.address,
            channels=2,
            tls=None,
            peer_name=HOST,
            migration_id=MIGRATION_ID,
            epoch=1,
        )
        async with sender:
            await sender.connect(Manifest(machine.memory))
            yield sender, receiver


# ---- the harvest


async def test_each_round_has_exactly_what_devices_and_threads_wrote(machine: Machine) -> None:
    chance = random.Random(11)
    raw = RawIommufd(os.dup(machine.iommufd.fileno()))
    async with harvested(machine) as harvest:
        assert harvest.pending.count() == machine.memory.bytes // 4096
        for _ in range(12):
            harvest.pending.clear()
            by_dma, by_cpu = (machine.some_pages(chance, 600) for _ in range(2))
            await in_thread(machine.dma, by_dma)
            await in_thread(machine.cpu, by_cpu)
            told = await harvest.round()
            assert dirty_pages(harvest.pending) == sorted(by_dma | by_cpu)
            by_tracker = {one.tracker: one.dirty_pages for one in told.sources}
            assert by_tracker == {Tracker.IOMMU: len(by_dma), Tracker.PROCESS: len(by_cpu)}
            assert told.pending_pages == len(by_dma | by_cpu)
            for region in machine.memory.regions:
                left = await in_thread(raw.peek, machine.hwpt.id, region.gpa, region.length_bytes)
                assert left == 0, "what was told of is cleared"
    raw.close()


async def test_no_bit_is_lost_however_often_a_round_is_cancelled(machine: Machine) -> None:
    chance = random.Random(12)
    async with harvested(machine) as harvest:
        harvest.pending.clear()
        wrote: set[int] = set()
        cancelled = 0
        for number in range(40):
            pages = machine.some_pages(chance, 40)
            await in_thread(machine.dma if number % 2 else machine.cpu, pages)
            wrote |= pages
            reading = asyncio.create_task(harvest.round())
            await asyncio.sleep(chance.random() * 0.02)
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading
            cancelled += reading.cancelled()
        await harvest.round()
        assert dirty_pages(harvest.pending) == sorted(wrote)
    assert cancelled > 10


async def test_what_is_written_while_rounds_are_read_is_told_of(machine: Machine) -> None:
    """Two threads write without a pause; each page they changed is told of in some round."""
    told = DirtyBitmap(machine.memory.pages)
    before = {one: os.pread(fd, 1 << 25, 0) for one, fd in machine.fds.items()}
    async with harvested(machine) as harvest:
        harvest.pending.clear()
        machine.start_writing(seed=13)
        for _ in range(15):
            await harvest.round()
            harvest.pending.move_into(told)
        await in_thread(machine.stop_writing)
        await harvest.round()
        harvest.pending.move_into(told)
    copy = {}
    for region, content in before.items():
        copy[region] = os.memfd_create("before")
        os.write(copy[region], content)
    changed = await in_thread(machine.differences, copy)
    for fd in copy.values():
        os.close(fd)
    assert len(changed) > 200
    assert set(changed) <= set(dirty_pages(told))


# ---- the transfer


async def rounds(machine: Machine, harvest: Harvest, sender: Sender, count: int) -> None:
    for _ in range(count):
        await sender.send(harvest.pending, stable=False)
        await harvest.round()


async def last_round(machine: Machine, harvest: Harvest, sender: Sender) -> None:
    await in_thread(machine.stop_writing)
    await harvest.round()
    await sender.send(harvest.pending, stable=True)
    await sender.finish()


@pytest.mark.parametrize("blind_to", [None, OfferedHwpt, OfferedProcess])
async def test_memory_that_devices_and_threads_write_arrives_the_same(
    machine: Machine, blind_to: type[OfferedSource] | None
) -> None:
    """And would not, were one of the sources not read."""
    sources = [one for one in machine.sources() if blind_to is None or type(one) is not blind_to]
    owner = Owner()
    machine.start_writing(seed=14)
    async with (
        harvested(machine, sources) as harvest,
        transfer(machine, owner) as (sender, receiver),
    ):
        await rounds(machine, harvest, sender, 6)
        await in_thread(machine.let_write)
        await last_round(machine, harvest, sender)
        await receiver.loaded()
    different = await in_thread(machine.differences, owner.fds)
    assert bool(different) == (blind_to is not None)
    owner.close()


async def test_a_transfer_that_broke_is_made_anew_and_loses_nothing(machine: Machine) -> None:
    machine.start_writing(seed=15)
    first, second = Owner(), Owner()
    async with harvested(machine) as harvest:
        async with transfer(machine, first) as (sender, receiver):
            await rounds(machine, harvest, sender, 1)
            left = dirty_pages(harvest.pending)
            await receiver.close("the other host is gone")
            with pytest.raises(MigrdError):
                await sender.send(harvest.pending, stable=False)
            assert set(left) <= set(dirty_pages(harvest.pending)), "taken, but not delivered"
        async with transfer(machine, second) as (sender, receiver):
            harvest.pending.merge(machine.memory.full())
            await rounds(machine, harvest, sender, 2)
            await last_round(machine, harvest, sender)
            await receiver.loaded()
    assert await in_thread(machine.differences, second.fds) == []
    first.close()
    second.close()
