"""Passthrough devices added to a VM and taken out of it, and the decision that stands afterwards.

    plug     judge (nothing touched) ► open ► QEMU ► note ► the decision, durably
    unplug   QEMU, together with the guest ► note ► the decision, durably; it may rise

Rules
1. Never during a migration: both ends have to have the same devices.
2. A device that would make the VM less migratable is refused with the reasons, unless the request
   accepts that. What QEMU has been told stands: see `core.hot_plug`.
3. A plug may be said again after an answer was lost: what QEMU has already it is not given twice,
   and the rest is done.
4. When the last step fails (the journal), QEMU has what the record lacks. The error says so, and
   that saying it again ends it.
"""

from dataclasses import dataclass, replace
from typing import Final

import structlog

from migrd.core.facts import SpecDevice, VmSpec
from migrd.core.hot_plug import judge_plug, reconsider
from migrd.core.standing import StandingDecision, sound, standing
from migrd.core.tracking import Plan, TrackingRequest, decide
from migrd.core.vfio_launch import GivenBy, VfioLaunch, VfioLaunchDevice
from migrd.engine.decisions import Circumstances, Decided, without
from migrd.engine.device_ports import OpenDevices
from migrd.engine.device_start import DeviceStart, open_devices
from migrd.engine.ports import PluggedFds, Vmm
from migrd.engine.service import PlugRequest
from migrd.engine.vms import Entry, VmTable
from migrd.errors import (
    Conflict,
    JournalError,
    NotFound,
    Refused,
    Unavailable,
    Violation,
    VmmRefused,
    VmmTimedOut,
)

log = structlog.get_logger(__name__)

UNPLUG_S: Final = 20.0
"""So long the guest may take to let go before the answer is `unplug_pending`."""


@dataclass(frozen=True)
class HotPlug:
    """What clients may do with the devices of a VM; the caller holds the VM's lock and has made
    sure that no migration has a say in it."""

    vms: VmTable
    starts: DeviceStart

    # Plugging -----------------------------------------------------------------------------------

    async def plug(self, entry: Entry, request: PlugRequest, *, by: str) -> None:
        """Raises Refused with all reasons (nothing was touched), VmmError, JournalError."""
        wanted = _wanted(entry.spec, request)
        is_defined = wanted in entry.spec.devices
        spec = entry.spec if is_defined else _with(entry.spec, wanted)
        await self.starts.decisions.check_free(spec)
        await self.starts.probe(spec)
        running = _running(entry)
        if running is None:
            await self._define(entry, spec)
            return
        await self.vms.look(entry, refresh=True)  # an earlier try may have come further
        _check_named(entry, spec)
        if is_defined and wanted.id in _ids_of(entry):
            return
        decided = await self.starts.decisions.decide(
            spec, await self._circumstances(spec, entry, new=wanted.id)
        )
        plan = self._judge(entry, decided, request)
        told = _told_of(plan.launch, wanted.id)
        await self._check_same(entry, told)
        has = self.starts.world.launcher.devices_of(running) or VfioLaunch()
        if wanted.id not in _ids_of(entry) | {device.id for device in has.devices}:
            await self._plug_in(running, plan, decided, told)
        await self._note(entry, running, spec, decided.request, plan, _with_device(has, told))
        log.info("plugged", vm=spec.name, device=wanted.id, address=wanted.address, by=by)

    async def _circumstances(self, spec: VmSpec, entry: Entry, *, new: str) -> Circumstances:
        now = await self.starts.decisions.circumstances(spec, entry)
        return replace(now, attached=now.attached - {new})

    async def _check_same(self, entry: Entry, told: VfioLaunchDevice) -> None:
        """QEMU may have a device of this id from a try that was not recorded: it must be this one,
        as it would be given now. Raises Refused."""
        seen = () if entry.facts is None else entry.facts.devices
        found = next((one for one in seen if one.id == told.id), None)
        if found is None:
            return
        is_here = found.address == told.address
        if found.address is None:  # QEMU was given a descriptor, and nobody remembers of what
            is_here = await self.starts.devices.is_in_use(told.address)
        if is_here and found.iommufd in (None, told.iommufd):
            return
        said = (
            f"QEMU has {found.address or 'another device'} as {told.id} already, of a try that was "
            f"not recorded: take it out first (migrd vms unplug {entry.spec.name} {told.id})"
        )
        raise Refused(said, [Violation("id", "given_twice", said)], code="given_twice")

    def _judge(self, entry: Entry, decided: Decided, request: PlugRequest) -> Plan:
        """The plan with the new device. Raises Refused."""
        if decided.own:
            decided.require()
        before = _standing_plan(entry)
        if before is None:  # it has none yet, so nothing keeps it from being live
            before = decide(replace(decided.request, devices=()))
        judgement = judge_plug(before, decided.request, accept_lower=request.accept_lower)
        if judgement.allowed:
            return sound(judgement.plan)
        change = judgement.change
        lowers = not judgement.plan.refused
        at = len(entry.spec.devices)
        said = [
            Violation(
                f"devices[{at}]" if reason.device is None else f"devices[{reason.device}]",
                reason.code.value,
                f"{reason.message}; {reason.cure}" if reason.cure else reason.message,
            )
            for reason in judgement.reasons
        ]
        if not lowers:
            raise Refused(said[0].message, said, code="decision_refused")
        raise Refused(
            f"with {request.address} {entry.spec.name} would be {change.after.value}, it is "
            f"{change.before.value} now; nothing was changed. To add it all the same, say "
            "accept_lower_migratability",
            said,
            code="lowers_migratability",
        )

    async def _plug_in(
        self, vmm: Vmm, plan: Plan, decided: Decided, told: VfioLaunchDevice
    ) -> None:
        """Raises VmmError, Refused (it cannot be opened): nothing of it is left then."""
        world = self.starts.world
        has = _objects_of(world.launcher.devices_of(vmm), plan, told.id)
        is_new = told.iommufd is not None and told.iommufd not in has
        by_fd = plan.launch is not None and plan.launch.iommufds_by_fd
        devices = [one.device for one in decided.request.devices if one.id == told.id]
        opened = await open_devices(
            world,
            devices if told.given_by is GivenBy.FD else [],
            1 if is_new and by_fd else 0,
        )
        try:
            await vmm.plug_device(told, _fds(opened, told))
        except BaseException:
            await opened.close()
            raise
        self.starts.holding.hold(vmm, opened, [told.iommufd] if told.iommufd else [])

    async def _note(
        self,
        entry: Entry,
        vmm: Vmm,
        spec: VmSpec,
        request: TrackingRequest,
        plan: Plan,
        has: VfioLaunch,
    ) -> None:
        """QEMU has it: keep that, with the decision that stands from now on."""
        world = self.starts.world
        wall_s = world.clock.wall_s()
        decision = standing(request, plan, wall_s, probed=True) if spec.devices else None
        try:
            await world.launcher.note_devices(vmm, has)
            await world.journal.put_vm(replace(entry.stored(), spec=spec, decision=decision))
        except (JournalError, Unavailable) as exc:
            raise Unavailable(
                f"QEMU has changed its devices, but that could not be written down "
                f"({exc.message}): say it again as soon as there is room",
                code="not_recorded",
            ) from exc
        entry.spec = spec
        self.starts.decisions.put(entry, decision)
        await self.vms.look(entry, refresh=True)
        self.vms.changed(entry)

    async def _define(self, entry: Entry, spec: VmSpec) -> None:
        """A VM that does not run: only its definition changes. To take a device away nothing has
        to be right with the others, which may be the next to go. Raises Refused."""
        decisions, world = self.starts.decisions, self.starts.world
        decision: StandingDecision | None = None
        if spec.devices:
            decided = await decisions.decide(spec, await decisions.circumstances(spec))
            if set(spec.devices) - set(entry.spec.devices):
                decided.require()
            decision = decided.stands(world.clock.wall_s())
        await world.journal.put_vm(replace(entry.stored(), spec=spec, decision=decision))
        entry.spec = spec
        decisions.put(entry, decision)
        self.vms.changed(entry)

    # Unplugging ---------------------------------------------------------------------------------

    async def unplug(self, entry: Entry, id_: str, *, by: str) -> None:
        """Raises NotFound, Conflict (the guest keeps it), Unavailable (it has not let go yet)."""
        spec, running = without(entry.spec, id_), _running(entry)
        if spec == entry.spec and id_ not in _ids_of(entry):
            raise NotFound(
                f"{entry.spec.name} has no passthrough device {id_}", code="unknown_device"
            )
        if running is None:
            await self._define(entry, spec)
            return
        try:
            await running.unplug_device(id_, within_s=UNPLUG_S)
        except VmmTimedOut as exc:
            raise Unavailable(
                f"the guest has not let go of {id_} within {UNPLUG_S:.0f} s, and still may; ask "
                f"again to go on waiting ({exc.message})",
                code="unplug_pending",
            ) from exc
        except VmmRefused as exc:
            raise Conflict(exc.message, code=exc.code) from exc
        for address in _addresses_of(entry, id_):
            self.starts.holding.let_go_of(running.instance, address)
        await self._without(entry, running, spec)
        log.info("unplugged", vm=spec.name, device=id_, by=by)

    async def _without(self, entry: Entry, vmm: Vmm, spec: VmSpec) -> None:
        decisions, before = self.starts.decisions, _standing_plan(entry)
        now = await decisions.circumstances(spec, entry)
        request, _ = await decisions.request(spec, now)
        if before is None:
            plan = (await decisions.decide(spec, now)).plan
        else:
            plan = sound(reconsider(before, request))
        has = self.starts.world.launcher.devices_of(vmm) or VfioLaunch()
        await self._note(entry, vmm, spec, request, plan, _without_device(has, spec))


def _wanted(spec: VmSpec, request: PlugRequest) -> SpecDevice:
    """The device with its id. Raises Refused when id or address belong to another one."""
    same = [d for d in spec.devices if d.address == request.address]
    if same and request.id in (None, same[0].id):
        return same[0]
    ids = {device.id for device in spec.devices}
    if same or request.id in ids:
        what = f"{request.address} is {same[0].id}" if same else f"the id {request.id} is taken"
        field = "address" if same else "id"
        said = f"{spec.name} has that device already: {what}; take it out first"
        raise Refused(said, [Violation(field, "given_twice", said)], code="given_twice")
    free = (name for n in range(len(ids) + 1) if (name := f"hostdev{n}") not in ids)
    return SpecDevice(
        id=next(free) if request.id is None else request.id,
        address=request.address,
        guest_bus=request.guest_bus,
        guest_address=request.guest_address,
    )


def _check_named(entry: Entry, spec: VmSpec) -> None:
    """Raises Conflict when its QEMU has devices that nothing was decided about: beside them, no
    device can be judged."""
    unnamed = sorted(_ids_of(entry) - {device.id for device in spec.devices})
    if unnamed:
        raise Conflict(
            f"the QEMU of {spec.name} has passthrough devices that its definition does not name "
            f"({', '.join(unnamed)}): name them first (PUT /v1/vms/{spec.name}), or plug while it "
            "is stopped",
            code="devices_not_named",
        )


def _with(spec: VmSpec, device: SpecDevice) -> VmSpec:
    return replace(spec, devices=(*spec.devices, device))


def _running(entry: Entry) -> Vmm | None:
    return None if entry.vmm is None or entry.vmm.is_dead else entry.vmm


def _addresses_of(entry: Entry, id_: str) -> set[str]:
    """Of a device, as defined and as QEMU told of it."""
    seen = () if entry.facts is None else entry.facts.devices
    told = {device.address for device in seen if device.id == id_ and device.address is not None}
    return told | {device.address for device in entry.spec.devices if device.id == id_}


def _ids_of(entry: Entry) -> frozenset[str]:
    """QEMU ids of the devices that the running VM was seen to have."""
    return frozenset() if entry.facts is None else frozenset(d.id for d in entry.facts.devices)


def _standing_plan(entry: Entry) -> Plan | None:
    return None if entry.decision is None else entry.decision.plan


def _told_of(launch: VfioLaunch | None, id_: str) -> VfioLaunchDevice:
    devices = () if launch is None else launch.devices
    for device in devices:
        if device.id == id_:
            return device
    raise Refused(f"nothing was planned for {id_}", code="decision_refused")


def _objects_of(has: VfioLaunch | None, plan: Plan, new: str) -> frozenset[str]:
    """The iommufd objects that QEMU has before the plug."""
    if has is not None:
        return frozenset(device.iommufd for device in has.devices if device.iommufd is not None)
    others = (one for one in plan.iommufds if set(one.devices) - {new})
    return frozenset(one.id for one in others)


def _with_device(has: VfioLaunch, told: VfioLaunchDevice) -> VfioLaunch:
    others = tuple(device for device in has.devices if device.id != told.id)
    new = () if told.iommufd is None or told.iommufd in has.iommufds else (told.iommufd,)
    return replace(has, iommufds=(*has.iommufds, *new), devices=(*others, told))


def _without_device(has: VfioLaunch, spec: VmSpec) -> VfioLaunch:
    """What is left of it: the devices of the spec, and the iommufd objects that they are in."""
    ids = {device.id for device in spec.devices}
    left = tuple(device for device in has.devices if device.id in ids)
    used = {device.iommufd for device in left}
    return replace(has, iommufds=tuple(i for i in has.iommufds if i in used), devices=left)


def _fds(opened: OpenDevices, told: VfioLaunchDevice) -> PluggedFds:
    iommufds = list(opened.iommufds)
    return PluggedFds(
        device=opened.device_fds.get(told.address), iommufd=iommufds[0] if iommufds else None
    )
