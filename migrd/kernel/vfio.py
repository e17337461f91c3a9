"""VFIO character devices as verbs. All block: run them in a worker thread.

    open ─► bind ─► attach ─► detach        /dev/vfio/devices/vfioN, one owner at a time
              │
              ├─ features: migration flags, device state ─► DataStream, data size
              ├─ DMA log: start ─► read ─► stop
              └─ reset

Rules
1. ENOTTY from a feature is the answer "not supported": None or False. Every other errno is an
   error, and says nothing about what the device can do.
2. Descriptors are closed exactly once, by `close`; a `DataStream` is its receiver's to close.
3. A DMA log is read only while it is on and only inside the ranges that it was started with: a
   driver may answer anything else with "nothing dirty".

Traps
- State survives `close`: a device may be found in any state. Some devices do not announce their
  reset (GET_INFO) and have one all the same.
- A reset also ends the DMA log.

What each errno means is in `kernel.vfio_calls`; where a device may go, in `core.device_state`.
"""

import ctypes
import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from migrd.abi import vfio as abi
from migrd.abi.ioctl import UapiStruct
from migrd.core.device_state import RESET_ONLY, DeviceState, NoWay, fall_back
from migrd.core.devices import MigrationFlag
from migrd.errors import KernelError, KernelRejected, KernelUnsupported
from migrd.kernel.calls import Verb, call, kernel_error
from migrd.kernel.page_table import DirtyBits
from migrd.kernel.vfio_calls import (
    ATTACH,
    ATTACH_TRACKING,
    BIND,
    DATA_SIZE,
    DETACH,
    GET_INFO,
    GET_STATE,
    LINUX,
    LOG_REPORT,
    LOG_START,
    LOG_STOP,
    MIGRATION,
    OPEN,
    RESET,
    SET_STATE,
    Descriptor,
    Feature,
    SystemCalls,
)
from migrd.kernel.vfio_data import DataStream

MAX_DMA_RANGES: Final = 256
"""What fits a page of the kernel; more are refused (E2BIG)."""
_SMALLEST_DMA_PAGE_BYTES = 4096
_ADDRESS_SPACE_BYTES = 1 << 64
_WORD_BITS = 64


@dataclass(frozen=True)
class DmaRange:
    iova: int
    length_bytes: int


class VfioDevice(Descriptor):
    """One open VFIO character device. `name` is for messages: its address."""

    def __init__(self, fd: int, name: str, system: SystemCalls = LINUX) -> None:
        super().__init__(fd, name, system)
        self._logged: tuple[DmaRange, ...] = ()

    @classmethod
    def open(cls, path: str, name: str, system: SystemCalls = LINUX) -> Self:
        """Raises KernelGone (no VFIO driver), KernelDenied, KernelError."""
        try:
            fd = system.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as cause:
            raise kernel_error(cause, f"open device {name} ({path})", OPEN, "open") from cause
        return cls(fd, name, system)

    @classmethod
    def adopt(cls, fd: int, system: SystemCalls = LINUX) -> Self:
        """A device that its owner has opened, bound and passed: on a duplicate of `fd`.

        Raises KernelGone when `fd` is closed.
        """
        try:
            own = os.dup(fd)
        except OSError as cause:
            raise kernel_error(cause, f"take over the device at fd {fd}", {}, "dup") from cause
        return cls(own, system.device_of(own) or f"fd {fd}", system)

    def bind(self, iommufd: int) -> int:
        """Bind to an iommufd; returns the id that the device has there.

        Raises KernelBusy (in use), KernelDenied (`unsafe_interrupts`), KernelError.
        """
        argument = abi.vfio_device_bind_iommufd(iommufd=iommufd)
        self._call(BIND, argument, "use")
        return int(argument.out_devid)

    def attach(self, pt_id: int, *, tracks_dirty: bool = False) -> int:
        """Attach to an IOAS or a page table, in place of the one it had; returns the page table's
        id, or the IOAS's. `tracks_dirty`: that page table was made with dirty tracking.

        Raises KernelRejected: it does not fit, `iommu_no_dirty_tracking_on_attach` if it tracks.
        """
        argument = abi.vfio_device_attach_iommufd_pt(pt_id=pt_id)
        verb = ATTACH_TRACKING if tracks_dirty else ATTACH
        self._call(verb, argument, f"attach page table {pt_id} to")
        return int(argument.pt_id)

    def detach(self) -> None:
        self._call(DETACH, abi.vfio_device_detach_iommufd_pt(), "detach the page table of")

    def flags(self) -> abi.vfio_device_flags:
        """Of VFIO_DEVICE_GET_INFO; unknown bits are kept."""
        argument = abi.vfio_device_info()
        self._call(GET_INFO, argument, "describe")
        return abi.vfio_device_flags(argument.flags)

    def reset(self) -> None:
        """Back to RUNNING with no state of the guest's. Raises KernelUnsupported without one."""
        self._call(RESET, 0, "reset")
        self._logged = ()

    # ---- features

    def supports(self, feature: Feature) -> bool:
        """Raises KernelError when the kernel says neither yes nor no."""
        access = feature.access | abi.VFIO_DEVICE_FEATURE_PROBE
        try:
            self._feature(feature, None, "probe", access)
        except KernelUnsupported as error:
            if error.errno != errno.ENOTTY:
                raise
            return False
        return True

    def migration_flags(self) -> abi.vfio_migration | None:
        """None: the device cannot migrate. Unknown bits are kept."""
        argument = abi.vfio_device_feature_migration()
        known = self._get_if_supported(MIGRATION, argument)
        return abi.vfio_migration(argument.flags) if known else None

    def migration_abilities(self) -> frozenset[MigrationFlag] | None:
        """`migration_flags`, of which only those that this version knows; None: cannot migrate."""
        flags = self.migration_flags()
        return None if flags is None else split_flags(flags)[0]

    def stop_copy_bytes(self) -> int | None:
        """How much a STOP_COPY would send now, by the driver's estimate; None: it cannot tell."""
        argument = abi.vfio_device_feature_mig_data_size()
        known = self._get_if_supported(DATA_SIZE, argument)
        return int(argument.stop_copy_length) if known else None

    def state(self) -> DeviceState:
        argument = abi.vfio_device_feature_mig_state(data_fd=-1)
        self._feature(GET_STATE, argument, "ask the state of")
        return DeviceState(argument.device_state)

    def set_state(self, target: DeviceState) -> DataStream | None:
        """Bring it to `target`; returns the data fd when that opened a session.

        Raises KernelError; the device is then where it was, or anywhere on the way: ask `state`.
        """
        argument = abi.vfio_device_feature_mig_state(device_state=target, data_fd=-1)
        self._feature(SET_STATE, argument, f"bring to {target.name}")
        if argument.data_fd < 0:
            return None
        return DataStream(argument.data_fd, self.name, self._system)

    def move(self, target: DeviceState) -> DataStream | None:
        """`set_state`, with the way back if it fails (core.device_state).

        Raises KernelRejected (`no_way`: nothing was changed), else KernelError with the code
        `device_fell_back` (it goes on where it was), `device_was_reset` (its state is lost) or
        `device_lost` (nothing helped); the cause is the first failure.
        """
        start = self.state()
        known = self.migration_abilities() or frozenset()
        try:
            back = fall_back(start, target, known)
        except NoWay as cause:
            raise KernelRejected(f"device {self.name}: {cause}", code="no_way") from cause
        try:
            return self.set_state(target)
        except KernelError as failure:
            code, outcome = self._recover(back)
            message = f"{failure.message}; {outcome}"
            raise KernelError(message, errno=failure.errno, code=code) from failure

    def _recover(self, back: DeviceState | None) -> tuple[str, str]:
        if back is not RESET_ONLY:
            try:
                session = self.set_state(back)
            except KernelError:
                pass  # told below, by what the reset comes to
            else:
                if session is not None:
                    session.close()
                return "device_fell_back", f"it is in {back.name} again"
        try:
            self.reset()
        except KernelError as error:
            return "device_lost", f"its state is unknown, and: {error.message}"
        return "device_was_reset", "it was reset, and its state is lost"

    # ---- the device's own log of its DMA

    def start_dma_log(self, ranges: Sequence[DmaRange], page_size_bytes: int) -> int:
        """Log DMA writes to `ranges`; returns the page size that the device chose, in bytes.

        Raises KernelRejected for ranges that no kernel takes, and when a log is on already.
        """
        if self._logged:
            raise self._refused("its DMA log is on already", "dma_log_on")
        _check_ranges(self.name, ranges, page_size_bytes)
        array = (abi.vfio_device_feature_dma_logging_range * len(ranges))()
        for entry, one in zip(array, ranges, strict=True):
            entry.iova, entry.length = one.iova, one.length_bytes
        argument = abi.vfio_device_feature_dma_logging_control(
            page_size=page_size_bytes, num_ranges=len(ranges), ranges=ctypes.addressof(array)
        )
        self._feature(LOG_START, argument, "start the DMA log of")
        self._logged = tuple(ranges)
        return int(argument.page_size)

    def read_dma_log(self, iova: int, length_bytes: int, page_size_bytes: int) -> DirtyBits:
        """Read the log of a range, and clear it.

        After a KernelError from the kernel the log is no longer to be trusted: all is dirty.
        """
        self._check_report(iova, length_bytes, page_size_bytes)
        words = -(-length_bytes // (page_size_bytes * _WORD_BITS))
        bitmap = bytearray(words * _WORD_BITS // 8)
        exported = (ctypes.c_char * len(bitmap)).from_buffer(bitmap)
        argument = abi.vfio_device_feature_dma_logging_report(
            iova=iova,
            length=length_bytes,
            page_size=page_size_bytes,
            bitmap=ctypes.addressof(exported),
        )
        self._feature(LOG_REPORT, argument, "read the DMA log of")
        return DirtyBits(iova, length_bytes, page_size_bytes, memoryview(bitmap).toreadonly())

    def stop_dma_log(self) -> None:
        """Idempotent."""
        if self._logged:
            self._feature(LOG_STOP, None, "stop the DMA log of")
            self._logged = ()

    def _check_report(self, iova: int, length_bytes: int, page_size_bytes: int) -> None:
        _check_ranges(self.name, [DmaRange(iova, length_bytes)], page_size_bytes)
        if not any(
            one.iova <= iova and iova + length_bytes <= one.iova + one.length_bytes
            for one in self._logged
        ):
            raise self._refused(
                f"{length_bytes:#x} bytes at {iova:#x} are not in its DMA log", "dma_not_logged"
            )

    # ---- calls

    def _refused(self, why: str, code: str) -> KernelRejected:
        return KernelRejected(f"device {self.name}: {why}", errno=errno.EINVAL, code=code)

    def _call(self, verb: Verb, argument: UapiStruct | bytearray | int, what: str) -> None:
        call(self._system.ioctl, self.fd, verb, argument, f"{what} device {self.name}")

    def _get_if_supported(self, feature: Feature, argument: UapiStruct) -> bool:
        try:
            self._feature(feature, argument, f"ask {feature.name} of")
        except KernelUnsupported as error:
            if error.errno != errno.ENOTTY:
                raise
            return False
        return True

    def _feature(
        self, feature: Feature, argument: UapiStruct | None, what: str, access: int | None = None
    ) -> None:
        """What the kernel answers is in `argument` afterwards."""
        body = b"" if argument is None else bytes(argument)
        header = abi.vfio_device_feature(
            argsz=ctypes.sizeof(abi.vfio_device_feature) + len(body),
            flags=feature.number | (feature.access if access is None else access),
        )
        buffer = bytearray(bytes(header) + body)
        self._call(feature.verb, buffer, what)
        if argument is not None:
            answer = bytes(buffer[ctypes.sizeof(header) :])
            ctypes.memmove(ctypes.addressof(argument), answer, len(answer))


def split_flags(flags: abi.vfio_migration) -> tuple[frozenset[MigrationFlag], int]:
    """The flags that this version knows, and the bits of those it does not."""
    by_bit = {
        abi.vfio_migration.STOP_COPY: MigrationFlag.STOP_COPY,
        abi.vfio_migration.P2P: MigrationFlag.P2P,
        abi.vfio_migration.PRE_COPY: MigrationFlag.PRE_COPY,
    }
    known = frozenset(flag for bit, flag in by_bit.items() if bit & flags)
    return known, int(flags) & ~sum(by_bit)


def _check_ranges(name: str, ranges: Sequence[DmaRange], page_size_bytes: int) -> None:
    """What every kernel refuses, before anything is asked of it."""
    trouble = _trouble_with(ranges, page_size_bytes)
    if trouble:
        raise KernelRejected(f"device {name}: {trouble}", errno=errno.EINVAL, code="bad_dma_ranges")


def _trouble_with(ranges: Sequence[DmaRange], page_size_bytes: int) -> str | None:
    if page_size_bytes < _SMALLEST_DMA_PAGE_BYTES or page_size_bytes & (page_size_bytes - 1):
        return f"pages of {page_size_bytes} bytes: not a power of two from 4096 up"
    if not 1 <= len(ranges) <= MAX_DMA_RANGES:
        return f"{len(ranges)} ranges: 1 to {MAX_DMA_RANGES} can be logged; merge them"
    end = 0
    for one in sorted(ranges, key=lambda one: one.iova):
        told = f"range of {one.length_bytes:#x} bytes at {one.iova:#x}"
        if one.iova < 0 or one.length_bytes <= 0:
            return f"{told} is empty"
        if (one.iova | one.length_bytes) % page_size_bytes:
            return f"{told} is not aligned to its pages of {page_size_bytes:#x} bytes"
        if one.iova + one.length_bytes >= _ADDRESS_SPACE_BYTES:
            return f"{told} reaches beyond the address space"
        if one.iova < end:
            return f"{told} overlaps another"
        end = one.iova + one.length_bytes
    return None
