"""The dirty rates of devices of all VMs here, sampled one after the other.

One task for all: samples of different VMs never cost kernel time at once. What was found last is
kept with what is held of the VM (`DeviceHolding.rates_of`), for whoever asks; nobody waits for a
sample, and none outlives its QEMU. A VM has none while migrd holds no reference to its iommufds.
"""

import asyncio
from collections.abc import Sequence
from typing import Final
from weakref import WeakKeyDictionary

import structlog

from migrd.core.dma_rate import SampledRate
from migrd.core.phases import Phase
from migrd.engine.device_holding import DeviceHolding
from migrd.engine.device_ports import OpenDevices
from migrd.engine.dma_sampler import DmaSampler, Limits
from migrd.engine.migrations import Migrations
from migrd.engine.outgoing import Outgoing
from migrd.engine.vms import Entry
from migrd.errors import KernelError

log = structlog.get_logger(__name__)

SAMPLE_S: Final = 30.0
"""A sample that takes longer is given up."""


class DmaSampling:
    """Samples every VM in turn; see the module."""

    def __init__(self, migrations: Migrations, holding: DeviceHolding) -> None:
        self._migrations = migrations
        self._world = migrations.world
        self._holding = holding
        self._samplers: WeakKeyDictionary[OpenDevices, DmaSampler] = WeakKeyDictionary()

    async def watch(self) -> None:
        """Runs until cancelled."""
        while True:
            await asyncio.sleep(self._world.options.dma_sample_interval_s)
            for entry in self._migrations.vms.all():
                vmm = entry.vmm
                if vmm is not None and not vmm.is_dead and self._holding.is_held(vmm.instance):
                    rates = await self._sample(entry, self._holding.of(vmm.instance))
                    self._holding.note_rates(vmm.instance, rates)

    async def _sample(self, entry: Entry, held: Sequence[OpenDevices]) -> Sequence[SampledRate]:
        found: list[SampledRate] = []
        for opened in held:
            try:
                async with asyncio.timeout(SAMPLE_S):
                    rates = await self._sampler(opened).sample(tracking_is_on=self._tracks(entry))
            except (KernelError, TimeoutError) as exc:
                why = str(exc) or f"not over within {SAMPLE_S:g} s"
                log.debug("no sample of dirty DMA", vm=entry.spec.name, cause=why)
                continue
            except Exception as exc:  # what is only looked at must not end the daemon
                why = f"{type(exc).__name__}: {exc}"
                log.error("sampling dirty DMA failed", vm=entry.spec.name, cause=why)
                continue
            now_s = self._world.clock.wall_s()
            for hwpt, rate in rates.items():
                devices = _devices_of(entry, self._holding.objects_of(opened), hwpt.iommufd)
                found.append(SampledRate(devices, hwpt.iommufd, hwpt.hwpt_id, rate, now_s))
        return found

    def _sampler(self, opened: OpenDevices) -> DmaSampler:
        sampler = self._samplers.get(opened)
        if sampler is None:
            limits = Limits(budget_s=self._world.options.dma_sample_budget_s)
            sampler = self._samplers[opened] = DmaSampler(opened, self._world.clock, limits)
        return sampler

    def _tracks(self, entry: Entry) -> bool:
        """QEMU has switched tracking on: its first dirty sync is over."""
        m = self._migrations.active_of(entry.spec.name)
        return isinstance(m, Outgoing) and m.state.phase is Phase.PRECOPY and bool(m.rounds)


def _devices_of(entry: Entry, objects: Sequence[str], iommufd: int) -> tuple[str, ...]:
    """Those that are on the n-th of these iommufd objects now: devices come and go."""
    if entry.decision is None or iommufd >= len(objects):
        return ()
    parts = entry.decision.plan.iommufds
    return next((part.devices for part in parts if part.id == objects[iommufd]), ())
