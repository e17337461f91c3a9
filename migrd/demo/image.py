"""The boot image of the guest that the demo and the tests migrate.

    guest/guest.S --as, ld--> 3 KiB of code --parameters--> +----------------+ 0
    guest/rom.S   --as, ld--> 256 bytes of reset stub       | guest, patched |
                                    |                       | zeros          |
                                    +---------------------->| reset stub     | 64 KiB
                                                            +----------------+  for `-bios`

The guest visits the pages of its working set over and over, checks on each visit that
the page is as it left it, and prints a heartbeat on COM1 (`Heartbeat` in `proof`). Which
page comes when follows from the parameters alone, so the whole memory can be predicted.

Traps:
- the tick is the PIT's: 19 Hz at least, and a pace below that would need more than one tick
  per page, which the guest does not do;
- the order of the parameters in `_pack` is that of guest.S, which says what each means;
- a ROM is tied to no machine type, but RAM above 4 GiB begins where the machine type says:
  `low_memory_end_bytes` (3 GiB on pc with more than 3.5 GiB, 2 GiB on q35).

Only the standard library and binutils are needed; the code is assembled once and cached.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from migrd.demo.errors import ImageError

PAGE_BYTES = 4096
CODE_ADDRESS = 0x8000
ROM_BYTES = 64 * 1024

_SOURCES = Path(__file__).parent / "guest"
_MAGIC = b"MIGRDPR2"
_PIT_HZ = 1193182
_MOST_TICKS_PER_S = 1000
_FEWEST_TICKS_PER_S = 19  # the PIT divides by 65536 at most


class Pattern(StrEnum):
    """In which order the working set is dirtied."""

    SEQUENTIAL = "sequential"
    """Page after page, round and round."""
    RANDOM = "random"
    """Each page once per round, every round in another order."""
    HOT_SPOT = "hot-spot"
    """Most visits (90 %) go to a small part (10 %) of the set, each part in random order."""
    BURST = "burst"
    """Sequential, but in bursts with rests between; the mean pace is the one asked for."""


@dataclass(frozen=True, slots=True)
class GuestImage:
    """Parameters of a guest. The pace is exact while the vCPU gets the time it needs."""

    working_set_pages: int = 4096
    cold_pages: int = 0
    """Pages after the working set that are filled at boot (if `noise`) and never visited."""
    pages_per_s: int = 10_000
    pattern: Pattern = Pattern.SEQUENTIAL
    heartbeat_interval_s: float = 0.01
    noise: bool = False
    """Fill all pages with incompressible bytes at boot; otherwise they start as zeros."""
    free_run: bool = False
    """Ignore the pace: dirty as fast as the vCPU can, and never idle."""
    hot_spot_pages_percent: int = 10
    hot_spot_visits_percent: int = 90
    burst_on_s: float = 0.2
    burst_period_s: float = 1.0
    base_bytes: int = 16 << 20
    """Guest-physical address of the working set."""
    low_memory_end_bytes: int = 3 << 30
    reset_after_heartbeats: int = 0
    """Then it resets the machine, boots again and counts from one; 0: never."""

    def __post_init__(self) -> None:
        whole = self.base_bytes % PAGE_BYTES == 0 and self.low_memory_end_bytes % PAGE_BYTES == 0
        checks = (
            (self.working_set_pages >= 0, "working_set_pages is negative"),
            (self.cold_pages >= 0, "cold_pages is negative"),
            (self.pages_per_s >= 0, "pages_per_s is negative"),
            (0.001 <= self.heartbeat_interval_s <= 10, "heartbeat_interval_s outside 0.001..10"),
            (0 < self.hot_spot_pages_percent < 100, "hot_spot_pages_percent outside 1..99"),
            (0 < self.hot_spot_visits_percent < 100, "hot_spot_visits_percent outside 1..99"),
            (0 < self.burst_on_s <= self.burst_period_s, "burst_on_s outside 0..burst_period_s"),
            (self.reset_after_heartbeats >= 0, "reset_after_heartbeats is negative"),
            (whole and self.base_bytes >= 1 << 20, "base_bytes below 1 MiB or not whole pages"),
            (
                self.pattern is not Pattern.HOT_SPOT or self.working_set_pages >= 2,
                "a hot spot needs a working set of two pages",
            ),
        )
        for holds, complaint in checks:
            if not holds:
                raise ImageError(complaint)

    @property
    def filled_pages(self) -> int:
        return self.working_set_pages + self.cold_pages

    @property
    def hot_spot_pages(self) -> int:
        if self.pattern is not Pattern.HOT_SPOT:
            return 0
        return max(1, self.working_set_pages * self.hot_spot_pages_percent // 100)

    @property
    def is_random_order(self) -> bool:
        return self.pattern in (Pattern.RANDOM, Pattern.HOT_SPOT)

    @property
    def memory_needed_bytes(self) -> int:
        """The least RAM this guest runs in (below `low_memory_end_bytes`)."""
        return self.base_bytes + self.filled_pages * PAGE_BYTES

    @property
    def pace(self) -> tuple[int, int]:
        """(pages per tick, PIT reload) while the guest works: the steadiest tick that fits."""
        pages_per_s = float(self.pages_per_s)
        if self.pattern is Pattern.BURST:
            pages_per_s *= self.burst_period_s / self.burst_on_s
        if pages_per_s == 0 or self.free_run:
            # Free-running, this is only how often it looks at the clock.
            return (256 if self.free_run else 0), round(_PIT_HZ / _MOST_TICKS_PER_S)
        pages_per_tick = max(1, -(-round(pages_per_s) // _MOST_TICKS_PER_S))
        ticks_per_s = max(_FEWEST_TICKS_PER_S, pages_per_s / pages_per_tick)
        return pages_per_tick, round(_PIT_HZ / ticks_per_s)

    @property
    def ticks_per_s(self) -> float:
        return _PIT_HZ / self.pace[1]

    @property
    def heartbeat_ticks(self) -> int:
        return max(1, round(self.heartbeat_interval_s * self.ticks_per_s))

    def code(self) -> bytes:
        """The guest as it lies at CODE_ADDRESS once it runs; the guest never changes it.

        Raises ImageError if it has to be assembled and that is not possible.
        """
        code = bytearray(_assembled("guest", CODE_ADDRESS))
        if code[0x10:0x18] != _MAGIC:
            raise ImageError("guest.S and image.py do not agree on the parameters")
        parameters = self._pack()
        code[0x18 : 0x18 + len(parameters)] = parameters
        return bytes(code)

    def rom(self) -> bytes:
        """The image for QEMU's `-bios`. Raises ImageError as `code` does."""
        stub = _assembled("rom", 0)
        code = self.code()
        return code + bytes(ROM_BYTES - len(code) - len(stub)) + stub

    def write_rom(self, path: Path) -> Path:
        """Write the image to `path` and return it."""
        path.write_bytes(self.rom())
        return path

    def _pack(self) -> bytes:
        pages_per_tick, reload = self.pace
        spot_pages = self.hot_spot_pages
        masks = [
            permutation_bits(spot_pages),
            permutation_bits(self.working_set_pages - spot_pages),
        ]
        burst = self.pattern is Pattern.BURST
        period = max(1, round(self.burst_period_s * self.ticks_per_s)) if burst else 1
        return struct.pack(
            "<17Q",
            self.base_bytes,
            self.working_set_pages,
            self.cold_pages,
            self.low_memory_end_bytes,
            pages_per_tick,
            reload,
            self.heartbeat_ticks,
            self.noise | self.free_run << 1 | self.is_random_order << 2,
            spot_pages,
            self.hot_spot_visits_percent if spot_pages else 0,
            max(1, round(period * self.burst_on_s / self.burst_period_s)) if burst else 1,
            period,
            *((1 << bits) - 1 for bits in masks),
            *(permutation_shift(bits) for bits in masks),
            self.reset_after_heartbeats,
        )


def permutation_bits(pages: int) -> int:
    """Bits of the power of two that the random order of `pages` pages runs over."""
    return max(0, (pages - 1).bit_length()) if pages else 0


def permutation_shift(bits: int) -> int:
    """By how much the mixing step shifts; at least 1, else it would map all numbers to 0."""
    return max(1, bits // 2)


def cache_dir() -> Path:
    """Where things built or fetched for migrd are kept, outside every checkout."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "migrd"


def _assembled(name: str, address: int) -> bytes:
    """The code of one source file, from the cache if it was assembled before."""
    source = _SOURCES / f"{name}.S"
    text = source.read_bytes()
    key = hashlib.sha256(b"%d\n" % address + text).hexdigest()[:16]
    cached = cache_dir() / "guest" / f"{name}-{key}.bin"
    try:
        return cached.read_bytes()
    except OSError:
        code = _assemble(source, address)
    with contextlib.suppress(OSError):  # no place to keep it: assembled anew next time
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cached.parent, delete=False) as aside:
            aside.write(code)
        os.replace(aside.name, cached)  # whole or absent, whoever else assembles it meanwhile
    return code


def _assemble(source: Path, address: int) -> bytes:
    missing = [tool for tool in ("as", "ld") if shutil.which(tool) is None]
    if missing:
        raise ImageError(
            f"cannot assemble the guest: {' and '.join(missing)} missing; install binutils"
        )
    with tempfile.TemporaryDirectory(prefix="migrd-guest-") as work:
        built, flat = Path(work) / "o", Path(work) / "bin"
        for command in (
            ["as", "--64", "-o", str(built), str(source)],
            [
                "ld",
                "-m",
                "elf_x86_64",
                f"-Ttext={address:#x}",
                "--oformat",
                "binary",
                "-o",
                str(flat),
                str(built),
            ],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            if done.returncode != 0:
                raise ImageError(f"cannot assemble {source.name}: {done.stderr}")
        return flat.read_bytes()
