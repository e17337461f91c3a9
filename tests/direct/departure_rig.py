"""A guest that leaves, all in this process: a scripted VMM, simulated sources, a real stream.

    ScriptedVmm ── hand-over ──► DirectVmm ── Sender ──► Receiver of the test

The sources are simulators, so that a test says who wrote what; the memory is real.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from migrd.core.facts import QemuStatus, TransferAddress, TransferSettings
from migrd.core.memory_map import PAGE_BYTES
from migrd.direct.guest import About
from migrd.direct.handoff_listener import HandoffListener
from migrd.direct.offer import OfferedRange
from migrd.direct.parts import KernelParts
from migrd.direct.receiver import Receiver
from migrd.direct.vmm import DirectOptions, DirectVmm
from migrd.engine.dirty_ports import DirtySource
from migrd.processes.process import Life, WatchedProcess
from tests.direct.stream_rig import EPOCH, ID, Owner, receiver
from tests.direct.vmms import until
from tests.fakes.dirty_source import SimSource
from tests.fakes.scripted_vmm import ScriptedVmm

SETTINGS = TransferSettings(
    downtime_limit_s=5.0,
    max_bandwidth_bytes_per_s=0,
    tls=False,
    migration_id=ID,
    epoch=EPOCH,
)


@dataclass
class Leaving:
    """A guest of 256 pages, and where it may go."""

    process: ScriptedVmm
    vmm: DirectVmm
    sources: list[SimSource]
    """Of the newest transfer."""
    owner: Owner
    there: Receiver

    async def set_out(self) -> None:
        await self.vmm.prepare_outgoing(SETTINGS, None)
        await self.vmm.start_outgoing(TransferAddress(*self.there.address))

    async def status(self, *wanted: QemuStatus) -> QemuStatus:
        found = self.vmm._look
        await until(lambda: found().qemu_status in wanted, 10)
        return found().qemu_status


MakeSource = Callable[[str, tuple[tuple[int, int], ...]], SimSource]


@asynccontextmanager
async def leaving(
    directory: Path, make: MakeSource = SimSource, owner: Owner | None = None
) -> AsyncIterator[Leaving]:
    made: list[SimSource] = []

    def source(_fd: int, ranges: Sequence[OfferedRange], name: str) -> DirtySource:
        covers = tuple((one.first_page, one.length_bytes // PAGE_BYTES) for one in ranges)
        made[:] = [make(name, covers)]
        return made[0]

    parts = KernelParts(source, _no_device, _no_device, _no_device)
    owner = owner or Owner()
    process = WatchedProcess(None, Life.ALIVE, os.pidfd_open(os.getpid()), is_ours=False)
    vmm = DirectVmm(About("guest", ""), process, parts, DirectOptions())
    listener = HandoffListener(directory / "direct.sock", on_client=vmm.attach)
    async with receiver(owner) as there, listener:
        with ScriptedVmm(directory / "direct.sock") as scripted:
            await until(lambda: vmm.is_reachable)
            try:
                yield Leaving(scripted, vmm, made, owner, there)
            finally:
                await vmm.close()
                process.close()


def _no_device(*_: object) -> NoReturn:
    raise AssertionError("there are no devices here")
