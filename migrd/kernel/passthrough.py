"""Asks devices what they can, and opens them for a VM (port `Passthrough`).

    probe   cdev ─┐                     open    cdevs, iommufds ─► KernelOpenDevices
        iommufd ─┴─ bind ─ ask ─ close  rejoin  a VMM's iommufds ──► │ hand_over: cdevs closed
                                                                     │ find_hwpts, peek
                                        VMM exits (pidfd) ──────────►┴ close

Rules
1. One owner: the kernel lets one descriptor bind a device. So a device that is open for a VM is
   never probed, and one that is being probed is opened only afterwards.
2. A device that does not answer holds up its probe for a limited time, and nobody else's. Its
   thread goes on and lets go of everything by itself; until then the device counts as hanging.
3. What was known before is not forgotten because it cannot be asked now.
4. A VMM's page tables are only peeked at (kernel.page_table.ForeignHwpt).
5. Open iommufds keep the guest's memory pinned: they are closed when the VMM's pidfd becomes
   readable, in a thread, for unpinning takes as long as there is memory.
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from migrd.core.devices import Device, DeviceKind, Unknown
from migrd.engine.device_ports import DirtyPeek, HwptRef
from migrd.engine.threads import in_thread
from migrd.errors import KernelBusy, KernelGone
from migrd.kernel.device_answers import Answers, ask, open_device, open_iommufd
from migrd.kernel.iommufd import DEVICE, Iommufd, numbers_in
from migrd.kernel.page_table import ForeignHwpt
from migrd.kernel.vfio import VfioDevice
from migrd.kernel.vfio_calls import LINUX, SystemCalls

PROBE_LIMIT_S: Final = 15.0
"""A function level reset takes up to a second; firmware that hangs takes for ever."""
_PROBES_AT_ONCE = 4
_THREADS = 2 * _PROBES_AT_ONCE  # room beside devices that do not answer


class KernelPassthrough:
    """`Passthrough` on this host's kernel. `close` when it is no longer used."""

    def __init__(
        self,
        *,
        iommufd_path: str | Path = DEVICE,
        system: SystemCalls = LINUX,
        probe_limit_s: float = PROBE_LIMIT_S,
        proc: str | Path = "/proc",
    ) -> None:
        self._iommufd_path = str(iommufd_path)
        self._system = system
        self._probe_limit_s = probe_limit_s
        self._proc = str(proc)
        self._slots = asyncio.Semaphore(_PROBES_AT_ONCE)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="probe")
        self._probing: dict[str, _Probe] = {}
        self._lent: set[str] = set()

    def close(self) -> None:
        """Probe no more. What is open for VMs stays theirs."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def probe(self, device: Device) -> Device:
        """See the port."""
        if device.kind is DeviceKind.EMULATED:
            return device
        if device.vfio_cdev is None:
            answers = Answers.none(
                Unknown.DRIVER_NOT_BOUND, "no VFIO driver with a character device is bound"
            )
            return answers.added_to(device)
        async with self._slots:
            answers = await self._answers(device)
        return answers.added_to(device)

    async def open(self, devices: Sequence[Device], iommufds: int) -> "KernelOpenDevices":
        """See the port."""
        opened = self._lend(devices)
        try:
            for device in devices:
                await self._probe_over(device.address)
            await in_thread(opened.fill, devices, iommufds, self._iommufd_path, self._system)
        except BaseException:
            await opened.close()
            raise
        return opened

    async def rejoin(self, devices: Sequence[Device], pid: int, pidfd: int) -> "KernelOpenDevices":
        """The iommufds of a VMM that has `devices` already, by copies of its descriptors: after a
        restart of this daemon, or for a VM that something else launched. In the order of the VMM's
        descriptors, and without device descriptors.

        Raises KernelDenied, KernelGone (no such process, or it has no iommufd), KernelBusy.
        """
        opened = self._lend(devices)
        try:
            await in_thread(opened.fill_from_process, pid, pidfd, self._proc, self._system)
        except BaseException:
            await opened.close()
            raise
        return opened

    def _lend(self, devices: Sequence[Device]) -> "KernelOpenDevices":
        addresses = [device.address for device in devices]
        for address in addresses:
            if address in self._lent or addresses.count(address) > 1:
                raise KernelBusy(
                    f"device {address} is open for a VM already: stop that VM, or choose another"
                    " device",
                    code="device_in_use",
                )
        self._lent.update(addresses)
        return KernelOpenDevices(addresses, self._lent.difference_update)

    async def _probe_over(self, address: str) -> None:
        probe = self._probing.get(address)
        if probe is not None and not await _ended(probe):
            raise KernelBusy(
                f"device {address} does not answer: a probe of it has not ended; look at the"
                " kernel's log",
                code="device_hangs",
            )

    async def _answers(self, device: Device) -> Answers:
        if device.address in self._lent:
            return Answers.none(Unknown.IN_USE, f"{device.address} is open for a VM")
        probe = self._probing.get(device.address)
        if probe is None:
            loop = asyncio.get_running_loop()
            work = partial(ask, device, self._iommufd_path, self._system)
            call = loop.run_in_executor(self._threads, work)
            probe = _Probe(call, loop.time() + self._probe_limit_s)
            self._probing[device.address] = probe
            call.add_done_callback(lambda _: self._probing.pop(device.address))
        if not await _ended(probe):
            return Answers.none(
                Unknown.PROBE_FAILED,
                f"{device.address} did not answer within {self._probe_limit_s:g} s",
            )
        return probe.call.result()


@dataclass(frozen=True)
class _Probe:
    """One that is going on, or that hangs."""

    call: "asyncio.Future[Answers]"
    deadline_s: float
    """On the event loop's clock."""


async def _ended(probe: _Probe) -> bool:
    """Has it ended within its limit? When cancelled it is waited for too: it lets go of what it
    has opened, and then the cancellation goes on."""
    loop = asyncio.get_running_loop()
    cancelled: asyncio.CancelledError | None = None
    while not probe.call.done() and (left_s := probe.deadline_s - loop.time()) > 0:
        try:
            await asyncio.wait([probe.call], timeout=left_s)
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        raise cancelled
    return probe.call.done()


# ---- opening


class KernelOpenDevices:
    """`OpenDevices` on this host's kernel."""

    def __init__(
        self, addresses: Iterable[str], give_back: Callable[[Iterable[str]], object]
    ) -> None:
        self._addresses = set(addresses)
        self._give_back = give_back
        self._iommufds: list[Iommufd] = []
        self._devices: dict[str, VfioDevice] = {}
        self._hwpts: dict[HwptRef, ForeignHwpt] = {}

    def fill(
        self, devices: Sequence[Device], iommufds: int, iommufd_path: str, system: SystemCalls
    ) -> None:
        """Open everything; blocks. After an error what was opened is there to be closed."""
        for _ in range(iommufds):
            self._iommufds.append(open_iommufd(iommufd_path, system))
        for device in devices:
            self._devices[device.address] = open_device(device, system)

    def fill_from_process(self, pid: int, pidfd: int, proc: str, system: SystemCalls) -> None:
        """Take copies of the iommufds of a process; blocks. After an error as in `fill`."""
        for number in numbers_in(pid, proc):
            self._iommufds.append(Iommufd.from_process(pidfd, number, system.ioctl))
        if not self._iommufds:
            raise KernelGone(f"process {pid} has no iommufd open", code="no_iommufd")

    @property
    def iommufds(self) -> Sequence[int]:
        """See the port. Empty after `close`."""
        return [iommufd.fileno() for iommufd in self._iommufds]

    @property
    def device_fds(self) -> Mapping[str, int]:
        """See the port. Empty after `hand_over`."""
        return {address: device.fd for address, device in self._devices.items()}

    async def hand_over(self) -> None:
        """See the port."""
        devices, self._devices = self._devices, {}
        await in_thread(_close_all, list(devices.values()))

    async def find_hwpts(self) -> Sequence[HwptRef]:
        """See the port. Raises KernelTooOld, KernelGone when closed."""
        self._hwpts = await in_thread(_foreign_hwpts, list(self._iommufds))
        return list(self._hwpts)

    async def peek(
        self, hwpt: HwptRef, iova: int, length_bytes: int, page_size_bytes: int
    ) -> DirtyPeek | None:
        """See the port. Raises KernelGone for one that the last `find_hwpts` did not find."""
        started_s = time.monotonic()
        found = await in_thread(self._foreign(hwpt).peek, iova, length_bytes, page_size_bytes)
        if found is None:
            return None
        dirty_pages = await in_thread(lambda: found.dirty_pages)
        return DirtyPeek(
            hwpt=hwpt,
            iova=iova,
            length_bytes=length_bytes,
            page_size_bytes=page_size_bytes,
            dirty_pages=dirty_pages,
            took_s=time.monotonic() - started_s,
        )

    async def is_mapped(self, hwpt: HwptRef, iova: int, length_bytes: int) -> bool:
        """See the port. Raises as `peek`."""
        return await in_thread(self._foreign(hwpt).is_wholly_mapped, iova, length_bytes)

    def _foreign(self, hwpt: HwptRef) -> ForeignHwpt:
        foreign = self._hwpts.get(hwpt)
        if foreign is None:
            raise KernelGone(
                f"page table {hwpt.hwpt_id} of iommufd {hwpt.iommufd} is not known",
                code="hwpt_gone",
            )
        return foreign

    def let_go_of(self, address: str) -> None:
        """See the port."""
        if address in self._addresses:
            self._addresses.discard(address)
            self._give_back([address])

    async def close_at_exit(self, pidfd: int) -> None:
        """See the port. Raises KernelGone for a descriptor that is not open."""
        await _readable(pidfd)
        await self.close()

    async def close(self) -> None:
        """See the port."""
        devices, self._devices = self._devices, {}
        iommufds, self._iommufds = self._iommufds, []
        self._hwpts = {}
        try:
            await in_thread(_close_all, [*devices.values(), *iommufds])
        finally:  # cancelled too: it waits until they are closed
            mine, self._addresses = self._addresses, set()  # they may be another VM's next
            self._give_back(mine)


def _close_all(opened: Sequence[VfioDevice | Iommufd]) -> None:
    """Devices first, so that their page tables are free when the iommufd goes."""
    for one in opened:
        one.close()


def _foreign_hwpts(iommufds: Sequence[Iommufd]) -> dict[HwptRef, ForeignHwpt]:
    found = {}
    for index, iommufd in enumerate(iommufds):
        objects = iommufd.find_objects()
        if objects.ioases:
            for hwpt_id in objects.tracking_hwpts:
                foreign = iommufd.foreign_hwpt(hwpt_id, objects.ioases)
                found[HwptRef(index, hwpt_id)] = foreign
    return found


async def _readable(pidfd: int) -> None:
    """Until the process has exited. On a duplicate: the loop knows one reader for a descriptor,
    and the caller may close its own."""
    try:
        fd = os.dup(pidfd)
    except OSError as cause:
        raise KernelGone(
            f"descriptor {pidfd} of a process is not open", errno=cause.errno or 0
        ) from cause
    loop = asyncio.get_running_loop()
    exited = asyncio.Event()
    try:
        loop.add_reader(fd, exited.set)
        try:
            await exited.wait()
        finally:
            loop.remove_reader(fd)
    finally:
        os.close(fd)
