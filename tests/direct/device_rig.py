"""Simulated devices that are watched, held up, or struck at their n-th call.

Rig.system ── lock (calls come from several threads) ── VfioKernel
    ├─ strike   the n-th counted call fails, before or after its effect
    ├─ hold     a call of one kind hangs until it is let go
    └─ trace    every state that every device went through, in order
"""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from migrd.abi import vfio as abi
from migrd.abi.vfio import vfio_device_mig_state as S
from migrd.direct.devices import DestinationDevices, DeviceLimits, SourceDevices
from migrd.direct.offer import OfferedDevice
from migrd.engine.device_state_ports import MigratableDevice
from migrd.kernel.calls import Argument
from migrd.kernel.vfio import VfioDevice
from migrd.kernel.vfio_calls import SystemCalls
from tests.fakes.iommufd import _identity
from tests.fakes.vfio import IOMMU_PATH, VfioKernel
from tests.fakes.vfio_device import SimDevice, SimSession, oserror

Step = tuple[str, str]
"""(device, state)"""
_FEATURE_HEADER_BYTES = 8
SMALL = DeviceLimits(arc_s=5.0, call_s=5.0, chunk_bytes=16)
"""So that there are several chunks."""


@dataclass
class Watched(SimDevice):
    """A device that tells where it goes, and may have more to send the longer it runs."""

    name: str = ""
    trace: list[Step] = field(default_factory=list)
    grows_by: bytes = b""
    """Dirtied anew after each read in PRE_COPY."""

    def _step(self, step: S) -> SimSession | None:
        opened = super()._step(step)
        self.trace.append((self.name, step.name))
        return opened


@dataclass
class Strike:
    """What happens to one call."""

    number: int
    after_effect: bool
    seen: int = 0
    struck: str | None = None

    def __call__(self, name: str, call: Callable[[], Any], undo: Callable[[], None]) -> Any:
        self.seen += 1
        if self.seen != self.number:
            return call()
        self.struck = name
        if self.after_effect:
            call()
            undo()
        raise oserror(errno.EIO)


class Hold:
    """Calls of one kind hang until `let_go`; the first `times` of them."""

    def __init__(self, is_it: Callable[[int, Argument], bool], times: int = 1) -> None:
        self.is_it = is_it
        self.times = times
        self.reached = threading.Event()
        self._gate = threading.Event()

    def let_go(self) -> None:
        self._gate.set()

    def __call__(self, request: int, argument: Argument) -> None:
        if self.is_it(request, argument) and self.times:
            self.times -= 1
            self.reached.set()
            assert self._gate.wait(60)


def sets_state(target: S) -> Callable[[int, Argument], bool]:
    """Is it the ioctl that asks for `target`?"""

    def is_it(request: int, argument: Argument) -> bool:
        if request != abi.VFIO_DEVICE_FEATURE or not isinstance(argument, bytearray):
            return False
        header = abi.vfio_device_feature.from_buffer_copy(argument)
        wanted = abi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE | abi.VFIO_DEVICE_FEATURE_SET
        body = argument[_FEATURE_HEADER_BYTES:]
        return bool(header.flags == wanted) and int.from_bytes(body[:4], "little") == target

    return is_it


_LOCK = threading.RLock()


class Rig:
    """Devices of one guest, opened and bound."""

    def __init__(self, kernel: VfioKernel | None = None) -> None:
        self.kernel = kernel or VfioKernel()
        self._open_before = None if kernel else Counter(self.kernel.left_open())
        self.trace: list[Step] = []
        self.sims: dict[str, Watched] = {}
        self.offered: list[OfferedDevice] = []
        self.strike: Strike | None = None
        self.hold: Hold | None = None
        self.reads = 0
        self._lock = _LOCK
        self._iommufd = self.kernel.open_path(IOMMU_PATH, os.O_CLOEXEC)

    def add(self, name: str, **properties: Any) -> Watched:
        sim = Watched(name=name, trace=self.trace, **properties)
        fd = self.kernel.open_path(self.kernel.add(sim), os.O_CLOEXEC)
        bound = abi.vfio_device_bind_iommufd(iommufd=self._iommufd)
        self.kernel._bind(self.kernel._files[_identity(fd)], bound)
        self.sims[name] = sim
        self.offered.append(OfferedDevice(name, fd))
        return sim

    def open_device(self, fd: int) -> MigratableDevice:
        with self._lock:
            device = VfioDevice.adopt(fd, self.system)
            sim = self.kernel.device_of(fd)
            assert isinstance(sim, Watched)
            device.name = sim.name
            return device

    @property
    def system(self) -> SystemCalls:
        plain = self.kernel.system
        return replace(
            plain,
            close=lambda fd: self._locked(lambda: plain.close(fd)),
            read=lambda fd, count: self._counted("read", lambda: self._read(fd, count)),
            write=lambda fd, view: self._counted("write", lambda: plain.write(fd, view)),
            ioctl=self._ioctl,
        )

    def states(self) -> list[str]:
        return [S(sim.state).name for sim in self.sims.values()]

    def steps_of(self, name: str) -> list[str]:
        return [state for one, state in self.trace if one == name]

    def close(self) -> None:
        for one in self.offered:
            self.kernel.close_fd(one.device_fd)
        self.kernel.close_fd(self._iommufd)
        if self._open_before is not None:
            assert not Counter(self.kernel.left_open()) - self._open_before

    def _read(self, fd: int, count: int) -> bytes:
        self.reads += 1
        chunk = self.kernel.system.read(fd, count)
        device = self.kernel._session(fd).device
        if isinstance(device, Watched) and device.state == S.PRE_COPY and device.session:
            device.session.stream += device.grows_by
        return chunk

    def _ioctl(self, fd: int, request: int, argument: Argument, /) -> int:
        if self.hold is not None:
            self.hold(request, argument)
        name = "ioctl" if not isinstance(argument, bytearray) else f"feature {argument[4]}"

        def forget_session() -> None:
            if isinstance(argument, bytearray) and sets_any_state(argument):
                data_fd = int.from_bytes(argument[12:16], "little", signed=True)
                if data_fd >= 0:
                    self.kernel.close_fd(data_fd)

        return int(
            self._counted(name, lambda: self.kernel.ioctl(fd, request, argument), forget_session)
        )

    def _counted(
        self, name: str, call: Callable[[], Any], undo: Callable[[], None] = lambda: None
    ) -> Any:
        def struck() -> Any:
            return call() if self.strike is None else self.strike(name, call, undo)

        return self._locked(struck)

    def _locked(self, call: Callable[[], Any]) -> Any:
        with self._lock:
            return call()


def sets_any_state(argument: bytearray) -> bool:
    return any(sets_state(state)(abi.VFIO_DEVICE_FEATURE, argument) for state in S)


def in_order(trace: Sequence[Step], early: set[str], late: set[str]) -> bool:
    """Did every device go through one of `early` before any went to one of `late`?"""
    names = {name for name, _ in trace}
    return all(
        name in {one for one, state in trace[:at] if state in early}
        for at, (_, state) in enumerate(trace)
        if state in late
        for name in names
    )


def strikes() -> Iterator[Strike]:
    """The n-th call, before and after its effect, for ever: break when none was struck."""
    number = 0
    while True:
        number += 1
        yield Strike(number, after_effect=False)
        yield Strike(number, after_effect=True)


def source_of(rig: Rig, limits: DeviceLimits = SMALL) -> SourceDevices:
    return SourceDevices(rig.offered, rig.open_device, limits)


def destination_of(rig: Rig, limits: DeviceLimits = SMALL) -> DestinationDevices:
    return DestinationDevices(rig.offered, rig.open_device, limits)
