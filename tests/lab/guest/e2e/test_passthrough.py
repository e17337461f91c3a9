"""Devices behind an IOMMU that tracks, asked and opened through the port, on the real kernel."""

import asyncio
import errno
import mmap
import os
import subprocess
import sys

import pytest

from migrd.core.devices import Device, DeviceKind, Unknown
from migrd.engine.device_ports import HwptRef
from migrd.engine.threads import in_thread
from migrd.errors import KernelRejected
from migrd.kernel.iommufd import Iommufd
from migrd.kernel.passthrough import KernelPassthrough
from migrd.kernel.vfio import VfioDevice
from tests.lab.guest import raw

PAGE = mmap.PAGESIZE
LENGTH = 1024 * PAGE
GENEROUS_S = 120.0


def device_at(made: raw.Mtty) -> Device:
    return Device(address=made.sysfs.name, kind=DeviceKind.VFIO_MDEV, vfio_cdev=str(made.node))


async def test_the_bind_tells_which_iommu_tracks() -> None:
    passthrough = KernelPassthrough()
    with raw.mtty() as can, raw.mtty(tracked=False) as cannot:
        probed = [await passthrough.probe(device_at(made)) for made in (can, cannot)]
        assert [one.iommu_dirty_tracking.is_yes for one in probed] == [True, False]
        assert [one.iommu_dirty_tracking.is_no for one in probed] == [False, True]
        assert all(one.cache_coherent.is_yes for one in probed)
        assert all(one.migration.can.is_yes for one in probed)
    passthrough.close()


def test_a_page_table_that_tracks_refuses_a_device_that_cannot() -> None:
    with (
        raw.mtty() as can,
        raw.mtty(tracked=False) as cannot,
        Iommufd.open() as iommufd,
        VfioDevice.open(str(can.node), "can") as first,
        VfioDevice.open(str(cannot.node), "cannot") as second,
    ):
        dev_id = first.bind(iommufd.fileno())
        second.bind(iommufd.fileno())
        ioas = iommufd.allocate_ioas()
        hwpt = iommufd.allocate_hwpt(dev_id, ioas, dirty_tracking=True)
        assert first.attach(hwpt.id, tracks_dirty=True) == hwpt.id
        with pytest.raises(KernelRejected) as failed:
            second.attach(hwpt.id, tracks_dirty=True)
        assert failed.value.code == "iommu_no_dirty_tracking_on_attach"
        assert failed.value.errno == errno.EINVAL
        assert second.attach(ioas.id) not in (ioas.id, hwpt.id)


class Vmm:
    """What a VMM does with the descriptors that it is given, on its copies of them."""

    def __init__(self, iommufd: int, device: int) -> None:
        self.iommufd = raw.Iommufd(os.dup(iommufd))
        self.device = raw.Vfio.__new__(raw.Vfio)
        self.device.fd = os.dup(device)
        self.ioas = self.iommufd.ioas()
        dev_id = self.device.bind(self.iommufd)
        self.hwpt = self.iommufd.hwpt(dev_id, self.ioas, raw.DIRTY_TRACKING)
        self.device.attach(self.hwpt)
        self.memory = self.iommufd.map(self.ioas, 0, LENGTH)
        self.iommufd.set_tracking(self.hwpt, True)

    def close(self) -> None:
        self.device.close()
        self.iommufd.close()
        self.memory.close()


async def test_what_a_vmms_device_wrote_is_seen_beside_it_and_left_to_it() -> None:
    passthrough = KernelPassthrough()
    with raw.mtty() as made, raw.mtty() as other:
        devices = [device_at(made), device_at(other)]
        opened = await passthrough.open(devices, 2)
        vmms = [
            Vmm(iommufd, opened.device_fds[device.address])
            for iommufd, device in zip(opened.iommufds, devices, strict=True)
        ]
        await opened.hand_over()
        refs = await opened.find_hwpts()
        assert refs == [HwptRef(number, vmm.hwpt) for number, vmm in enumerate(vmms)]
        assert refs[0].hwpt_id == refs[1].hwpt_id, "ids count anew in each iommufd"
        vmms[1].iommufd.make_dirty(vmms[1].hwpt, 0, 5 * PAGE)
        peeks = [await opened.peek(ref, 0, LENGTH, PAGE) for ref in refs]
        assert [peek and peek.dirty_pages for peek in peeks] == [0, 5]
        assert await opened.peek(refs[1], 0, 2 * LENGTH, PAGE) is None
        assert vmms[1].iommufd.peek(vmms[1].hwpt, 0, LENGTH) == 5
        assert (await passthrough.probe(devices[0])).migration.can.reason is Unknown.IN_USE
        for vmm in vmms:
            vmm.close()
        await opened.close()
        assert (await passthrough.probe(devices[0])).migration.can.is_yes
    passthrough.close()


async def test_a_vmm_that_runs_already_is_peeked_at_through_copies() -> None:
    """As after a restart of this daemon: nothing but the VMM has the descriptors."""
    with raw.mtty() as made:
        before = KernelPassthrough()
        opened = await before.open([device_at(made)], 1)
        fds = (opened.iommufds[0], opened.device_fds[made.sysfs.name])
        child = await in_thread(_start_vmm, *fds)
        assert child.stdout is not None
        assert await in_thread(child.stdout.readline) == b"mapped\n"
        await opened.close()
        before.close()
        after = KernelPassthrough()
        pidfd = os.pidfd_open(child.pid)
        rejoined = await after.rejoin([device_at(made)], child.pid, pidfd)
        (ref,) = await rejoined.find_hwpts()
        device = raw.Iommufd(rejoined.iommufds[0])
        device.set_tracking(ref.hwpt_id, True)
        device.make_dirty(ref.hwpt_id, 0, 7 * PAGE)
        peek = await rejoined.peek(ref, 0, LENGTH, PAGE)
        assert peek is not None
        assert peek.dirty_pages == 7
        watch = asyncio.create_task(rejoined.close_at_exit(pidfd))
        child.kill()
        async with asyncio.timeout(GENEROUS_S):
            await watch
        await in_thread(child.communicate)
        os.close(pidfd)
        assert (await after.probe(device_at(made))).migration.can.is_yes
        after.close()


async def test_a_dead_vmms_memory_is_unpinned_as_soon_as_it_is_seen_dead() -> None:
    """A child with the descriptors maps memory and is killed; only then may it go."""
    passthrough = KernelPassthrough()
    with raw.mtty() as made:
        opened = await passthrough.open([device_at(made)], 1)
        fds = (opened.iommufds[0], opened.device_fds[made.sysfs.name])
        child = await in_thread(_start_vmm, *fds)
        assert child.stdout is not None
        assert await in_thread(child.stdout.readline) == b"mapped\n"
        await opened.hand_over()
        pidfd = os.pidfd_open(child.pid)
        watch = asyncio.create_task(opened.close_at_exit(pidfd))
        await asyncio.sleep(0.1)
        assert not watch.done()
        pinned_kib = await in_thread(_available_kib)
        child.kill()
        async with asyncio.timeout(GENEROUS_S):
            await watch
        await in_thread(child.communicate)
        os.close(pidfd)
        freed_kib = await in_thread(_available_kib) - pinned_kib
        # Not all of it: whatever else ran in this guest takes and gives back memory meanwhile.
        assert freed_kib > 64 << 10, f"{freed_kib} KiB of 128 MiB came back"
        assert (await passthrough.probe(device_at(made))).migration.can.is_yes
    passthrough.close()


def _start_vmm(iommufd: int, device: int) -> "subprocess.Popen[bytes]":
    program = (
        "import os, sys, time\n"
        "from tests.lab.guest import raw\n"
        "iommufd = raw.Iommufd(int(sys.argv[1]))\n"
        "device = raw.Vfio.__new__(raw.Vfio); device.fd = int(sys.argv[2])\n"
        "ioas = iommufd.ioas()\n"
        "hwpt = iommufd.hwpt(device.bind(iommufd), ioas, raw.DIRTY_TRACKING)\n"
        "device.attach(hwpt)\n"
        "memory = iommufd.map(ioas, 0, 128 * raw.MIB)\n"
        "print('mapped', flush=True)\n"
        "time.sleep(600)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, str(iommufd), str(device)],
        stdout=subprocess.PIPE,
        pass_fds=(iommufd, device),
    )


def _available_kib() -> int:
    with open("/proc/meminfo") as meminfo:
        return next(int(line.split()[1]) for line in meminfo if line.startswith("MemAvailable"))
