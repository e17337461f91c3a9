"""Bounds of the memory stream, the same record for both sides."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StreamLimits:
    """Every wait has a deadline and every length a bound; the defaults suit most hosts."""

    connect_s: float = 10.0
    """From the start of a connection to the end of its opening, TLS included."""
    stall_s: float = 30.0
    """How long a record that has begun may make no progress, in either direction."""
    idle_s: float = 3600.0
    """How long a destination waits for the next record; the migration's own deadline is shorter."""
    rebuild_s: float = 120.0
    """How long the source waits for READY: the destination makes the memory meanwhile."""
    load_s: float = 120.0
    """How long the source waits for LOADED: the destination loads devices and state meanwhile."""
    memory_bytes: int = 24 << 40
    """The largest guest a destination takes."""
    device_bytes: int = 64 << 30
    """Of all devices together, per session."""
    state_bytes: int = 64 << 20
    """Of the opaque state of the process."""
    reserve: bool = False
    """The destination takes all memory before READY, so that it cannot run out half-way."""
