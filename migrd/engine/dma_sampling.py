"""The dirty rates of a VM's devices, as one of its sources (engine.sampler asks it).

Each set looks once at all page tables of the VM, for as long as one window: bits are never cleared
between looks, so a second and longer window would see less, not more, and tell nothing of a working
set. What was found last is kept with what is held of the VM (`DeviceHolding.rates_of`), and none
outlives its QEMU. A VM has none while migrd holds no reference to its iommufds.

It goes on in migrations. Outside of them QEMU has not switched the tracking on: no bit is ever set,
and the readings say `unproven`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final
from weakref import WeakKeyDictionary

from migrd.core.dma_rate import DmaRate, SampledRate
from migrd.core.phases import Phase
from migrd.core.rate_reading import RateReading, Tracker, of_devices
from migrd.engine.device_holding import DeviceHolding
from migrd.engine.device_ports import HwptRef, OpenDevices
from migrd.engine.dma_sampler import DmaSampler, Limits
from migrd.engine.migrations import Migrations
from migrd.engine.outgoing import Outgoing
from migrd.engine.vms import Entry
from migrd.errors import KernelError

WINDOW_S: Final = 1.0


class DmaSource:
    """The writes of one VM's devices, by peeks at its page tables."""

    tracker = Tracker.IOMMU
    name = "peeks at page tables"
    goes_on_in_migration = True

    def __init__(
        self, migrations: Migrations, holding: DeviceHolding, vm: str, instance: str
    ) -> None:
        self._migrations = migrations
        self._world = migrations.world
        self._holding = holding
        self._vm = vm
        self._instance = instance
        self._samplers: WeakKeyDictionary[OpenDevices, DmaSampler] = WeakKeyDictionary()
        self.interval_s = self._world.options.dma_sample_interval_s

    async def windows(self) -> Sequence[float]:
        return (WINDOW_S,)

    async def measure(self, window_s: float) -> RateReading:
        """Raises KernelError when some of the VM's iommufds could not be looked at, and no other
        has a page table."""
        found: list[SampledRate] = []
        cost_s, failure = 0.0, None
        try:
            for opened in self._holding.of(self._instance):
                sampler = self._sampler(opened, window_s)
                try:
                    seen = await sampler.sample(tracking_is_on=self._tracks())
                except KernelError as exc:
                    failure = exc
                    continue
                cost_s += sampler.cost_s
                found += self._told(opened, seen)
        finally:
            self._holding.note_rates(self._instance, found)
        if failure is not None and not found:
            raise failure
        return of_devices([sampled.rate for sampled in found], cost_s=cost_s)

    def _told(self, opened: OpenDevices, seen: Mapping[HwptRef, DmaRate]) -> Iterator[SampledRate]:
        entry, now_s = self._migrations.vms.get(self._vm), self._world.clock.wall_s()
        objects = self._holding.objects_of(opened)
        for hwpt, rate in seen.items():
            devices = () if entry is None else _devices_of(entry, objects, hwpt.iommufd)
            yield SampledRate(devices, hwpt.iommufd, hwpt.hwpt_id, rate, now_s)

    def _sampler(self, opened: OpenDevices, window_s: float) -> DmaSampler:
        sampler = self._samplers.get(opened)
        if sampler is None:
            limits = Limits(window_s, budget_s=self._world.options.dma_sample_budget_s)
            sampler = self._samplers[opened] = DmaSampler(opened, self._world.clock, limits)
        return sampler

    def _tracks(self) -> bool:
        """QEMU has switched tracking on: its first dirty sync is over."""
        m = self._migrations.active_of(self._vm)
        return isinstance(m, Outgoing) and m.state.phase is Phase.PRECOPY and bool(m.rounds)


def _devices_of(entry: Entry, objects: Sequence[str], iommufd: int) -> tuple[str, ...]:
    """Those that are on the n-th of these iommufd objects now: devices come and go."""
    if entry.decision is None or iommufd >= len(objects):
        return ()
    parts = entry.decision.plan.iommufds
    return next((part.devices for part in parts if part.id == objects[iommufd]), ())
