"""What is done to all devices of a guest at once, on either side (theory: direct.devices)."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final, TypeVar

from migrd.core.device_state import DeviceState
from migrd.core.devices import MigrationFlag
from migrd.direct.passed_device import DeviceLimits, Offered, PassedDevice
from migrd.engine.device_state_ports import OpenDevice
from migrd.errors import DeviceError, DeviceNeedsReset, DeviceRefused, DeviceTimedOut, MigrdError

T = TypeVar("T")
LIMITS: Final = DeviceLimits()
MOST_DEVICES: Final = 256
_S = DeviceState
_RUNS: Final = frozenset({_S.RUNNING, _S.PRE_COPY})


class AllDevices:
    """The devices of one guest, and whether the order of things was broken (rule 3)."""

    def __init__(
        self, offered: Sequence[Offered], open_device: OpenDevice, limits: DeviceLimits
    ) -> None:
        if len(offered) > MOST_DEVICES or len({one.id for one in offered}) < len(offered):
            raise DeviceRefused(
                f"{len(offered)} devices: at most {MOST_DEVICES}, each with an id of its own",
                code="bad_devices",
            )
        self.devices = {one.id: PassedDevice(one, open_device, limits) for one in offered}
        self.failed: BaseException | None = None

    @property
    def states(self) -> Mapping[str, DeviceState | None]:
        """Where each was last seen; None: not known."""
        return {one.id: one.state for one in self.devices.values()}

    async def close(self) -> bool:
        """Idempotent; their states stay. False: some call of the kernel's goes on, and its device
        is closed when that ends."""
        return all(await all_ended(one.close() for one in self.devices.values()))

    async def open_all(self) -> None:
        devices = self.devices.values()
        await all_ended(one.open() for one in devices)
        without = [one for one in devices if MigrationFlag.P2P not in one.can]
        if without and len(devices) > 1:
            raise DeviceRefused(
                f"{without[0].name} has no P2P state, and the guest has {len(devices)} devices:"
                " one would be stopped while another still writes to it",
                code="device_no_p2p",
            )

    async def run_all(self) -> None:
        """All to RUNNING, by way of P2P. Those that cannot do not keep the others from it; the
        error tells of all of them."""
        devices = list(self.devices.values())
        failures: dict[str, MigrdError] = {}

        async def attempt(device: PassedDevice, call: Callable[[], Awaitable[object]]) -> None:
            if isinstance(failures.get(device.id), DeviceTimedOut):
                return  # it does not answer: the guest waits for this one
            try:
                await again(call)
                failures.pop(device.id, None)
            except MigrdError as failure:
                failures[device.id] = failure

        await all_ended(attempt(one, one.look) for one in devices)
        # Those that run may meet a stopped peer already; they need no step aside.
        held = [one for one in devices if one.state not in _RUNS and MigrationFlag.P2P in one.can]
        await all_ended(attempt(one, partial(one.move, _S.RUNNING_P2P)) for one in held)
        await all_ended(attempt(one, partial(one.move, _S.RUNNING)) for one in devices)
        if failures:
            raise _joined(list(failures.values()))

    @contextlib.contextmanager
    def unbroken(self) -> Iterator[None]:
        """Rule 3."""
        self.refuse_broken()
        try:
            yield
        except BaseException as failure:
            self.failed = failure
            raise

    def refuse_broken(self) -> None:
        if self.failed is not None:
            raise DeviceRefused(
                f"moving the devices' state was broken off: {self.failed}",
                code="device_session_broken",
            ) from self.failed


async def run_devices(
    offered: Sequence[Offered], open_device: OpenDevice, limits: DeviceLimits = LIMITS
) -> None:
    """All to RUNNING, before the process resumes the guest: for who has no SourceDevices or
    DestinationDevices of it (any more). Nothing happens to those that run. May be repeated.

    Raises DeviceError when some device does not run, once all others do.
    """
    devices = AllDevices(offered, open_device, limits)
    try:
        await devices.run_all()
    finally:
        await devices.close()


async def again(call: Callable[[], Awaitable[object]]) -> None:
    """Once more when it fails: on the way back a passing failure must not keep a guest stopped."""
    try:
        await call()
    except (DeviceNeedsReset, DeviceTimedOut):
        raise
    except MigrdError:
        await call()


async def all_ended(work: Iterable[Awaitable[T]]) -> list[T]:
    """All at once; when some fail, all others still end before the first failure is raised."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


def _joined(failures: Sequence[MigrdError]) -> MigrdError:
    """One error for all: the class of the worst, the messages of all."""
    worst = next((one for one in failures if isinstance(one, DeviceNeedsReset)), failures[0])
    kind = type(worst) if isinstance(worst, DeviceError) else DeviceError
    joined = kind("; ".join(one.message for one in failures), code=worst.code)
    joined.__cause__ = worst
    return joined
