"""One device of a guest, passed by its process: its state, its session, and its way back.

    PassedDevice ── Lane (its thread) ── MigratableDevice (the kernel)

Rules
1. Where the device stands is asked of the kernel before each move, never remembered: it may have
   been left anywhere by a daemon that died.
2. A move that fails goes to the state that the arcs name for it (core.device_state); the error says
   where the device stands then. Nothing here resets a device unless `reset` is called.
3. What opens a session stores its stream in the same thread, so that no cancellation loses it; the
   stream of a session that is over is closed there too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from migrd.core.device_state import (
    RESET_ONLY,
    SAVING,
    DeviceState,
    NoWay,
    fall_back,
    way,
)
from migrd.core.devices import MigrationFlag
from migrd.direct.device_frames import LARGEST_CHUNK_BYTES
from migrd.direct.device_lane import Lane
from migrd.engine.device_state_ports import (
    DeviceStream,
    MigratableDevice,
    OpenDevice,
    PrecopyLeft,
)
from migrd.errors import (
    DeviceError,
    DeviceNeedsReset,
    DeviceRefused,
    KernelError,
    KernelTooOld,
    KernelUnsupported,
    MigrdError,
)

T = TypeVar("T")
_SESSIONS: Final = SAVING | {DeviceState.RESUMING}


class Offered(Protocol):
    """A device as its process hands it over; the descriptor stays with who received it."""

    @property
    def id(self) -> str: ...

    @property
    def device_fd(self) -> int: ...


@dataclass(frozen=True)
class DeviceLimits:
    """How long the kernel may take, and how much is in memory at once."""

    arc_s: float = 10.0
    """One arc from state to state. Real devices take milliseconds to a second."""
    call_s: float = 10.0
    """Anything else that is asked: a read, a write, a question."""
    chunk_bytes: int = LARGEST_CHUNK_BYTES
    """Of one read; no larger."""
    streams: int = 4
    """Devices that are read at once. Two chunks of each are in memory."""


class PassedDevice:
    """Its calls raise DeviceTimedOut when the kernel does not answer, besides what they say."""

    def __init__(self, offered: Offered, open_device: OpenDevice, limits: DeviceLimits) -> None:
        self.id = offered.id
        self.name = f"device {offered.id}"
        self.can: frozenset[MigrationFlag] = frozenset()
        self.state: DeviceState | None = None
        """As last seen; None: not known."""
        self._fd = offered.device_fd
        self._open_device = open_device
        self._limits = limits
        self._lane: Lane | None = None
        self._is_closed = False
        self._device: MigratableDevice | None = None
        self._stream: DeviceStream | None = None

    @property
    def has_session(self) -> bool:
        return self._stream is not None

    async def open(self) -> None:
        """Idempotent. Raises DeviceRefused when it cannot migrate, KernelError."""
        await self._run("opening", self._opened)
        if MigrationFlag.STOP_COPY not in self.can:
            raise DeviceRefused(
                f"{self.name} cannot migrate: its driver has no migration states",
                code="device_cannot_migrate",
            )

    async def look(self) -> DeviceState:
        """Where it stands, asked now. Raises KernelError."""
        return await self._run("asking", self._looked)

    async def move(self, target: DeviceState) -> None:
        """Bring it there; nothing happens when it is there.

        Raises DeviceRefused (`no_way`: nothing was changed), DeviceNeedsReset, or DeviceError with
        the code `device_fell_back` or `device_astray`; both say where it stands.
        """
        try:
            arcs = len(way(self.state or target, target, self.can)) - 1
        except NoWay:
            arcs = 1  # told apart by what the kernel says of its state
        limit_s = self._limits.arc_s * max(1, arcs)
        await self._run(f"bringing to {target.name}", lambda: self._moved(target), limit_s)

    async def reset(self) -> None:
        """Into RUNNING, with nothing left of what was in it. Raises KernelError."""
        await self._run("resetting", self._reset, self._limits.arc_s)

    async def read(self) -> bytes:
        """The next chunk of its session. Raises KernelError; what it had read is lost then."""
        return await self._run("reading", lambda: self._session().read(self._limits.chunk_bytes))

    async def write(self, chunk: bytes) -> None:
        """Raises KernelError; what the device holds then is undefined."""
        await self._run("writing", lambda: self._session().write(chunk))

    async def precopy_left(self) -> PrecopyLeft | None:
        """None: its driver cannot tell. Raises KernelError."""
        return await self._run("asking", lambda: _told(lambda: self._session().precopy_left()))

    async def stop_copy_bytes(self) -> int | None:
        """None: its driver cannot tell. Raises KernelError."""
        return await self._run("asking", lambda: self._open().stop_copy_bytes())

    async def close(self) -> bool:
        """Idempotent. False: a call of the kernel's goes on, and it is closed when that ends."""
        self._is_closed = True
        if self._lane is None:
            return True
        return await self._lane.close(self._closed, limit_s=self._limits.call_s)

    async def _run(self, what: str, call: Callable[[], T], limit_s: float | None = None) -> T:
        if self._is_closed:
            raise DeviceRefused(f"{self.name} is closed", code="device_closed")
        if self._lane is None:
            self._lane = Lane(self.name)
        limit = self._limits.call_s if limit_s is None else limit_s
        return await self._lane.run(what, call, limit_s=limit)

    # ---- in its thread

    def _opened(self) -> None:
        if self._device is None:
            device = self._open_device(self._fd)
            try:
                self.can = device.migration_abilities() or frozenset()
            except BaseException:
                device.close()
                raise
            self._device = device
            self.name = f"device {self.id} ({device.name})"

    def _open(self) -> MigratableDevice:
        self._opened()
        assert self._device is not None
        return self._device

    def _session(self) -> DeviceStream:
        if self._stream is None:
            raise DeviceRefused(f"{self.name} has no session", code="no_device_session")
        return self._stream

    def _looked(self) -> DeviceState:
        self.state = None
        return self._stands(self._open().state())

    def _moved(self, target: DeviceState) -> None:
        start = self._looked()
        if start == target:
            return
        try:
            back = fall_back(start, target, self.can)
        except NoWay as cause:
            raise self._no_way(start, target) from cause
        try:
            session = self._open().set_state(target)
        except KernelError as failure:
            raise self._fell_back(back, failure) from failure
        if session is not None:
            self._end_session()
            self._stream = session
        self._stands(target)

    def _stands(self, state: DeviceState) -> DeviceState:
        self.state = state
        if state not in _SESSIONS:
            self._end_session()
        return state

    def _no_way(self, start: DeviceState, target: DeviceState) -> DeviceError:
        if start == DeviceState.ERROR or not start.is_known:
            return self._needs_reset(start)
        return DeviceRefused(
            f"{self.name} stands in {start.name}; no way leads to {target.name}", code="no_way"
        )

    def _fell_back(self, back: DeviceState | None, failure: KernelError) -> DeviceError:
        """Go there, and tell where it stands."""
        here = self._asked()
        if here == DeviceState.ERROR or (here is not None and not here.is_known):
            return self._needs_reset(here, failure)
        if back is RESET_ONLY:
            return self._needs_reset(here or DeviceState.RESUMING, failure)
        if here != back:
            try:
                session = self._open().set_state(back)
            except KernelError:
                pass  # told by where it stands
            else:
                if session is not None:
                    session.close()
            here = self._asked()
        if here == DeviceState.ERROR:
            return self._needs_reset(here, failure)
        if here == back:
            return DeviceError(
                f"{failure.message}; it stands in {back.name} again", code="device_fell_back"
            )
        stands = "where it stands is not known" if here is None else f"it stands in {here.name}"
        return DeviceError(
            f"{failure.message}; {stands}, and the way back to {back.name} failed too",
            code="device_astray",
        )

    def _asked(self) -> DeviceState | None:
        try:
            return self._looked()
        except KernelError:
            return None

    def _needs_reset(self, here: DeviceState, failure: MigrdError | None = None) -> DeviceError:
        why = "" if failure is None else f"{failure.message}; "
        return DeviceNeedsReset(
            f"{why}{self.name} stands in {here.name}: only a reset leads out of it, and the state"
            " in the device is lost with it"
        )

    def _reset(self) -> None:
        try:
            self._open().reset()
        finally:
            self._asked()

    def _end_session(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def _closed(self) -> None:
        self._end_session()
        device, self._device = self._device, None
        if device is not None:
            device.close()


def _told(ask: Callable[[], T]) -> T | None:
    try:
        return ask()
    except (KernelTooOld, KernelUnsupported):
        return None
