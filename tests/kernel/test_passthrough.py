"""Probing and opening devices, on the simulator. On the real kernel: tests/lab/guest/test_mtty."""

import asyncio
import errno
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from migrd.abi import iommufd as iommufd_abi
from migrd.abi import vfio as abi
from migrd.core.devices import (
    Answer,
    Capability,
    Device,
    DeviceKind,
    DeviceMigration,
    Evidence,
    MigrationFlag,
    Unknown,
)
from migrd.engine.device_ports import HwptRef, OpenDevices, Passthrough
from migrd.errors import KernelBusy, KernelDenied, KernelGone, KernelTooOld
from migrd.kernel.iommufd import Iommufd
from migrd.kernel.passthrough import KernelPassthrough
from migrd.kernel.vfio import VfioDevice
from tests.fakes.vfio import IOMMU_PATH, Iommu, VfioKernel
from tests.fakes.vfio_device import SimDevice, SimDmaLog

MIB = 1 << 20
APERTURE_START = 16 * MIB
GENEROUS_S = 30.0


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


async def left_open(kernel: VfioKernel) -> list[str]:
    return await asyncio.to_thread(kernel.left_open)


def device_at(path: str | None, address: str = "0000:41:00.2") -> Device:
    return Device(address=address, kind=DeviceKind.VFIO_PCI, vfio_cdev=path, driver="vfio-pci")


def plain_nic() -> SimDevice:
    """As vfio-pci drives it: no migration, no log, a reset that it announces."""
    return SimDevice(migration_flags=None, log=None, device_flags=0b11)


def answers_of(device: Device) -> dict[str, Capability]:
    return {
        "iommu_dirty_tracking": device.iommu_dirty_tracking,
        "dma_logging": device.dma_logging,
        "migration": device.migration.can,
        "can_reset": device.can_reset,
        "cache_coherent": device.cache_coherent,
    }


# ---- probing


async def test_a_plain_nic_can_nothing_and_that_is_proven(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    path = kernel.add(plain_nic(), Iommu.PLAIN)
    probed = await passthrough.probe(device_at(path))
    answers = answers_of(probed)
    assert {name for name, can in answers.items() if can.is_no} == {
        "iommu_dirty_tracking",
        "dma_logging",
        "migration",
    }
    assert probed.can_reset.is_yes
    assert probed.cache_coherent.is_yes
    assert all(can.evidence is Evidence.PROBED for can in answers.values())
    assert probed.migration.stop_copy_bytes is None


async def test_a_device_behind_an_iommu_that_tracks_can_everything(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    path = kernel.add(SimDevice(device_flags=0b11, log=SimDmaLog()), Iommu.TRACKS)
    probed = await passthrough.probe(device_at(path))
    assert all(can.is_yes for can in answers_of(probed).values())
    assert probed.migration.flags == frozenset(MigrationFlag)
    assert probed.migration.stop_copy_bytes == 96
    assert probed.iommu_hardware is not None
    assert probed.iommu_hardware.capability_bits & 1


async def test_an_emulated_mdev_has_no_iommu_that_tracks_and_that_is_no_error(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    path = kernel.add(SimDevice(), Iommu.NONE)
    probed = await passthrough.probe(device_at(path))
    assert probed.iommu_dirty_tracking.is_no
    assert "mdev" in probed.iommu_dirty_tracking.detail
    assert probed.iommu_hardware is None
    assert probed.cache_coherent.reason is Unknown.NO_IOMMU
    assert probed.migration.can.is_yes
    assert probed.dma_logging.is_yes
    assert probed.can_reset.is_no  # mtty does not announce the one it has


async def test_flags_of_a_newer_kernel_are_kept(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    device = SimDevice(migration_flags=0b1 | 1 << 40, device_flags=1 << 30 | 1)
    probed = await passthrough.probe(device_at(kernel.add(device)))
    assert probed.migration.flags == {MigrationFlag.STOP_COPY}
    assert probed.migration.unknown_flags == 1 << 40
    assert probed.can_reset.is_yes


async def test_a_device_that_only_knows_flags_of_the_future_cannot_migrate(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    path = kernel.add(SimDevice(migration_flags=1 << 40))
    probed = await passthrough.probe(device_at(path))
    assert probed.migration.can.is_no
    assert probed.migration.unknown_flags == 1 << 40


async def test_a_device_that_cannot_tell_the_size_of_its_state_can_migrate(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    path = kernel.add(SimDevice(has_data_size=False))
    probed = await passthrough.probe(device_at(path))
    assert probed.migration.can.is_yes
    assert probed.migration.stop_copy_bytes is None


async def test_a_probe_changes_nothing_and_lets_go(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    device = SimDevice()
    path = kernel.add(device, Iommu.TRACKS)
    await passthrough.probe(device_at(path))
    assert await left_open(kernel) == []
    assert kernel.nodes[path].owner is None
    assert device.resets == 0
    changing = {iommufd_abi.IOMMU_HWPT_ALLOC, iommufd_abi.IOMMU_IOAS_ALLOC}
    assert changing.isdisjoint(number for number, _ in kernel.calls)


def denied(kernel: VfioKernel, path: str) -> None:
    kernel.open_errnos[path] = errno.EACCES


def iommufd_denied(kernel: VfioKernel, path: str) -> None:
    kernel.open_errnos[IOMMU_PATH] = errno.EACCES


def iommufd_missing(kernel: VfioKernel, path: str) -> None:
    kernel.open_errnos[IOMMU_PATH] = errno.ENOENT


def cdev_gone(kernel: VfioKernel, path: str) -> None:
    del kernel.nodes[path]


def no_remapping(kernel: VfioKernel, path: str) -> None:
    kernel.nodes[path].bind_errno = errno.EPERM


def group_in_use(kernel: VfioKernel, path: str) -> None:
    kernel.nodes[path].bind_errno = errno.EBUSY


def broken(kernel: VfioKernel, path: str) -> None:
    kernel.nodes[path].bind_errno = errno.EIO


@pytest.mark.parametrize(
    ("trouble", "reason", "told"),
    [
        (denied, Unknown.NO_PERMISSION, "EACCES"),
        (iommufd_denied, Unknown.NO_PERMISSION, "/dev/iommu"),
        (iommufd_missing, Unknown.KERNEL_TOO_OLD, "CONFIG_IOMMUFD"),
        (cdev_gone, Unknown.DRIVER_NOT_BOUND, "bind a VFIO driver"),
        (no_remapping, Unknown.PROBE_FAILED, "interrupts are not remapped"),
        (group_in_use, Unknown.IN_USE, "another process"),
        (broken, Unknown.PROBE_FAILED, "EIO"),
    ],
)
async def test_what_cannot_be_asked_is_unknown_with_its_reason(
    kernel: VfioKernel, passthrough: KernelPassthrough, trouble: object, reason: Unknown, told: str
) -> None:
    path = kernel.add(SimDevice())
    assert callable(trouble)
    trouble(kernel, path)
    probed = await passthrough.probe(device_at(path))
    for can in answers_of(probed).values():
        assert can.answer is Answer.UNKNOWN
        assert can.reason is reason
        assert told in can.detail


async def test_a_device_without_a_vfio_driver_is_not_opened(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    probed = await passthrough.probe(device_at(None))
    assert {can.reason for can in answers_of(probed).values()} == {Unknown.DRIVER_NOT_BOUND}


async def test_a_device_that_another_vm_has_is_in_use(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    path = kernel.add(SimDevice(), Iommu.TRACKS)
    iommufd = kernel.open()
    theirs = VfioDevice.open(path, "theirs", kernel.system)
    await asyncio.to_thread(theirs.bind, iommufd)
    probed = await passthrough.probe(device_at(path))
    assert {can.reason for can in answers_of(probed).values()} == {Unknown.IN_USE}
    assert kernel.nodes[path].owner is not None
    await asyncio.to_thread(theirs.close)
    os.close(iommufd)


async def test_one_question_without_an_answer_leaves_the_others_theirs(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    path = kernel.add(SimDevice(), Iommu.TRACKS)
    kernel.nodes[path].failures = {abi.VFIO_DEVICE_FEATURE: errno.EIO}
    probed = await passthrough.probe(device_at(path))
    assert probed.iommu_dirty_tracking.is_yes
    assert probed.migration.can.reason is Unknown.PROBE_FAILED
    assert "EIO" in probed.migration.can.detail
    assert probed.dma_logging.reason is Unknown.PROBE_FAILED
    kernel.nodes[path].failures = None
    kernel.failures[iommufd_abi.IOMMU_GET_HW_INFO] = errno.ENOTTY
    probed = await passthrough.probe(device_at(path))
    assert probed.iommu_dirty_tracking.reason is Unknown.KERNEL_TOO_OLD
    assert probed.migration.can.is_yes


async def test_what_was_known_is_not_forgotten_because_it_cannot_be_asked_now(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    path = kernel.add(SimDevice(), Iommu.TRACKS)
    known = await passthrough.probe(device_at(path))
    group_in_use(kernel, path)
    assert await passthrough.probe(known) == known
    estimated = replace(
        device_at(path), iommu_dirty_tracking=Capability.estimated(True, "ecap: SSADS")
    )
    probed = await passthrough.probe(estimated)
    assert probed.iommu_dirty_tracking == estimated.iommu_dirty_tracking
    assert probed.migration == DeviceMigration(probed.dma_logging)
    assert probed.dma_logging.reason is Unknown.IN_USE


async def test_an_estimate_that_was_wrong_gives_way_to_the_probe(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    estimated = replace(
        device_at(kernel.add(SimDevice(), Iommu.PLAIN)),
        iommu_dirty_tracking=Capability.estimated(True, "ecap: SSADS"),
    )
    probed = await passthrough.probe(estimated)
    assert probed.iommu_dirty_tracking.is_no
    assert probed.iommu_dirty_tracking.evidence is Evidence.PROBED


async def test_an_emulated_device_of_qemu_is_not_looked_at(passthrough: KernelPassthrough) -> None:
    emulated = replace(device_at(None), kind=DeviceKind.EMULATED)
    assert await passthrough.probe(emulated) is emulated


async def test_probes_of_one_device_at_the_same_time_are_one_bind(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    """Else each would find it in use by the other."""
    device = device_at(kernel.add(SimDevice(), Iommu.TRACKS))
    probed = await asyncio.gather(*(passthrough.probe(device) for _ in range(8)))
    assert all(one.iommu_dirty_tracking.is_yes for one in probed)


class HeldUp:
    """Holds up calls with this number, in their thread."""

    def __init__(self, kernel: VfioKernel, request: int) -> None:
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.request = request
        kernel.before_ioctl = self

    def __call__(self, request: int) -> None:
        if request == self.request:
            self.entered.set()
            assert self.go_on.wait(GENEROUS_S)

    async def is_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, GENEROUS_S)


async def test_a_device_that_hangs_holds_up_neither_its_probe_nor_the_others(
    kernel: VfioKernel,
) -> None:
    hangs = device_at(kernel.add(SimDevice(), Iommu.TRACKS))
    passthrough = KernelPassthrough(system=kernel.system, probe_limit_s=0.2)
    held_up = HeldUp(kernel, abi.VFIO_DEVICE_GET_INFO)
    for _ in range(2):  # the second time it is known to hang
        probed = await passthrough.probe(hangs)
        assert probed.migration.can.reason is Unknown.PROBE_FAILED
        assert "did not answer within 0.2 s" in probed.migration.can.detail
    with pytest.raises(KernelBusy, match="does not answer") as failed:
        await passthrough.open([hangs], 1)
    assert failed.value.code == "device_hangs"
    held_up.go_on.set()
    async with asyncio.timeout(GENEROUS_S):  # its thread lets go by itself
        while not (await passthrough.probe(hangs)).migration.can.is_yes:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)
    passthrough.close()


async def test_a_cancelled_probe_has_let_go_when_it_ends(
    kernel: VfioKernel, passthrough: KernelPassthrough
) -> None:
    device = device_at(kernel.add(SimDevice(), Iommu.TRACKS))
    held_up = HeldUp(kernel, abi.VFIO_DEVICE_GET_INFO)
    probe = asyncio.create_task(passthrough.probe(device))
    await held_up.is_entered()
    probe.cancel()
    await asyncio.sleep(0)
    assert not probe.done()
    held_up.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await probe
    assert await left_open(kernel) == []


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
    opening = asyncio.create_task(passthrough.open([device], 3))
    await asyncio.sleep(0)
    opening.cancel()
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
