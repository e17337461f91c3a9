"""Figures as people read them, and foreign text made harmless.

Everything a daemon sends may come from somewhere else: a VM's name, QEMU's error text, another
host's message. Printed raw, an escape sequence in it could repaint the terminal, and a
right-to-left mark could turn a word around. So every foreign string goes through `printable()`
before it is shown, and no markup is ever read from it.
"""

import time
import unicodedata
from typing import Final

_KIB: Final = 1024
_BYTE_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_HARMLESS: Final = frozenset({"Zs"})
_DANGEROUS: Final = frozenset("CZ")
"""First letters of the Unicode categories of controls, surrogates, formats and separators."""

UNKNOWN: Final = "-"
"""Shown where the daemon does not know."""


def printable(text: str, *, limit: int = 4000) -> str:
    """`text` on one line, with everything that could steer a terminal written out as an escape."""
    shown = "".join(_harmless(character) for character in text[:limit])
    return shown if len(text) <= limit else f"{shown}… ({len(text)} characters)"


def _harmless(character: str) -> str:
    if " " <= character <= "~":
        return character
    category = unicodedata.category(character)
    if category in _HARMLESS:
        return " "
    if category[0] not in _DANGEROUS:
        return character
    point = ord(character)
    if point <= 0xFF:
        return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(character, f"\\x{point:02x}")
    return f"\\u{point:04x}" if point <= 0xFFFF else f"\\U{point:08x}"


def size(bytes_: float | None) -> str:
    """`1.5 GiB`; three figures at most, whole below ten KiB."""
    if bytes_ is None:
        return UNKNOWN
    amount, unit = float(bytes_), _BYTE_UNITS[0]
    for unit in _BYTE_UNITS:
        if abs(amount) < _KIB - 0.5 or unit == _BYTE_UNITS[-1]:
            break
        amount /= _KIB
    if unit == "B" or abs(amount) >= 99.95:
        return f"{amount:.0f} {unit}"
    return f"{amount:.1f} {unit}"


def rate(bytes_per_s: float | None) -> str:
    """`117 MiB/s`."""
    return UNKNOWN if bytes_per_s is None else f"{size(bytes_per_s)}/s"


def percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{share:.0f} %"


def span(seconds: float | None) -> str:
    """A duration: `0.4 ms`, `42 ms`, `1.24 s`, `12.3 s`, `2 min 05 s`, `3 h 07 min`, `2 d 4 h`."""
    if seconds is None:
        return UNKNOWN
    if seconds < 0.0005:
        return "0 ms" if seconds <= 0 else f"{seconds * 1000:.1f} ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def clock(wall_s: float | None) -> str:
    """Local time of day; with the date when it was not today."""
    if wall_s is None:
        return UNKNOWN
    try:
        when = time.localtime(wall_s)
    except (OverflowError, OSError, ValueError):
        return UNKNOWN
    today = time.strftime("%Y-%m-%d") == time.strftime("%Y-%m-%d", when)
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", when)


def ago(wall_s: float | None, now_s: float | None = None) -> str:
    """`12 s ago`, coarse."""
    if wall_s is None:
        return UNKNOWN
    passed_s = max(0.0, (time.time() if now_s is None else now_s) - wall_s)
    for length_s, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if passed_s >= length_s:
            return f"{passed_s // length_s:.0f} {unit} ago"
    return f"{passed_s:.0f} s ago"


def brief_version(version: str) -> str:
    """`7.2.22 (Debian 1:7.2+dfsg-7)` -> `7.2.22`."""
    return version.split(" ", 1)[0]


def yes_no(fact: bool | None) -> str:
    """Three answers: not known is not no."""
    return {True: "yes", False: "no", None: "unknown"}[fact]


def word(phase: str) -> str:
    """A code as words: `rolled_back` -> `rolled back`."""
    return printable(phase).replace("_", " ")
