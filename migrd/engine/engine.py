"""The engine as one thing with a lifecycle: `async with Engine(world, ...)`.

Entering replays the journal and takes everything up again; leaving stops all tasks and touches
neither a QEMU nor a guest: a restarted daemon goes on from the journal.
"""

import asyncio
from types import TracebackType
from typing import Final, Self

import structlog

from migrd.engine.decisions import Decisions
from migrd.engine.device_holding import DeviceHolding
from migrd.engine.device_start import DeviceStart
from migrd.engine.host import HostFacts
from migrd.engine.migrations import Migrations
from migrd.engine.reception import Reception
from migrd.engine.recovery import recover
from migrd.engine.reevaluation import Reevaluation
from migrd.engine.registry import Registry
from migrd.engine.sampler import Sampler
from migrd.engine.strays import Strays
from migrd.engine.vms import VmTable
from migrd.engine.world import World

log = structlog.get_logger(__name__)

RESCAN_S: Final = 2.0


class Engine:
    """`service` for the API, `reception` for peers."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._group = asyncio.TaskGroup()
        self.vms = VmTable(world, self._group)
        self.host = HostFacts(world)
        self.decisions = Decisions(world, self.vms)
        self.holding = DeviceHolding(world, self._group)
        starts = DeviceStart(world, self.decisions, self.holding, self.host.devices)
        self.migrations = Migrations(world, self.vms, self._group, starts)
        self.strays = Strays(self.migrations)
        self.sampler = Sampler(self.migrations, self.holding, self._group)
        self.service = Registry(self.migrations, self.host, self.sampler)
        self.reception = Reception(self.migrations)

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        try:
            self._group.create_task(self.host.devices.watch(), name="devices")
            await recover(self.migrations, self.strays)
            await self.host.devices.first_look()
        except BaseException:
            await self._end()
            raise
        self.host.recovered = True
        self._group.create_task(self.host.watch(), name="peers")
        self._group.create_task(self._rescan(), name="rescan")
        self._group.create_task(self.sampler.watch(), name="rates")
        again = Reevaluation(self._world, self.vms, self.decisions)
        self._group.create_task(again.watch(), name="decisions")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._end()

    async def _end(self) -> None:
        """Cancel every task of the group and wait for it."""
        stop = _raise_stopped()
        try:
            self._group.create_task(stop, name="stop")
        except RuntimeError:  # a task has failed, and the group is ending already
            stop.close()
        try:
            await self._group.__aexit__(None, None, None)
        except* _Stopped:
            pass
        finally:
            await self.holding.close()

    async def _rescan(self) -> None:
        """VMs that others launch come and go; the rescan is the truth."""
        while True:
            await asyncio.sleep(RESCAN_S)
            try:
                await self.strays.look_again()
            except Exception as exc:  # one bad directory must not end the daemon
                log.error("looking for VMs failed", exc_info=exc)


class _Stopped(Exception):
    """Ends the task group."""


async def _raise_stopped() -> None:
    raise _Stopped
