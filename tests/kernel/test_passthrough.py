"""Opening devices for a VM, on the simulator. On the real kernel: tests/lab/guest."""

import asyncio
import mmap
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from migrd.abi import iommufd as iommufd_abi
from migrd.abi import vfio as abi
from migrd.core.devices import Unknown
from migrd.engine.device_ports import HwptRef, OpenDevices, Passthrough
from migrd.errors import KernelBusy, KernelDenied, KernelGone, KernelTooOld
from migrd.kernel.iommufd import Iommufd
from migrd.kernel.passthrough import KernelPassthrough
from migrd.kernel.vfio import VfioDevice
from tests.fakes.vfio import IOMMU_PATH, OPEN, Iommu, VfioKernel
from tests.fakes.vfio_device import SimDevice
from tests.kernel.vfio_bench import (
    GENEROUS_S,
    HeldUp,
    denied,
    device_at,
    iommufd_missing,
    left_open,
)

MIB = 1 << 20
APERTURE_START = 16 * MIB


@pytest.fixture
def kernel() -> Iterator[VfioKernel]:
    kernel = VfioKernel()
    yield kernel
    assert kernel.left_open() == []


@pytest.fixture
async def passthrough(kernel: VfioKernel) -> AsyncIterator[KernelPassthrough]:
    passthrough = KernelPassthrough(system=kernel.system, probe_limit_s=GENEROUS_S)
    as_port: Passthrough = passthrough
    assert as_port is passthrough
    yield passthrough
    passthrough.close()


# ---- opening


async def test_devices_are_opened_all_and_unbound(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    devices = [device_at(kernel.add(SimDevice(), Iommu.TRACKS), f"0000:41:00.{n}") for n in (2, 3)]
    opened = await passthrough.open(devices, 2)
    as_port: OpenDevices = opened
    assert as_port is opened
    assert len(set(opened.iommufds) | set(opened.device_fds.values())) == 4
    assert list(opened.device_fds) == ["0000:41:00.2", "0000:41:00.3"]
    # As the VMM will:
    theirs = VfioDevice(os.dup(opened.device_fds["0000:41:00.2"]), "theirs", kernel.system)
    await asyncio.to_thread(theirs.bind, opened.iommufds[0])
    await opened.hand_over()
    await opened.hand_over()
    assert opened.device_fds == {}
    flags = await asyncio.to_thread(theirs.migration_flags)
    assert flags is not None, "the VMM's copy still works"
    await asyncio.to_thread(theirs.close)
    await opened.close()
    await opened.close()
    assert opened.iommufds == []


async def test_one_that_cannot_be_opened_leaves_none_open(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    good = device_at(kernel.add(SimDevice()), "0000:41:00.2")
    bad_path = kernel.add(SimDevice())
    denied(kernel, bad_path)
    with pytest.raises(KernelDenied, match=r"0000:41:00\.3.*access to the character device"):
        await passthrough.open([good, device_at(bad_path, "0000:41:00.3")], 1)
    assert await left_open(kernel) == []
    with pytest.raises(KernelGone, match=r"0000:41:00\.3.*driver: vfio-pci.*bind a VFIO driver"):
        await passthrough.open([good, device_at(None, "0000:41:00.3")], 1)
    assert await left_open(kernel) == []
    iommufd_missing(kernel, "")
    with pytest.raises(KernelTooOld):
        await passthrough.open([good], 1)
    del kernel.open_errnos[IOMMU_PATH]
    await (await passthrough.open([good], 1)).close()


async def test_a_node_that_is_another_device_by_now_is_not_opened(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    """Sysfs was read; then drivers were bound anew, and the number was given to another."""
    path = kernel.add(SimDevice(), Iommu.TRACKS)
    kernel.sysfs_names[path] = "0000:41:00.7"
    with pytest.raises(KernelGone, match=r"is device 0000:41:00\.7 by now, not 0000:41:00\.2"):
        await passthrough.open([device_at(path, "0000:41:00.2")], 1)
    assert await left_open(kernel) == []
    probed = await passthrough.probe(device_at(path, "0000:41:00.2"))
    assert probed.migration.can.reason is not None, "another one's answers are not its own"
    kernel.sysfs_names[path] = "0000:41:00.2"
    opened = await passthrough.open([device_at(path, "0000:41:00.2")], 1)
    await opened.close()


async def test_letting_go_twice_does_not_let_go_of_the_next_vm(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    device = device_at(kernel.add(SimDevice(), Iommu.TRACKS))
    first = await passthrough.open([device], 1)
    await first.close()
    second = await passthrough.open([device], 1)
    await first.close()
    assert (await passthrough.probe(device)).migration.can.reason is Unknown.IN_USE
    await second.close()


async def test_a_device_that_is_open_for_a_vm_is_neither_opened_again_nor_probed(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    """A probe would bind it, and the VMM's bind would fail."""
    path = kernel.add(SimDevice(), Iommu.TRACKS)
    opened = await passthrough.open([device_at(path)], 1)
    with pytest.raises(KernelBusy, match=r"0000:41:00\.2"):
        await passthrough.open([device_at(path)], 1)
    kernel.before_ioctl = lambda request: pytest.fail("it was touched")
    probed = await passthrough.probe(device_at(path))
    assert probed.migration.can.reason is Unknown.IN_USE
    kernel.before_ioctl = lambda request: None
    await opened.close()
    assert (await passthrough.probe(device_at(path))).migration.can.is_yes
    with pytest.raises(KernelBusy):
        await passthrough.open([device_at(path), device_at(path)], 1)


async def test_a_device_that_its_vmm_let_go_of_is_the_next_vms_and_stays_so(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    one, other = (
        device_at(kernel.add(SimDevice(), Iommu.TRACKS), f"0000:41:00.{n}") for n in (2, 3)
    )
    first = await passthrough.open([one, other], 1)
    await first.hand_over()
    first.let_go_of(one.address)
    assert (await passthrough.probe(one)).iommu_dirty_tracking.is_yes
    second = await passthrough.open([one], 1)
    await first.close()
    with pytest.raises(KernelBusy):
        await passthrough.open([one], 1)
    await (await passthrough.open([other], 1)).close()
    await second.close()


async def test_opening_waits_for_a_probe_to_end(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    device = device_at(kernel.add(SimDevice(), Iommu.TRACKS))
    held_up = HeldUp(kernel, abi.VFIO_DEVICE_GET_INFO)
    probe = asyncio.create_task(passthrough.probe(device))
    await held_up.is_entered()
    opening = asyncio.create_task(passthrough.open([device], 1))
    await asyncio.sleep(0.05)
    assert not opening.done()
    held_up.go_on.set()
    opened = await opening
    assert (await probe).migration.can.is_yes
    vmm = VfioDevice(os.dup(opened.device_fds[device.address]), "vmm", kernel.system)
    await asyncio.to_thread(vmm.bind, opened.iommufds[0])
    await asyncio.to_thread(vmm.close)
    await opened.close()


async def test_a_cancelled_opening_leaves_nothing_open(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    device = device_at(kernel.add(SimDevice()))
    held_up = HeldUp(kernel, OPEN)
    opening = asyncio.create_task(passthrough.open([device], 3))
    await held_up.is_entered()
    opening.cancel()
    held_up.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert await left_open(kernel) == []
    await (await passthrough.open([device], 1)).close()


# ---- peeking at what the VMM made


class Vmm:
    """What QEMU does with the descriptors: an IOAS, a page table that tracks, memory."""

    def __init__(self, kernel: VfioKernel, opened: OpenDevices, address: str, number: int) -> None:
        self.kernel = kernel
        self.iommufd = Iommufd(os.dup(opened.iommufds[number]), kernel.ioctl)
        self.device = VfioDevice(os.dup(opened.device_fds[address]), address, kernel.system)
        self.dev_id = self.device.bind(self.iommufd.fileno())
        self.ioas = self.iommufd.allocate_ioas()
        self.hwpt = self.iommufd.allocate_hwpt(self.dev_id, self.ioas, dirty_tracking=True)
        self.device.attach(self.hwpt.id, tracks_dirty=True)
        self.memory = mmap.mmap(-1, 4 * MIB)
        self.ioas.map(self.memory, APERTURE_START)

    def close(self) -> None:
        self.device.close()
        self.iommufd.close()


async def test_a_peek_sees_what_devices_wrote_and_takes_none_of_it(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    devices = [device_at(kernel.add(SimDevice(), Iommu.TRACKS), f"0000:41:00.{n}") for n in (2, 3)]
    opened = await passthrough.open(devices, 2)
    vmms = [
        await asyncio.to_thread(Vmm, kernel, opened, one.address, number)
        for number, one in enumerate(devices)
    ]
    await opened.hand_over()
    refs = await opened.find_hwpts()
    assert refs == [HwptRef(number, vmm.hwpt.id) for number, vmm in enumerate(vmms)]
    await asyncio.to_thread(vmms[1].hwpt.set_tracking, True)
    fd = vmms[1].iommufd.fileno()
    kernel.make_dirty(fd, vmms[1].hwpt.id, APERTURE_START, [0, 1, 4])  # of 2 KiB
    for _ in range(2):
        peek = await opened.peek(refs[1], APERTURE_START, 4 * MIB, 4096)
        assert peek is not None
        assert peek.hwpt == refs[1]
        assert peek.dirty_pages == 2
        assert peek.took_s >= 0
    other = await opened.peek(refs[0], APERTURE_START, 4 * MIB, 4096)
    assert other is not None
    assert other.dirty_pages == 0
    assert await opened.peek(refs[1], APERTURE_START, 8 * MIB, 4096) is None  # a hole
    with pytest.raises(KernelGone, match="page table 99"):
        await opened.peek(HwptRef(0, 99), APERTURE_START, 4 * MIB, 4096)
    for vmm in vmms:
        await asyncio.to_thread(vmm.close)
    await opened.close()
    with pytest.raises(KernelGone):
        await opened.peek(refs[1], APERTURE_START, 4 * MIB, 4096)


async def test_no_call_on_a_vmms_page_table_ever_clears(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    device = device_at(kernel.add(SimDevice(), Iommu.TRACKS))
    opened = await passthrough.open([device], 1)
    vmm = await asyncio.to_thread(Vmm, kernel, opened, device.address, 0)
    await asyncio.to_thread(vmm.hwpt.set_tracking, True)
    del kernel.calls[:]
    (ref,) = await opened.find_hwpts()
    await opened.peek(ref, APERTURE_START, 4 * MIB, 4096)
    reads = [
        argument
        for number, argument in kernel.calls
        if number == iommufd_abi.IOMMU_HWPT_GET_DIRTY_BITMAP
    ]
    no_clear = iommufd_abi.iommufd_hwpt_get_dirty_bitmap_flags.NO_CLEAR
    assert len(reads) >= 2
    assert all(argument.flags == no_clear for argument in reads)
    numbers = {number for number, _ in kernel.calls}
    assert iommufd_abi.IOMMU_HWPT_SET_DIRTY_TRACKING not in numbers
    await asyncio.to_thread(vmm.close)
    await opened.close()


# ---- a VMM that has its devices already


async def test_a_vmm_that_runs_already_is_peeked_at_through_copies(
    kernel: VfioKernel, tmp_path: Path
) -> None:
    """As after a restart of this daemon. The VMM is this process."""
    device = device_at(kernel.add(SimDevice(), Iommu.TRACKS))
    before = KernelPassthrough(system=kernel.system)
    opened = await before.open([device], 1)
    vmm = await asyncio.to_thread(Vmm, kernel, opened, device.address, 0)
    await opened.close()
    before.close()
    listing = tmp_path / str(os.getpid()) / "fd"
    listing.mkdir(parents=True)
    (listing / "0").symlink_to("/dev/null")
    (listing / str(vmm.iommufd.fileno())).symlink_to(IOMMU_PATH)
    after = KernelPassthrough(system=kernel.system, proc=tmp_path)
    pidfd = os.pidfd_open(os.getpid())
    rejoined = await after.rejoin([device], os.getpid(), pidfd)
    assert len(rejoined.iommufds) == 1
    assert rejoined.device_fds == {}
    await asyncio.to_thread(vmm.hwpt.set_tracking, True)
    kernel.make_dirty(vmm.iommufd.fileno(), vmm.hwpt.id, APERTURE_START, [8])
    (ref,) = await rejoined.find_hwpts()
    peek = await rejoined.peek(ref, APERTURE_START, 4 * MIB, 4096)
    assert peek is not None
    assert peek.dirty_pages == 1
    with pytest.raises(KernelBusy):
        await after.open([device], 1)
    await asyncio.to_thread(vmm.close)
    await rejoined.close()
    (listing / str(vmm_number(listing))).unlink()
    with pytest.raises(KernelGone, match="no iommufd"):
        await after.rejoin([device], os.getpid(), pidfd)
    with pytest.raises(KernelGone):
        await after.rejoin([device], 1 << 22, pidfd)
    await (await after.open([device], 1)).close()
    os.close(pidfd)
    after.close()


def vmm_number(listing: Path) -> int:
    return next(int(entry.name) for entry in listing.iterdir() if entry.name != "0")


# ---- letting go when the VMM has exited


async def start_vmm() -> tuple[subprocess.Popen[bytes], int]:
    vmm = await asyncio.to_thread(
        subprocess.Popen, [sys.executable, "-c", "input()"], stdin=subprocess.PIPE
    )
    return vmm, os.pidfd_open(vmm.pid)


async def kill(vmm: subprocess.Popen[bytes]) -> None:
    vmm.kill()
    await asyncio.to_thread(vmm.communicate)


async def test_everything_is_closed_when_the_vmm_has_exited(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    device = device_at(kernel.add(SimDevice()))
    opened = await passthrough.open([device], 1)
    vmm, pidfd = await start_vmm()
    watch = asyncio.create_task(opened.close_at_exit(pidfd))
    await asyncio.sleep(0.05)
    os.close(pidfd)  # it is the caller's
    assert not watch.done()
    assert await left_open(kernel)
    await kill(vmm)
    async with asyncio.timeout(GENEROUS_S):
        await watch
    assert await left_open(kernel) == []
    await (await passthrough.open([device], 1)).close()


async def test_a_cancelled_watch_keeps_the_devices_and_is_in_nobodys_way(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    opened = await passthrough.open([device_at(kernel.add(SimDevice()))], 1)
    before = await asyncio.to_thread(os.listdir, "/proc/self/fd")
    vmm, pidfd = await start_vmm()
    watch = asyncio.create_task(opened.close_at_exit(pidfd))
    await asyncio.sleep(0.05)
    watch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watch
    await kill(vmm)
    os.close(pidfd)
    assert len(opened.iommufds) == 1
    assert await asyncio.to_thread(os.listdir, "/proc/self/fd") == before
    vmm, pidfd = await start_vmm()  # its pidfd, and our copy, have the same numbers again
    watch = asyncio.create_task(opened.close_at_exit(pidfd))
    await asyncio.sleep(0.05)
    await kill(vmm)
    async with asyncio.timeout(GENEROUS_S):
        await watch
        await opened.close_at_exit(pidfd)  # it has exited long ago
    os.close(pidfd)
    with pytest.raises(KernelGone):
        await opened.close_at_exit(pidfd)
