"""A VMM that hands over: memory, a page table with dirty tracking, and an mtty behind it.

    python -S -m tests.lab.guest.direct_vmm TOLD DEVICE MIB      started by a launch profile

Two threads write its memory: one as the guest does, one as the device does (into the file, behind
the CPU's back, then marked in the mock IOMMU's page table by the selftest's ioctl). The device's
scratch register holds what the guest put there. What it is when it stands still is appended to
TOLD, a JSON object a line:

    booted    pid, register
    saved     checksum of memory, register, counters: all has been sent
    loaded    the same, of the process that was given the guest
    resumed   pid, register, state of the device

It imports little and is run without `site`: under TCG each module costs.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from migrd.direct.client import DeviceSource, DirectClient, GuestRegion, Vmm
from migrd.direct.messages import RangeMessage, SourceKind
from tests.lab.guest.raw import DIRTY_TRACKING, MIB, Iommufd, Vfio

GPA = 16 * MIB
PAGE = 4096
REGISTER = 0x5A
_SCRATCH = 7  # of the first UART, in BAR 0
_BETWEEN_S = 0.003


class Machine(Vmm):
    """The guest's memory, its device, and its counters."""

    def __init__(self, told: Path, node: Path, length_bytes: int) -> None:
        self._told = told
        self._length_bytes = length_bytes
        self._counts = {"cpu": 0, "dma": 0}
        self._chance = random.Random(5)
        self.iommufd, self.device = Iommufd(), Vfio(node)
        self._ioas = self.iommufd.ioas()
        dev_id = self.device.bind(self.iommufd)
        self._hwpt = self.iommufd.hwpt(dev_id, self._ioas, DIRTY_TRACKING)
        self.device.attach(self._hwpt)
        self._region: GuestRegion | None = None
        self.client: DirectClient | None = None

    def begin(self, *, is_incoming: bool) -> None:
        regions = []
        if not is_incoming:
            regions = [GuestRegion.create(id=0, gpa=GPA, length_bytes=self._length_bytes)]
            self.memory_arrived(regions)
            os.pwrite(self.device.fd, bytes([REGISTER]), _SCRATCH)
            self._tell("booted", pid=os.getpid(), register=self._register())
        dma = DeviceSource(
            SourceKind.HWPT,
            self.iommufd.fd,
            (RangeMessage(0, 0, GPA, self._length_bytes),),
            hwpt_id=self._hwpt,
        )
        self.client = DirectClient(
            self, regions=regions, device_sources=[dma], devices={"serial0": self.device.fd}
        )
        for write in (self._cpu, self._dma):
            threading.Thread(target=self._write_on, args=(write,), daemon=True).start()
        self.client.start()

    # ---- what the library asks

    def memory_arrived(self, regions: Sequence[GuestRegion]) -> None:
        [self._region] = regions
        self.iommufd.map_at(self._ioas, GPA, self._region.hva, self._length_bytes)

    def save_state(self) -> bytes:
        self._tell("saved", **self._all())
        return json.dumps(self._counts).encode()

    def load_state(self, state: bytes) -> None:
        self._counts = json.loads(state)
        self._tell("loaded", **self._all())

    def resume(self) -> None:
        told = {"pid": os.getpid(), "register": self._register(), "state": self.device.state()}
        self._tell("resumed", **told)

    # ---- who writes

    def _write_on(self, write: Callable[[int], None]) -> None:
        assert self.client is not None
        with self.client.gate.entered():
            while True:
                self.client.gate.checkpoint()
                write(self._chance.randrange(self._length_bytes // PAGE) * PAGE)
                time.sleep(_BETWEEN_S)

    def _cpu(self, offset: int) -> None:
        assert self._region is not None
        self._region.memory[offset : offset + 8] = self._chance.randbytes(8)
        self._counts["cpu"] += 1

    def _dma(self, offset: int) -> None:
        assert self._region is not None
        os.pwrite(self._region.fd, self._chance.randbytes(8), offset + 64)
        try:
            self.iommufd.make_dirty(self._hwpt, GPA + offset, PAGE)
        except OSError as error:
            if error.errno != errno.EINVAL:  # nobody tracks: the write is not noted
                raise
        self._counts["dma"] += 1

    def _register(self) -> int:
        return os.pread(self.device.fd, 1, _SCRATCH)[0]

    def _all(self) -> dict[str, int]:
        assert self._region is not None
        checksum = zlib.crc32(self._region.memory)
        return {"checksum": checksum, "register": self._register(), **self._counts}

    def _tell(self, what: str, **more: int) -> None:
        with self._told.open("a") as file:
            file.write(json.dumps({"what": what, **more}) + "\n")


def main(told: str, node: str, mib: str) -> None:
    machine = Machine(Path(told), Path(node), int(mib) * MIB)
    machine.begin(is_incoming=os.environ.get("MIGRD_INCOMING") == "1")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
