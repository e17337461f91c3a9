"""Quantities as people type them: `100MiB/s`, `1.5G`, `500ms`, `10min`.

Plain numbers mean the unit in the option's name. Letters are powers of 1024 with an `i` and of 1000
without, as in IEC 80000-13; `Mbit/s` and the like are bits, which is how networks are sold. `Mb/s`
means either to different people, eight times apart, so it is refused.
"""

import re
from collections.abc import Mapping
from typing import Final

import click

_NUMBER = re.compile(r"^\s*([0-9]+(?:[.,][0-9]+)?)\s*([A-Za-z]*(?:/s)?)\s*$")
_BYTES: Final[Mapping[str, float]] = {
    "": 1,
    "b": 1,
    **{
        f"{letter}{suffix}": base**power
        for power, letter in enumerate("kmgt", start=1)
        for suffix, base in (("", 1000), ("b", 1000), ("i", 1024), ("ib", 1024))
    },
    **{
        f"{letter}{suffix}": base**power / 8
        for power, letter in enumerate("kmgt", start=1)
        for suffix, base in (("bit", 1000), ("ibit", 1024))
    },
}
_SECONDS: Final[Mapping[str, float]] = {
    "ms": 0.001,
    "s": 1,
    "sec": 1,
    "min": 60,
    "m": 60,
    "h": 3600,
    "d": 86400,
}


def _split(text: str) -> tuple[float, str] | None:
    match = _NUMBER.match(text)
    if match is None:
        return None
    return float(match[1].replace(",", ".")), match[2]


def bytes_per_s(text: str) -> int:
    """Bytes per second; raises ValueError on what is not a rate. `0` and `unlimited` are 0."""
    if text.strip().lower() in ("unlimited", "none"):
        return 0
    parts = _split(text)
    if parts is None:
        raise ValueError(text)
    amount, unit = parts
    unit = unit.removesuffix("/s")
    if unit.endswith("b") or unit.lower() not in _BYTES:
        raise ValueError(text)
    return round(amount * _BYTES[unit.lower()])


def seconds(text: str, *, unit: str) -> float:
    """Seconds; a bare number is in `unit`. Raises ValueError on what is not a duration."""
    parts = _split(text)
    if parts is None:
        raise ValueError(text)
    amount, given = parts
    if (given or unit).lower() not in _SECONDS:
        raise ValueError(text)
    return amount * _SECONDS[(given or unit).lower()]


def rate(text: str) -> int:
    """For an option: `100MiB/s`, `1Gbit/s`, `unlimited`."""
    try:
        return bytes_per_s(text)
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is not a rate: write 100MiB/s, 1Gbit/s or unlimited"
        ) from None


def whole_ms(text: str) -> int:
    """For an option in milliseconds: `300`, `300ms`, `1.5s`."""
    return _whole(text, "ms", "300ms or 1.5s")


def whole_s(text: str) -> int:
    """For an option in seconds: `90`, `90s`, `10min`, `2h`."""
    return _whole(text, "s", "90s or 10min")


def _whole(text: str, unit: str, hint: str) -> int:
    try:
        return round(seconds(text, unit=unit) / _SECONDS[unit])
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a duration: write {hint}") from None


def setting(text: str) -> tuple[str, str | int | bool]:
    """For an option: `key=value`; digits become numbers, true and false become booleans."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise click.BadParameter(f"{text!r} is not key=value")
    if value in ("true", "false"):
        return key, value == "true"
    return key, int(value) if re.fullmatch(r"-?[0-9]{1,18}", value) else value
