"""A disk of its own, and a small one, for what a test wants to fill up."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

DISK_BYTES = 4 << 20


def fill(path: Path, most_bytes: int = DISK_BYTES) -> None:
    """Until the disk has not a byte left."""
    with path.open("wb", buffering=0) as file:
        for piece in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while file.tell() < most_bytes:
                    file.write(bytes(piece))


@contextlib.asynccontextmanager
async def mounted(directory: Path) -> AsyncIterator[None]:
    """A disk of DISK_BYTES in place of a directory. Needs root."""
    size = f"size={DISK_BYTES},mode=0700"
    await run("mount", "-t", "tmpfs", "-o", size, "tmpfs", str(directory))
    try:
        yield
    finally:
        await run("umount", str(directory))


async def run(*command: str) -> None:
    """Raises AssertionError with what it complains of."""
    child = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    async with asyncio.timeout(20):
        _, complaint = await child.communicate()
    assert child.returncode == 0, f"{' '.join(command)}: {complaint.decode()}"
