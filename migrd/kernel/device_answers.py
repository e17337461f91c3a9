"""One device asked by one bind: what the kernel answers about it. Blocks.

    cdev ─┐
 iommufd ─┴─ bind ─┬─ IOMMU_GET_HW_INFO          dirty tracking by its IOMMU, cache coherency
                   ├─ VFIO_DEVICE_GET_INFO       reset
                   ├─ VFIO_DEVICE_FEATURE        migration, size of its state, DMA logging
                   └─ close                      nothing was attached, nothing is changed

Each answer stands for itself: one that cannot be had is unknown with the reason, and the others are
still asked for. ENOTTY of a feature is the answer no.

Traps
- ENOENT from IOMMU_GET_HW_INFO on a device just bound: an emulated mdev. No IOMMU sees its DMA.
- A bind proves cache coherency: the kernel binds no other device with an IOMMU.
- vfio-pci resets a function when it is bound. That is no loss: nobody else has it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from migrd.abi import vfio as abi
from migrd.core.devices import (
    Capability,
    Device,
    DeviceMigration,
    Evidence,
    IommuHardware,
    MigrationFlag,
    Unknown,
)
from migrd.errors import KernelDenied, KernelError, KernelGone, KernelTooOld
from migrd.kernel.calls import kernel_error
from migrd.kernel.iommufd import Iommufd
from migrd.kernel.iommufd_calls import OPEN
from migrd.kernel.vfio import VfioDevice, split_flags
from migrd.kernel.vfio_calls import LOG_REPORT, LOG_START, SystemCalls


@dataclass(frozen=True)
class Answers:
    """What one probe found out."""

    iommu_dirty_tracking: Capability
    cache_coherent: Capability
    can_reset: Capability
    dma_logging: Capability
    migration: DeviceMigration
    iommu_hardware: IommuHardware | None = None

    @classmethod
    def none(cls, reason: Unknown, detail: str) -> "Answers":
        unknown = Capability.unknown(reason, detail)
        return cls(unknown, unknown, unknown, unknown, DeviceMigration(unknown))

    def added_to(self, device: Device) -> Device:
        """`device` with these answers; where there is none, with what it had."""
        migration = self.migration
        if _is_better(device.migration.can, migration.can):
            migration = device.migration
        return replace(
            device,
            iommu_dirty_tracking=_better(device.iommu_dirty_tracking, self.iommu_dirty_tracking),
            cache_coherent=_better(device.cache_coherent, self.cache_coherent),
            can_reset=_better(device.can_reset, self.can_reset),
            dma_logging=_better(device.dma_logging, self.dma_logging),
            migration=migration,
            iommu_hardware=self.iommu_hardware or device.iommu_hardware,
        )


def _is_better(before: Capability, now: Capability) -> bool:
    return now.evidence is Evidence.NONE and before.evidence is not Evidence.NONE


def _better(before: Capability, now: Capability) -> Capability:
    return before if _is_better(before, now) else now


def open_iommufd(path: str, system: SystemCalls) -> Iommufd:
    """Raises KernelTooOld (`iommufd_missing`), KernelDenied, KernelBusy."""
    try:
        fd = system.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as cause:
        raise kernel_error(cause, f"open {path}", OPEN, "open") from cause
    return Iommufd(fd, system.ioctl)


def open_device(device: Device, system: SystemCalls) -> VfioDevice:
    """Its character device. Raises KernelGone when that is another device's by now: numbers are
    used again, and who says which it is has looked some time ago. Else as `VfioDevice.open`."""
    path = device.vfio_cdev
    if path is None:
        raise KernelGone(
            f"device {device.address} has no VFIO character device (driver:"
            f" {device.driver or 'none'}): bind a VFIO driver to it",
            code="no_vfio_cdev",
        )
    opened = VfioDevice.open(path, device.address, system)
    found = system.device_of(opened.fd)
    if found is not None and found != device.address:
        opened.close()
        raise KernelGone(
            f"{path} is device {found} by now, not {device.address}: its driver was bound anew;"
            " try again",
            code="device_replaced",
        )
    return opened


def ask(device: Device, iommufd_path: str, system: SystemCalls) -> Answers:
    try:
        with (
            open_iommufd(iommufd_path, system) as iommufd,
            open_device(device, system) as opened,
        ):
            dev_id = opened.bind(iommufd.fileno())
            tracking, coherent, hardware = _ask_iommu(iommufd, dev_id)
            return Answers(
                iommu_dirty_tracking=tracking,
                cache_coherent=coherent,
                can_reset=_answer(partial(_ask_reset, opened)),
                dma_logging=_answer(partial(_ask_dma_logging, opened)),
                migration=_ask_migration(opened),
                iommu_hardware=hardware,
            )
    except KernelError as error:
        return Answers.none(_reason(error), error.message)


def _answer(ask: Callable[[], Capability]) -> Capability:
    try:
        return ask()
    except KernelError as error:
        return Capability.unknown(_reason(error), error.message)


def _ask_iommu(
    iommufd: Iommufd, dev_id: int
) -> tuple[Capability, Capability, IommuHardware | None]:
    """Dirty tracking by its IOMMU, cache coherency, and the numbers that say so."""
    try:
        found = iommufd.hw_info(dev_id)
    except KernelGone:
        return (
            Capability.probed(False, "an emulated mdev: no IOMMU sees its DMA"),
            Capability.unknown(Unknown.NO_IOMMU, "an emulated mdev has no IOMMU"),
            None,
        )
    except KernelError as error:
        unknown = Capability.unknown(_reason(error), error.message)
        return unknown, unknown, None
    told = f"IOMMU_GET_HW_INFO: type {found.hardware_type}, capabilities {found.capabilities:#x}"
    return (
        Capability.probed(found.tracks_dirty, told),
        Capability.probed(True, "the kernel has bound it"),
        IommuHardware(found.hardware_type, found.capabilities.value, found.unknown_capability_bits),
    )


def _ask_reset(opened: VfioDevice) -> Capability:
    flags = opened.flags()
    return Capability.probed(
        abi.vfio_device_flags.RESET in flags, f"VFIO_DEVICE_GET_INFO: flags {int(flags):#x}"
    )


def _ask_dma_logging(opened: VfioDevice) -> Capability:
    can = opened.supports(LOG_START) and opened.supports(LOG_REPORT)
    return Capability.probed(can, "VFIO_DEVICE_FEATURE_PROBE of DMA_LOGGING_START and _REPORT")


def _ask_migration(opened: VfioDevice) -> DeviceMigration:
    try:
        flags = opened.migration_flags()
        if flags is None:
            return DeviceMigration(
                Capability.probed(False, "VFIO_DEVICE_FEATURE_MIGRATION: not supported")
            )
        known, unknown_bits = split_flags(flags)
        return DeviceMigration(
            can=Capability.probed(
                MigrationFlag.STOP_COPY in known,
                f"VFIO_DEVICE_FEATURE_MIGRATION: flags {int(flags):#x}",
            ),
            flags=known,
            unknown_flags=unknown_bits,
            stop_copy_bytes=opened.stop_copy_bytes(),
        )
    except KernelError as error:
        return DeviceMigration(Capability.unknown(_reason(error), error.message))


def _reason(error: KernelError) -> Unknown:
    """Which probe, or whose help, would settle it."""
    if isinstance(error, KernelTooOld):
        return Unknown.KERNEL_TOO_OLD
    if error.code == "device_in_use":
        return Unknown.IN_USE
    if error.code == "no_vfio_cdev":
        return Unknown.DRIVER_NOT_BOUND
    if isinstance(error, KernelDenied) and error.code != "unsafe_interrupts":
        return Unknown.NO_PERMISSION
    return Unknown.PROBE_FAILED
