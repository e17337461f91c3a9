"""Probing devices, on the simulator. On the real kernel: tests/lab/guest."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

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
from migrd.engine.device_ports import Passthrough
from migrd.errors import KernelBusy
from migrd.kernel.passthrough import KernelPassthrough
from migrd.kernel.vfio import VfioDevice
from tests.fakes.vfio import IOMMU_PATH, Iommu, VfioKernel
from tests.fakes.vfio_device import SimDevice, SimDmaLog
from tests.kernel.vfio_bench import (
    GENEROUS_S,
    HeldUp,
    denied,
    device_at,
    iommufd_missing,
    left_open,
)


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


def iommufd_denied(kernel: VfioKernel, path: str) -> None:
    kernel.open_errnos[IOMMU_PATH] = errno.EACCES


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
