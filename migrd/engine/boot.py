"""Names of instances, which say of which boot of this host they are.

A process does not survive its host: an instance of an earlier boot is proven dead, also when
nothing else is left of it (its directory lies in /run). So a name ends in the beginning of the
boot's id (/proc/sys/kernel/random/boot_id, random(4)).
"""

import secrets
from pathlib import Path
from typing import Final

BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
MARK_CHARS: Final = 7
RANDOM_BYTES: Final = 4
BOOT_MARK: Final = BOOT_ID.read_text(encoding="ascii").strip()[:MARK_CHARS]
"""What the names of this boot end in; it does not change while this process lives."""


def new_instance() -> str:
    """A name that no other instance has: 16 characters."""
    return f"{secrets.token_hex(RANDOM_BYTES)}-{BOOT_MARK}"


def is_of_earlier_boot(instance: str) -> bool:
    """True only when the name says so; other names (of adopted VMs) say nothing."""
    name, dash, mark = instance.partition("-")
    if not dash or len(mark) != MARK_CHARS or len(name) != 2 * RANDOM_BYTES:
        return False
    return mark != BOOT_MARK
