"""A QEMU with passthrough devices: asked, decided, opened, launched.

    probe ──► decide ──► (the caller records the decision) ──► open ──► launch ──► hand over, hold
                 ▲                                                         │ QEMU died: the kernel
                 └── one rung down (core.attach_words), recorded again ◄───┘ refused a page table

- What a probe answers may contradict an estimate: then the plan is another one, by the same rules.
- QEMU allocates and attaches by itself and ends when that fails. Where its ladder has a lower rung
  for the errno, and the plan then gives QEMU something else to do, it is launched once more with
  the downgrade recorded. The same arguments are never tried twice.
- Whatever fails, all descriptors are closed.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import structlog

from migrd.core.attach_words import next_rung, read_failure
from migrd.core.devices import Device
from migrd.core.facts import VmSpec
from migrd.core.standing import StandingDecision, may_be_asked
from migrd.core.vfio_launch import GivenBy, VfioLaunch
from migrd.engine.boot import new_instance
from migrd.engine.decisions import Circumstances, Decided, Decisions
from migrd.engine.device_holding import DeviceHolding
from migrd.engine.device_ports import OpenDevices
from migrd.engine.devices import HostDevices
from migrd.engine.ports import PassedDevices, Vmm
from migrd.engine.world import World
from migrd.errors import KernelError, Refused, Unavailable, Violation, VmmDied

log = structlog.get_logger(__name__)

PROBE_S: Final = 20.0
OPEN_S: Final = 20.0

Record = Callable[[StandingDecision], Awaitable[None]]
"""Makes a decision the standing one, durably; raises JournalError."""


@dataclass(frozen=True)
class DeviceStart:
    """Starts QEMUs with the devices of their specs."""

    world: World
    decisions: Decisions
    holding: DeviceHolding
    devices: HostDevices

    async def decide(self, spec: VmSpec, now: Circumstances) -> tuple[Decided, StandingDecision]:
        """Ask the kernel what is not its own answer yet, and decide. Raises Refused with all that
        is in the way, Unavailable when a device does not answer."""
        await self.probe(spec)
        decided = await self.decisions.decide(spec, now)
        decided.require()
        return decided, decided.stands(self.world.clock.wall_s(), probed=True)

    async def probe(self, spec: VmSpec) -> None:
        """One after the other: each is bound to an iommufd of its own for a moment, nothing is
        attached. None when the profile forbids one: who decides next is told so; none that another
        VM has, or is just getting: its QEMU could not bind it meanwhile. Raises Unavailable when
        one does not answer."""
        if not await self.decisions.is_allowed(spec):
            return
        known = self.world.inventory.current.devices
        for wanted in spec.devices:
            device = known.get(wanted.address)
            if device is None or not _answers(device) or not may_be_asked(device):
                continue
            if self.decisions.users().get(wanted.address, spec.name) != spec.name:
                continue
            try:
                async with asyncio.timeout(PROBE_S):
                    self.devices.note_probed(await self.world.passthrough.probe(device))
            except TimeoutError:
                raise Unavailable(
                    f"{wanted.address} has not answered within {PROBE_S:g} s; nothing was started",
                    code="probe_timed_out",
                ) from None

    async def launch(
        self, spec: VmSpec, decided: Decided, now: Circumstances, record: Record
    ) -> Vmm:
        """A QEMU that runs, one rung down where the kernel wants that. Raises VmmDied with QEMU's
        words, Refused (a device cannot be opened), Unavailable."""
        while True:
            try:
                told = decided.plan.launch
                return await self.launch_once(spec, new_instance(), told, incoming=False)
            except VmmDied as exc:
                decided, down = await self._lower(spec, decided, now, exc)
                now = replace(now, downgraded=now.downgraded | down)
                await record(decided.stands(self.world.clock.wall_s(), probed=True))

    async def _lower(
        self, spec: VmSpec, decided: Decided, now: Circumstances, died: VmmDied
    ) -> tuple[Decided, frozenset[str]]:
        """What to try instead; raises `died` when there is nothing."""
        failure = read_failure(died.message, decided.plan)
        ladder = None if failure is None else next_rung(decided.plan, failure)
        if failure is None or ladder is None or not ladder.is_downgraded:
            raise died
        down = frozenset({failure.device})
        lower = await self.decisions.decide(spec, replace(now, downgraded=now.downgraded | down))
        if lower.violations or lower.plan.launch == decided.plan.launch:
            raise died
        log.warning(
            "the kernel refuses dirty tracking; started without it",
            vm=spec.name,
            device=failure.device,
            action=failure.action.value,
            errno=failure.errno,
            migratability=lower.plan.migratability.value,
        )
        return lower, down

    async def launch_once(
        self, spec: VmSpec, instance: str, told: VfioLaunch | None, *, incoming: bool
    ) -> Vmm:
        """Open, launch, hand over, hold. Raises VmmDied, Refused (a device that cannot be opened),
        Unavailable; all is closed then."""
        launcher = self.world.launcher
        if told is None or not told.devices:
            return await launcher.launch(spec, instance, incoming=incoming)
        opened = await self._open(told)
        try:
            passed = PassedDevices(told, tuple(opened.iommufds), dict(opened.device_fds))
            vmm = await launcher.launch(spec, instance, incoming=incoming, devices=passed)
        except BaseException:
            await opened.close()
            raise
        self.holding.hold(vmm, opened, told.iommufds)
        return vmm

    async def _open(self, told: VfioLaunch) -> OpenDevices:
        """The descriptors that QEMU is to be given. Raises Refused, naming the device."""
        known, inventory = self.world.inventory.current.devices, self.world.inventory
        by_fd = [one.address for one in told.devices if one.given_by is GivenBy.FD]
        if any(address not in known for address in by_fd):  # or sysfs was not read yet
            known = (await inventory.rescan()).devices
        gone = [address for address in by_fd if address not in known]
        if gone:
            message = (
                f"{', '.join(gone)} has gone away since it was decided about; nothing was started: "
                "bring it back, or name another (migrd devices lists those that are there)"
            )
            said = [Violation("devices", "unknown_device", message)]
            raise Refused(message, said, code="device_not_opened")
        objects = len(told.iommufds) if told.iommufds_by_fd else 0
        return await open_devices(self.world, [known[address] for address in by_fd], objects)


async def open_devices(world: World, wanted: Sequence[Device], objects: int) -> OpenDevices:
    """All or none, within OPEN_S. Raises Refused (the kernel says no), Unavailable."""
    try:
        async with asyncio.timeout(OPEN_S):
            return await world.passthrough.open(wanted, objects)
    except KernelError as exc:
        said = [Violation("devices", exc.code, exc.message)]
        raise Refused(exc.message, said, code="device_not_opened") from exc
    except TimeoutError:
        addresses = ", ".join(device.address for device in wanted)
        raise Unavailable(
            f"{addresses} could not be opened within {OPEN_S:g} s", code="open_timed_out"
        ) from None


def _answers(device: Device) -> bool:
    """A VFIO driver has it: only then it can be asked."""
    return device.vfio_cdev is not None or "vfio" in (device.driver or "")
