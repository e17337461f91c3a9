"""How much memory this host could give to one more guest."""

from pathlib import Path
from typing import Final

from migrd.engine.threads import in_thread

MEMINFO: Final = Path("/proc/meminfo")


async def memory_available_bytes() -> int | None:
    """MemAvailable of /proc/meminfo (Linux Documentation/filesystems/proc.rst); None: not told."""
    return await in_thread(read_memory_available_bytes)


def read_memory_available_bytes(path: Path = MEMINFO) -> int | None:
    """Blocking."""
    try:
        for line in path.read_text(encoding="ascii").splitlines():
            name, _, rest = line.partition(":")
            if name == "MemAvailable":
                return int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass  # not told: unknown is a state
    return None
