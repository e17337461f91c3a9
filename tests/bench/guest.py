"""The boot image of the benchmarks' guest (guest.S), assembled anew each time: it takes 20 ms."""

import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SOURCE: Final = Path(__file__).with_name("guest.S")
PAGE_BYTES: Final = 4096
TICKS_PER_S: Final = 1000
BEAT_S: Final = 1 / TICKS_PER_S
_PARAMETERS_AT: Final = 0x10


@dataclass(frozen=True)
class Guest:
    """How large and how busy it is.

    The defaults converge after one pass and leave little for the switchover: what is measured is
    the driver's share, and not how fast QEMU emulates and copies.
    """

    memory_mib: int = 128
    working_set_bytes: int = 32 << 20
    dirty_bytes_per_s: int = 8_000_000

    def rom(self) -> bytes:
        """For QEMU's `-bios`. Raises CalledProcessError where binutils are missing."""
        with tempfile.TemporaryDirectory(prefix="migrd-bench-") as work:
            built, flat = Path(work) / "guest.o", Path(work) / "guest.rom"
            linking = ["-Ttext=0x8000", "--oformat", "binary", "-o", str(flat), str(built)]
            subprocess.run(["as", "--64", "-o", str(built), str(SOURCE)], check=True, timeout=60)
            subprocess.run(["ld", "-m", "elf_x86_64", *linking], check=True, timeout=60)
            rom = bytearray(flat.read_bytes())
        per_tick = round(self.dirty_bytes_per_s / PAGE_BYTES / TICKS_PER_S)
        struct.pack_into("<II", rom, _PARAMETERS_AT, self.working_set_bytes // PAGE_BYTES, per_tick)
        return bytes(rom)
