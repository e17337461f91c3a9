"""What all wire models share: strictness, names, units, times.

Rules
- A model refuses what it does not know (`extra="forbid"`) and guesses nothing (`strict`): "300" is
  no number, true is no number, 1.5 is no count.
- A quantity carries its unit in its name: `_ms`, `_s`, `_bytes`, `_bytes_per_s`, `_percent`.
  Inside migrd time is seconds; durations below minutes are milliseconds here. `ms` and `seconds`
  are the only conversions.
- None means "not known" or "not yet", never zero. A figure that is not finite is not known.
- A name is safe as a file name and in a URL; a client never supplies a path, a URI or a port.
"""

import math
from datetime import UTC, datetime
from typing import Annotated, Final

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Names of VMs, hosts and profiles; the same pattern as the settings use."""
ID_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9-]{0,63}$"
LARGEST_EXACT: Final = 2**53 - 1
"""The largest integer that every JSON reader keeps exact (RFC 8259, section 6)."""
MAX_DOWNTIME_LIMIT_MS: Final = 2_000_000
"""QEMU's own limit of `downtime-limit`."""
MAX_DEADLINE_S: Final = 31_536_000
"""One year."""
MAX_MULTIFD_CHANNELS: Final = 255
"""QEMU's `multifd-channels` is a uint8."""
MAX_THROTTLE_PERCENT: Final = 99
"""QEMU's `max-cpu-throttle`."""

Name = Annotated[str, Field(pattern=NAME_PATTERN, examples=["web-1"])]
MigrationId = Annotated[
    str, Field(pattern=ID_PATTERN, examples=["5a3cbb2c-6a8f-4b0c-9d1f-0c5d5c2f6f10"])
]
Count = Annotated[int, Field(ge=0, le=LARGEST_EXACT)]
Text = Annotated[str, Field(pattern=r"^[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f]*$")]
"""Words of a person: no control characters but tab and line ends."""


def _present(given: object) -> object:
    return True if given == "" else given


Flag = Annotated[bool, BeforeValidator(_present)]
"""A parameter that may stand alone: `?dry_run`."""


class WireModel(BaseModel):
    """Base of everything that crosses HTTP."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


At = Annotated[AwareDatetime, Field(examples=["2026-11-23T10:15:30.250000Z"])]
"""A moment, RFC 3339 in UTC."""


def at(wall_s: float) -> datetime:
    """A wall-clock time of the engine, for the wire."""
    return datetime.fromtimestamp(wall_s, UTC)


def at_or_none(wall_s: float | None) -> datetime | None:
    return None if wall_s is None else at(wall_s)


def finite(figure: float | None) -> float | None:
    """A figure that JSON can carry; infinity and NaN say "not known"."""
    return figure if figure is not None and math.isfinite(figure) else None


def ms(seconds_: float | None) -> float | None:
    """Seconds as milliseconds, to the microsecond."""
    known = finite(seconds_)
    return None if known is None else round(known * 1000, 3)


def exact_ms(seconds_: float) -> float:
    """`ms` for a duration that is always known."""
    return round(seconds_ * 1000, 3)


def seconds(milliseconds: int | None) -> float | None:
    """Milliseconds of a request as the engine's seconds."""
    return None if milliseconds is None else milliseconds / 1000
