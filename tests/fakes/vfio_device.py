"""A VFIO device as the kernel shows it: states, data stream, DMA log. No descriptors here.

Its rules are those that the kernel was seen to have (mtty) or that vfio.h lays down; the way
between two states is a table of its own, so that the tables of migrd are checked against it.

    SimDevice ──opens──► SimSession     one data fd: filled while saving, checked when loaded
        └─ log: SimDmaLog | None        real: it records; stub: it says yes and never records
"""

import ctypes
import errno
from dataclasses import dataclass, field
from typing import Final

from migrd.abi import vfio as abi
from migrd.abi.vfio import vfio_device_mig_state as S

ALL_FLAGS: Final = 7
_HEADER_BYTES = 24
_PORT_BYTES = 36
_MAX_RANGES = 256

# The next state on the way from the row's state to the column's, for a device with everything.
#                 STOP RUN  S_C  RES  RUN2 PRE  PRE2
_NEXT_STATE: Final = """
    STOP          .    RUN2 S_C  RES  RUN2 RUN2 RUN2
    RUN           RUN2 .    RUN2 RUN2 RUN2 PRE  RUN2
    S_C           STOP STOP .    STOP STOP no   no
    RES           STOP STOP STOP .    STOP STOP STOP
    RUN2          STOP RUN  STOP STOP .    RUN  PRE2
    PRE           RUN  RUN  PRE2 RUN  RUN  .    PRE2
    PRE2          RUN2 RUN2 S_C  RUN2 RUN2 PRE  .
"""
_SHORT: Final = {
    "STOP": S.STOP,
    "RUN": S.RUNNING,
    "S_C": S.STOP_COPY,
    "RES": S.RESUMING,
    "RUN2": S.RUNNING_P2P,
    "PRE": S.PRE_COPY,
    "PRE2": S.PRE_COPY_P2P,
}
_NEEDS: Final = {S.RUNNING_P2P: 1 | 2, S.PRE_COPY: 1 | 4, S.PRE_COPY_P2P: 1 | 2 | 4}
_ENDS_SAVING: Final = {
    (S.PRE_COPY, S.RUNNING),
    (S.PRE_COPY_P2P, S.RUNNING_P2P),
    (S.STOP_COPY, S.STOP),
}
_SAVING: Final = (S.PRE_COPY, S.PRE_COPY_P2P, S.STOP_COPY)


def _table() -> dict[tuple[S, S], S | None]:
    rows = [line.split() for line in _NEXT_STATE.strip().splitlines()]
    return {
        (_SHORT[row[0]], target): _SHORT.get(step)
        for row in rows
        for target, step in zip(_SHORT.values(), row[1:], strict=True)
        if step != "."
    }


_NEXT: Final = _table()


def oserror(number: int) -> OSError:
    return OSError(number, errno.errorcode[number])


@dataclass
class SimSession:
    """What one data fd reads from or writes to."""

    device: "SimDevice"
    saving: bool
    stream: bytearray = field(default_factory=bytearray)
    position: int = 0
    ended: bool = False

    def read(self, max_bytes: int) -> bytes:
        if not self.saving:
            raise oserror(errno.EBADF)
        if self.ended:
            raise oserror(errno.ENODEV)
        data = bytes(self.stream[self.position : self.position + max_bytes])
        self.position += len(data)
        if not data and self.device.state != S.STOP_COPY and self.device.says_enomsg:
            raise oserror(errno.ENOMSG)
        return data

    def write(self, data: bytes) -> int:
        if self.saving:
            raise oserror(errno.EBADF)
        if self.ended:
            raise oserror(errno.ENODEV)
        accepted = bytes(data[: self.device.write_bytes])
        if len(self.stream) + len(accepted) > self.device.data_bytes:
            raise oserror(errno.ENOMEM)
        had_header = len(self.stream) >= _HEADER_BYTES
        self.stream += accepted
        whole_header = len(self.stream) >= _HEADER_BYTES
        if whole_header and not had_header and self.stream[:_HEADER_BYTES] != self.device.header:
            raise oserror(errno.EFAULT)
        return len(accepted)

    def precopy_left(self, left: abi.vfio_precopy_info) -> None:
        if left.argsz < ctypes.sizeof(left) or self.device.state not in _SAVING[:2]:
            raise oserror(errno.EINVAL)
        if self.ended:
            raise oserror(errno.ENODEV)
        left.initial_bytes, left.dirty_bytes = len(self.stream) - self.position, 0


@dataclass
class SimDmaLog:
    """The device's own log. A stub, as mtty's, takes every call and never has anything in it."""

    stub: bool = False
    coarsest_page_bytes: int = 1 << 21
    ranges: list[tuple[int, int]] = field(default_factory=list)
    dirty: set[int] = field(default_factory=set)
    """4 KiB frames."""

    def start(self, ranges: list[tuple[int, int]], page_size: int) -> int:
        if self.ranges and not self.stub:
            raise oserror(errno.EINVAL)
        self.ranges, self.dirty = ranges, set()
        return min(page_size, self.coarsest_page_bytes)

    def stop(self) -> None:
        self.ranges = []

    def write(self, iova: int) -> None:
        """The device writes a byte there."""
        if not self.stub and any(at <= iova < at + length for at, length in self.ranges):
            self.dirty.add(iova >> 12)

    def report(self, request: abi.vfio_device_feature_dma_logging_report) -> None:
        if not self.ranges and not self.stub:
            raise oserror(errno.EINVAL)
        end = request.iova + request.length
        bitmap = (ctypes.c_ubyte * -(-request.length // request.page_size // 8)).from_address(
            request.bitmap
        )
        for frame in [frame for frame in self.dirty if request.iova <= frame << 12 < end]:
            bit = ((frame << 12) - request.iova) // request.page_size
            bitmap[bit // 8] |= 1 << bit % 8
            self.dirty.discard(frame)


@dataclass
class SimDevice:
    """One device. Defaults: an mtty mdev with two ports."""

    migration_flags: int | None = ALL_FLAGS
    """None: no migration at all (plain vfio-pci). Unknown bits may be set."""
    ports: int = 2
    """The type: data of a device with another number is rejected."""
    log: SimDmaLog | None = field(default_factory=lambda: SimDmaLog(stub=True))
    device_flags: int = 2
    """Of GET_INFO."""
    has_reset: bool = True
    says_enomsg: bool = False
    has_data_size: bool = True
    write_bytes: int = 1 << 20
    """As much as one write() takes."""
    failing: dict[tuple[S, S], tuple[int, S | None]] = field(default_factory=dict)
    """Step -> its errno, and the state it leaves the device in (None: where it was)."""
    registers: bytes = b""
    """What a guest has put there: it moves with the data."""
    state: int = S.RUNNING
    session: SimSession | None = None
    resets: int = 0

    @property
    def header(self) -> bytes:
        return b"sim-device".ljust(_HEADER_BYTES - 1) + bytes([self.ports])

    @property
    def data_bytes(self) -> int:
        return _HEADER_BYTES + self.ports * _PORT_BYTES

    def closed(self) -> None:
        """The last descriptor is gone: its state stays, its session does not."""
        self._end_session()
        if self.log is not None:
            self.log.stop()

    def reset(self) -> None:
        if not self.has_reset:
            raise oserror(errno.ENOTTY)
        self.resets += 1
        self.state = S.RUNNING
        self.closed()

    def set_state(self, target: int) -> SimSession | None:
        """Along the kernel's way; stops where a step fails."""
        opened = None
        while self.state != target:
            step = self._next(target)
            self._fail_if_planted(step)
            opened = self._step(step)
            self.state = step
        return opened

    def _next(self, target: int) -> S:
        if target not in set(S) or not self._has(S(target)):
            raise oserror(errno.EINVAL)
        step = _NEXT.get((S(self.state), S(target)))
        while step is not None and not self._has(step):
            step = _NEXT[(step, S(target))]
        if step is None:
            raise oserror(errno.EINVAL)
        return step

    def _has(self, state: S) -> bool:
        needs = _NEEDS.get(state, 1)
        return (self.migration_flags or 0) & needs == needs

    def _fail_if_planted(self, step: S) -> None:
        planted = self.failing.get((S(self.state), step))
        if planted is not None:
            number, lands = planted
            if lands is not None:
                self.state = lands
            raise oserror(number)

    def _step(self, step: S) -> SimSession | None:
        if (self.state, step) in _ENDS_SAVING:
            self._end_session()
        elif self.state == S.RESUMING:
            self._load()
        elif step == S.RESUMING:
            self.session = SimSession(self, saving=False)
            return self.session
        elif step in _SAVING and (self.state not in _SAVING or self.session is None):
            self.session = SimSession(self, saving=True, stream=bytearray(self.header))
            self._fill(step)
            return self.session
        else:
            self._fill(step)
        return None

    def _fill(self, step: S) -> None:
        if step == S.STOP_COPY and self.session is not None:
            self.session.stream += self.registers.ljust(self.ports * _PORT_BYTES, b"\0")

    def _load(self) -> None:
        if self.session is None or len(self.session.stream) < self.data_bytes:
            raise oserror(errno.EINVAL)
        self.registers = bytes(self.session.stream[_HEADER_BYTES:]).rstrip(b"\0")
        self._end_session()

    def _end_session(self) -> None:
        if self.session is not None:
            self.session.ended = True
            self.session = None

    # ---- VFIO_DEVICE_FEATURE

    def feature(self, buffer: bytearray) -> SimSession | None:
        """`buffer` as the kernel gets and leaves it. Returns a session when a data fd is due."""
        header = abi.vfio_device_feature.from_buffer_copy(buffer)
        size = ctypes.sizeof(header)
        if header.argsz != len(buffer) or header.flags >> 19:
            raise oserror(errno.EINVAL)
        number = header.flags & abi.VFIO_DEVICE_FEATURE_MASK
        body = memoryview(buffer)[size:]
        access = header.flags & (abi.VFIO_DEVICE_FEATURE_GET | abi.VFIO_DEVICE_FEATURE_SET)
        probing = bool(header.flags & abi.VFIO_DEVICE_FEATURE_PROBE)
        allowed, needed = self._offer(number)
        both = access == (abi.VFIO_DEVICE_FEATURE_GET | abi.VFIO_DEVICE_FEATURE_SET)
        if access & ~allowed or (not probing and (not access or both)):
            raise oserror(errno.EINVAL)
        if probing:
            return None
        if len(body) < needed:
            raise oserror(errno.EINVAL)
        return self._answer(number, access, body)

    def _offer(self, number: int) -> tuple[int, int]:
        """Directions of a feature and bytes of its struct; ENOTTY without it."""
        get, put = abi.VFIO_DEVICE_FEATURE_GET, abi.VFIO_DEVICE_FEATURE_SET
        migrates = self.migration_flags is not None
        offers = {
            abi.VFIO_DEVICE_FEATURE_MIGRATION: (migrates, get, 8),
            abi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE: (migrates, get | put, 8),
            abi.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE: (migrates and self.has_data_size, get, 8),
            abi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START: (self.log is not None, put, 24),
            abi.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP: (self.log is not None, put, 0),
            abi.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT: (self.log is not None, get, 32),
        }
        has, directions, size = offers.get(number, (False, 0, 0))
        if not has:
            raise oserror(errno.ENOTTY)
        return directions, size

    def _answer(self, number: int, access: int, body: memoryview) -> SimSession | None:
        if number == abi.VFIO_DEVICE_FEATURE_MIGRATION:
            abi.vfio_device_feature_migration.from_buffer(body).flags = self.migration_flags
        elif number == abi.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE:
            sizes = abi.vfio_device_feature_mig_data_size.from_buffer(body)
            sizes.stop_copy_length = self.data_bytes
        elif number == abi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE:
            told = abi.vfio_device_feature_mig_state.from_buffer(body)
            if access == abi.VFIO_DEVICE_FEATURE_SET:
                return self.set_state(told.device_state)
            told.device_state, told.data_fd = self.state, -1
        else:
            self._log(number, body)
        return None

    def _log(self, number: int, body: memoryview) -> None:
        assert self.log is not None
        if number == abi.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP:
            self.log.stop()
        elif number == abi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START:
            control = abi.vfio_device_feature_dma_logging_control.from_buffer(body)
            ranges = _checked_ranges(control)
            control.page_size = self.log.start(ranges, control.page_size)
        else:
            request = abi.vfio_device_feature_dma_logging_report.from_buffer(body)
            if request.page_size < 4096 or request.page_size & (request.page_size - 1):
                raise oserror(errno.EINVAL)
            if request.iova + request.length >= 1 << 64:
                raise oserror(errno.EOVERFLOW)
            self.log.report(request)


def _checked_ranges(
    control: abi.vfio_device_feature_dma_logging_control,
) -> list[tuple[int, int]]:
    if not control.num_ranges:
        raise oserror(errno.EINVAL)
    if control.num_ranges > _MAX_RANGES:
        raise oserror(errno.E2BIG)
    array = (abi.vfio_device_feature_dma_logging_range * control.num_ranges).from_address(
        control.ranges
    )
    ranges: list[tuple[int, int]] = []
    for one in array:
        if one.iova % control.page_size or one.length % control.page_size:
            raise oserror(errno.EINVAL)
        if one.iova + one.length >= 1 << 64:
            raise oserror(errno.EOVERFLOW)
        if any(at < one.iova + one.length and one.iova < at + size for at, size in ranges):
            raise oserror(errno.EINVAL)
        ranges.append((one.iova, one.length))
    return ranges
