"""The destination's memory of one guest: files in memory that we made, written, never mapped.

A page of guest memory that the daemon mapped would count as the daemon's, so its peak memory would
be the guest's. Bytes come in by pwrite(2) from a bounded buffer, after their checksum was found
right. The files are sealed against growing and shrinking: the process that gets them can neither
cut them short nor blow them up under us.

Reserving takes all pages at once (fallocate, in steps, so that it can be ended half-way). It costs
what zeroing the memory costs, spares the same when pages come in, and means that a host that has
no room says so before anything was sent. Without it, pages are made as they arrive.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Sequence
from typing import Final

from migrd.core.memory_map import PAGE_BYTES, MemoryMap
from migrd.direct.stream_wire import Kind
from migrd.errors import ReceiveError

_RESERVE_STEP_BYTES: Final = 64 << 20
_PUNCH: Final = 0x3
"""FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE (linux/falloc.h)."""
_ZEROS: Final = bytes(1 << 20)
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
Entry = tuple[int, int, int, int]
"""Region id, kind, offset in the region, length: the last two in bytes."""


class RebuiltMemory:
    """One file per region. Blocking; `close` only when nobody else uses it any more."""

    def __init__(self, memory: MemoryMap, *, is_reserved: bool) -> None:
        """Makes the files, empty. Raises ReceiveError (`out_of_memory`)."""
        self.memory = memory
        self._is_reserved = is_reserved
        self._lengths = {one.id: one.length_bytes for one in memory.regions}
        self.fds: dict[int, int] = {}
        """By region id."""
        try:
            for region in memory.regions:
                self.fds[region.id] = _file(f"guest-{region.id}", region.length_bytes)
        except OSError as failure:
            self.close()
            raise _no_room(failure, memory.bytes) from failure

    def reserve(self, check: Callable[[], None]) -> None:
        """Take all pages now; `check` may raise to end it. Raises ReceiveError."""
        for region_id, fd in self.fds.items():
            length = self._lengths[region_id]
            for offset in range(0, length, _RESERVE_STEP_BYTES):
                check()
                try:
                    os.posix_fallocate(fd, offset, min(_RESERVE_STEP_BYTES, length - offset))
                except OSError as failure:
                    raise _no_room(failure, self.memory.bytes) from failure

    def pages_in(self, table: Sequence[Entry], payload_bytes: int) -> tuple[int, int]:
        """Data pages and zero pages of a record; raises ReceiveError where its table is wrong."""
        data_bytes = zero_bytes = 0
        for entry in table:
            self._check(*entry)
            if entry[1] == Kind.DATA:
                data_bytes += entry[3]
            else:
                zero_bytes += entry[3]
        if data_bytes != payload_bytes:
            raise ReceiveError(
                f"a record has {payload_bytes} bytes of memory, its table says {data_bytes}"
            )
        return data_bytes // PAGE_BYTES, zero_bytes // PAGE_BYTES

    def apply(self, table: Sequence[Entry], payload: memoryview) -> None:
        """Put a record that `pages_in` has checked in its place. Raises ReceiveError: no room."""
        at = 0
        try:
            for region, kind, offset, length in table:
                if kind == Kind.DATA:
                    _write(self.fds[region], payload[at : at + length], offset)
                    at += length
                else:
                    self._zero(self.fds[region], offset, length)
        except OSError as failure:
            raise _no_room(failure, self.memory.bytes) from failure

    def close(self) -> None:
        """Give the memory up; idempotent. Processes that have the files keep theirs."""
        fds, self.fds = self.fds, {}
        for fd in fds.values():
            with contextlib.suppress(OSError):
                os.close(fd)

    def _check(self, region: int, kind: int, offset: int, length: int) -> None:
        if kind not in (Kind.DATA, Kind.ZERO):
            raise ReceiveError(f"{_named(region, offset, length)}: memory of unknown kind {kind}")
        size = self._lengths.get(region)
        if size is None:
            raise ReceiveError(f"{_named(region, offset, length)}: no such region in the manifest")
        if not length or offset % PAGE_BYTES or length % PAGE_BYTES:
            raise ReceiveError(f"{_named(region, offset, length)}: not whole pages of {PAGE_BYTES}")
        if offset + length > size:
            raise ReceiveError(
                f"{_named(region, offset, length)}: outside its region of {size:#x} bytes"
            )

    def _zero(self, fd: int, offset: int, length: int) -> None:
        if not self._is_reserved:
            if _libc.fallocate(fd, _PUNCH, offset, length):
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
            return
        for at in range(offset, offset + length, len(_ZEROS)):
            _write(fd, memoryview(_ZEROS)[: offset + length - at], at)


def _named(region: int, offset: int, length: int) -> str:
    return f"region {region}, offset {offset:#x}, {length:#x} bytes"


def _file(name: str, length_bytes: int) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, length_bytes)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except OSError:
        os.close(fd)
        raise
    return fd


def _write(fd: int, view: memoryview, offset: int) -> None:
    while view:
        done = os.pwrite(fd, view, offset)
        if not done:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        view, offset = view[done:], offset + done


def _no_room(failure: OSError, wanted_bytes: int) -> ReceiveError:
    if failure.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT):
        return ReceiveError(
            f"this host has no room for the guest's {wanted_bytes >> 20} MiB: {failure.strerror}",
            code="out_of_memory",
        )
    return ReceiveError(f"guest memory cannot be written: {failure}", code="memory_unusable")
