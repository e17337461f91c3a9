"""What a process has mapped, asked by its pagemap descriptor: `maps` of the same address space.

A scan of a pagemap says nothing of what is not mapped, with success. Asking each page whether it
is mapped costs ten times the scan; the list of mappings tells it at once. It is /proc/PID/maps,
found as migrd.processes.mappings tells.

It is asked for one mapping after the other (PROCMAP_QUERY, Linux 6.11); older kernels only give the
text of all of them.
"""

import ctypes
import errno
import os
import re
from collections.abc import Iterator
from typing import Final, Self

from migrd.abi import pagemap as abi
from migrd.errors import KernelGone, KernelTooOld
from migrd.kernel.calls import Meaning, Verb, call, system_ioctl
from migrd.processes.mappings import open_beside, read_text

QUERY: Final = Verb(
    "PROCMAP_QUERY",
    abi.PROCMAP_QUERY,
    {errno.ESRCH: Meaning(KernelGone, "process_gone", "the process has exited")},
)
_RANGE: Final = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) ", re.MULTILINE)


class ProcessMaps:
    """An open /proc/PID/maps. Verbs block."""

    def __init__(self, fd: int) -> None:
        """Takes ownership of `fd`."""
        self._fd: int | None = fd
        self._can_query = True

    @classmethod
    def beside(cls, pagemap_fd: int) -> Self | None:
        """Those of the same process; None where they cannot be found, or not for certain."""
        fd = open_beside(pagemap_fd)
        return None if fd is None else cls(fd)

    @property
    def fd(self) -> int:
        """Raises KernelGone when it is closed."""
        if self._fd is None:
            raise KernelGone("the list of mappings is closed", code="descriptor_closed")
        return self._fd

    def first_gap(self, start: int, end: int) -> int | None:
        """The first address of a range that is not mapped; None: all of it is.

        Raises KernelGone: the process has exited.
        """
        if self._can_query:
            try:
                return self._query_gap(start, end)
            except KernelTooOld:
                self._can_query = False
        reached = start
        for begin, stop in self._ranges():
            if stop <= reached:
                continue
            if begin > reached:
                return reached
            reached = stop
            if reached >= end:
                return None
        return reached

    def close(self) -> None:
        """Idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _query_gap(self, start: int, end: int) -> int | None:
        reached = start
        argument = abi.procmap_query()
        while reached < end:
            argument.size = ctypes.sizeof(argument)
            argument.query_flags = abi.procmap_query_flags.COVERING_OR_NEXT_VMA
            argument.query_addr = reached
            argument.vma_name_size = argument.build_id_size = 0
            try:
                call(system_ioctl, self.fd, QUERY, argument, f"ask what is mapped at {reached:#x}")
            except KernelGone as error:
                if error.errno != errno.ENOENT:
                    raise
                return reached
            if argument.vma_start > reached:
                return reached
            reached = argument.vma_end
        return None

    def _ranges(self) -> Iterator[tuple[int, int]]:
        for found in _RANGE.finditer(self._text()):
            yield int(found[1], 16), int(found[2], 16)

    def _text(self) -> bytes:
        try:
            return read_text(self.fd)
        except ProcessLookupError as cause:
            raise KernelGone(
                "the process has exited", errno=cause.errno or 0, code="process_gone"
            ) from cause
