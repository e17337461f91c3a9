"""What moves the state of a device needs of it, as Protocols (see `engine.ports` for the rules).

    MigratableDevice ── set_state ──► DeviceStream     migrd.kernel.vfio.VfioDevice, .vfio_data

All calls BLOCK, some for as long as a device takes to stop, and cannot be ended from outside: they
are made in a thread, one at a time for each device. All raise KernelError.
"""

from collections.abc import Callable
from typing import Protocol

from migrd.core.device_state import DeviceState
from migrd.core.devices import MigrationFlag


class PrecopyLeft(Protocol):
    """What a device still has to send while it runs, by its own estimate."""

    @property
    def initial_bytes(self) -> int:
        """Of what is worth loading before the stop."""

    @property
    def dirty_bytes(self) -> int:
        """Of what has changed since it was read."""


class DeviceStream(Protocol):
    """The data fd of one session: read while saving, written while loading."""

    def read(self, max_bytes: int, /) -> bytes:
        """b"": in STOP_COPY the end, in PRE_COPY nothing for now."""

    def write(self, data: bytes, /) -> None:
        """All of `data`. Raises KernelRejected when it is not this device's data."""

    def precopy_left(self) -> PrecopyLeft:
        """Raises KernelRejected outside PRE_COPY."""

    def close(self) -> None:
        """Idempotent."""


class MigratableDevice(Protocol):
    """One open VFIO device of a guest. What is passed in stays its owner's; this is a duplicate."""

    @property
    def name(self) -> str:
        """For messages."""

    def migration_abilities(self) -> frozenset[MigrationFlag] | None:
        """None: it cannot migrate."""

    def state(self) -> DeviceState:
        """Asked of the kernel, at this moment."""

    def set_state(self, target: DeviceState, /) -> DeviceStream | None:
        """Returns the data fd when that opened a session, for the caller to close. When it raises,
        the device is where it was, or anywhere on the way."""

    def stop_copy_bytes(self) -> int | None:
        """How much a STOP_COPY would send now, estimated; None: it cannot tell."""

    def reset(self) -> None:
        """Into RUNNING, with nothing left of what was in it. Raises KernelUnsupported."""

    def close(self) -> None:
        """Idempotent. The device's state survives it."""


OpenDevice = Callable[[int], MigratableDevice]
"""Takes over a device that its owner has opened, bound and passed, on a duplicate of the
descriptor. Blocks; raises KernelError."""
