"""A disk of its own for a journal: small, so that it can be full, and one that can fail.

    fill       not a byte is left                                 (ENOSPC, with room made later)
    break_     nothing is written any more, what was not synced is lost, reads may fail      (EIO)
    forbid     the kernel has met an error and made it read-only                           (EROFS)

What breaks or forbids lasts until the disk is mounted anew, which its daemon has to end for. ext4
on a loop device, by root: its shutdown call and its `trigger_fs_error` do what bad hardware does.
"""

import asyncio
import contextlib
import fcntl
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path

from tests.integration.small_disk import run

_EXT4_IOC_SHUTDOWN = 0x8004587D
_NO_LOG_FLUSH = 2
DISK_BYTES = 24 << 20
"""Room for the journal of a group of migrations, its reserve and the file system's own."""


class Disk:
    """Mounted at `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._image = directory.with_name(f"{directory.name}.img")

    async def make(self) -> None:
        await asyncio.to_thread(self._allocate)
        await run("mkfs.ext4", "-q", str(self._image))
        await self.mount()
        await asyncio.to_thread(self.directory.chmod, 0o700)

    def _allocate(self) -> None:
        with self._image.open("wb") as image:
            image.truncate(DISK_BYTES)

    async def mount(self) -> None:
        options = "loop,errors=remount-ro"
        await run("mount", "-o", options, str(self._image), str(self.directory))

    async def unmount(self) -> None:
        await run("umount", "--lazy", str(self.directory))

    def break_(self) -> None:
        """Blocking."""
        directory = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.ioctl(directory, _EXT4_IOC_SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(directory)

    def forbid(self) -> None:
        """Blocking."""
        for line in Path("/proc/mounts").read_text().splitlines():
            device, where, *_ = line.split()
            if where == str(self.directory):
                trigger = Path("/sys/fs/ext4") / Path(device).name / "trigger_fs_error"
                trigger.write_text("a test asked for it\n")
                return
        raise AssertionError(f"{self.directory} is not mounted")


@contextlib.asynccontextmanager
async def disk_at(directory: Path) -> AsyncIterator[Disk]:
    """A disk in place of a directory."""
    disk = Disk(directory)
    await disk.make()
    try:
        yield disk
    finally:
        await disk.unmount()
