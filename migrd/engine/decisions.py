"""The decision about a VM's passthrough devices, from the facts of now.

    spec + inventory + QEMU's offer ──request──► TrackingRequest ──core.tracking.decide──► Decided
                                                                                             │
    what stands for a VM (Entry.decision) ◄── only `device_start` and `hot_plug` replace it ─┘

Nothing here touches a device: what could not be asked is unknown in the plan, with the probe that
would settle it. All that keeps a VM from being started as it is described is found at once, and
names the field, the device, the reason and the cure.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from migrd.core.devices import Device, DeviceKind, Inventory, IommuInstance
from migrd.core.facts import SpecDevice, VmFacts, VmSpec
from migrd.core.hot_plug import compare, reconsider
from migrd.core.standing import (
    DeviceEvidence,
    StandingDecision,
    placed,
    remembering,
    sound,
    standing,
)
from migrd.core.tracking import (
    Plan,
    Reason,
    StandingObject,
    TrackingRequest,
    VmDevice,
    decide,
)
from migrd.engine.threads import in_thread
from migrd.engine.vms import Entry, VmTable
from migrd.engine.world import World
from migrd.errors import Invalid, Refused, Violation

log = structlog.get_logger(__name__)

MOST_DEVICES: Final = 64
"""Of one VM: more than a machine has slots."""
MOST_TOLD: Final = 8
"""Reasons in one event; the VM itself has all of them."""


@dataclass(frozen=True)
class Circumstances:
    """What a decision depends on besides spec and hardware."""

    attached: frozenset[str] = frozenset()
    """QEMU ids of devices that the running VM has."""
    memory_bytes: int | None = None
    downtime_limit_s: float | None = None
    switchover_bytes_per_s: float | None = None
    downgraded: frozenset[str] = frozenset()
    standing: tuple[StandingObject, ...] = ()
    """The iommufd objects of a running QEMU that nothing was decided for."""
    remembered: Mapping[str, DeviceEvidence] = field(default_factory=dict)
    """QEMU id -> what the kernel answered before the running VM had the device: it answers nobody
    else now."""


@dataclass(frozen=True)
class Decided:
    """A decision that nothing has been done about yet."""

    spec: VmSpec
    request: TrackingRequest
    plan: Plan
    own: tuple[Violation, ...]
    """What is in the way besides `plan.refused`: no such device, in use, the profile."""

    @property
    def violations(self) -> tuple[Violation, ...]:
        """Why the VM must not be started like this; empty when it may."""
        refused = (_violation(self.spec, reason) for reason in self.plan.refused)
        return tuple(dict.fromkeys((*self.own, *refused)))

    def require(self) -> None:
        """Raises Refused with everything that is in the way."""
        violations = self.violations
        if not violations:
            return
        first, more = violations[0].message, len(violations) - 1
        message = f"{first} (and {more} more: see violations)" if more else first
        raise Refused(message, violations, code="decision_refused")

    def stands(self, wall_s: float, *, probed: bool = False) -> StandingDecision:
        """As it is kept."""
        return standing(self.request, self.plan, wall_s, probed=probed)


class Decisions:
    """Asks the core about the VMs of this host."""

    def __init__(self, world: World, vms: VmTable) -> None:
        self._world = world
        self._vms = vms
        self.bandwidth_bytes_per_s: Callable[[], float | None] = lambda: None
        """What migrations away from here got lately; None: not known."""

    # Who has what -------------------------------------------------------------------------------

    def users(self) -> dict[str, str]:
        """Address -> the VM that has the device, or is just getting it."""
        users: dict[str, str] = {}
        for entry in self._vms.all():
            users.update(dict.fromkeys(_held_by(entry), entry.spec.name))
        return users

    async def check_free(self, spec: VmSpec) -> None:
        """Raises Refused, with all else that is in the way, when another VM has one of the devices.
        When it returns nobody else has them: claim them before the next await."""
        while self._taken(spec):
            (await self.decide(spec)).require()

    def _taken(self, spec: VmSpec) -> bool:
        users = self.users()
        return any(users.get(one.address, spec.name) != spec.name for one in spec.devices)

    def check_policy(self, spec: VmSpec) -> None:
        """Of a VM without devices, about which nothing else is decided. Raises Refused."""
        policy, forbidden = spec.tracking_policy, self._world.options.forbidden_tracking_policies
        if spec.devices or policy is None or policy not in forbidden:
            return
        said = (
            f"this host forbids the tracking policy {policy.value}; choose another, or have "
            "devices.forbidden_tracking_policies changed"
        )
        violations = [Violation("tracking_policy", "policy_forbidden", said)]
        raise Refused(said, violations, code="decision_refused")

    # Deciding -----------------------------------------------------------------------------------

    async def circumstances(self, spec: VmSpec, entry: Entry | None = None) -> Circumstances:
        """Of a VM as it is; `entry` when its QEMU may run."""
        facts = None if entry is None else entry.facts
        if entry is not None and entry.vmm is not None and not entry.vmm.is_dead:
            attached = frozenset(device.id for device in spec.devices)
            stands = entry.decision
        else:
            attached, stands = frozenset(), None
        memory = None if facts is None else facts.memory_bytes
        if memory is None and spec.profile is not None:
            memory = await in_thread(self._world.launcher.memory_bytes, bare(spec))
        return Circumstances(
            attached=attached,
            memory_bytes=memory,
            switchover_bytes_per_s=self.bandwidth_bytes_per_s(),
            downgraded=frozenset(() if stands is None else stands.downgraded),
            standing=_objects_seen(facts) if attached and stands is None else (),
            remembered={} if stands is None else {one.id: one for one in stands.evidence},
        )

    async def decide(self, spec: VmSpec, now: Circumstances | None = None) -> Decided:
        """What holds for a VM of this spec. Raises Invalid for a spec that makes no sense,
        VmmError when its QEMU cannot be asked what it offers."""
        now = now or Circumstances()
        request, own = await self.request(spec, now)
        plan = sound(decide(request))
        own += await self._profile_says(spec)
        return Decided(spec, request, plan, tuple(own))

    async def request(
        self, spec: VmSpec, now: Circumstances
    ) -> tuple[TrackingRequest, list[Violation]]:
        """The question to the core, and what is wrong with the spec before it is asked: such
        devices are left out of it."""
        check_devices(spec)
        world, inventory = self._world, self._world.inventory.current
        found, violations = self._find(spec, inventory, now)
        offer = await world.launcher.vfio_features(bare(spec))
        request = TrackingRequest(
            devices=tuple(found),
            qemu=offer,
            policy=spec.tracking_policy or world.options.tracking_policy,
            forbidden=world.options.forbidden_tracking_policies,
            iommus=_iommus_of(found, inventory),
            kernel=inventory.kernel,
            neighbours=_neighbours_of(found, inventory),
            downtime_limit_s=now.downtime_limit_s,
            memory_bytes=now.memory_bytes,
            switchover_bytes_per_s=now.switchover_bytes_per_s,
            downgraded=now.downgraded,
            standing=now.standing,
        )
        return request, violations

    def _find(
        self, spec: VmSpec, inventory: Inventory, now: Circumstances
    ) -> tuple[list[VmDevice], list[Violation]]:
        users = self.users()
        found: list[VmDevice] = []
        violations: list[Violation] = []
        for at, wanted in enumerate(spec.devices):
            device = inventory.devices.get(wanted.address) or _remembered(wanted, now)
            field = f"devices[{at}].address"
            user = users.get(wanted.address)
            if device is None:
                violations.append(Violation(field, "unknown_device", _unknown(wanted)))
                if wanted.id in now.attached:
                    found.append(_vm_device(wanted, _unseen(wanted), now))
                continue
            if user is not None and user != spec.name:
                said = (
                    f"{wanted.address} is in use by the VM {user}: stop {user}, or take the "
                    "device out of it first"
                )
                violations.append(Violation(field, "in_use", said))
            found.append(_vm_device(wanted, device, now))
        return found, violations

    async def is_allowed(self, spec: VmSpec) -> bool:
        """Its launch profile has nothing against its devices: none may be touched before that."""
        return not await self._profile_says(spec)

    async def _profile_says(self, spec: VmSpec) -> list[Violation]:
        """What its launch profile has against these devices, started or not."""
        if not spec.devices or spec.profile is None:
            return []
        try:
            await in_thread(self._world.launcher.check, spec)
        except Invalid as exc:
            return list(exc.violations) or [Violation("devices", exc.code, exc.message)]
        return []

    async def now_of(
        self, entry: Entry, *, downtime_limit_s: float | None = None
    ) -> tuple[Decided, StandingDecision]:
        """The VM as it is, from the facts of now; what the QEMU that runs it has been told stands.
        Raises as `decide`."""
        spec, stands = placed_spec(entry), entry.decision
        now = await self.circumstances(spec, entry)
        now = replace(now, downtime_limit_s=downtime_limit_s)
        decided = await self.decide(spec, now)
        if stands is None or not now.attached:
            return decided, decided.stands(self._world.clock.wall_s())
        plan = sound(reconsider(stands.plan, decided.request))
        wall_s = self._world.clock.wall_s()
        return decided, standing(decided.request, plan, wall_s, probed=stands.probed)

    # What stands --------------------------------------------------------------------------------

    def put(self, entry: Entry, after: StandingDecision | None) -> None:
        """It stands from now on (the caller has made it durable): counted, and told when the
        verdict is another."""
        before, entry.decision = entry.decision, after
        if after is None:
            return
        self.count(after.plan)
        self.tell(entry, before, after)

    def tell(self, entry: Entry, before: StandingDecision | None, after: StandingDecision) -> None:
        """`vm.verdict_changed`, when there is something to tell."""
        if before is None:
            return
        change = compare(before.plan, after.plan)
        if not change.is_any:
            return
        body: dict[str, object] = {
            "before": change.before.value,
            "after": change.after.value,
            "appeared": [_told(reason) for reason in change.appeared[:MOST_TOLD]],
            "disappeared": [_told(reason) for reason in change.disappeared[:MOST_TOLD]],
        }
        name = entry.spec.name
        entry.resource_version = self._world.stream.publish("vm.verdict_changed", body, vm=name)
        say = log.warning if change.is_lower else log.info
        say("verdict changed", vm=name, before=change.before.value, after=change.after.value)

    def count(self, plan: Plan) -> None:
        """In the metrics, with the reason that weighs most."""
        reasons = plan.refused or plan.limits
        reason = reasons[0].code.value if reasons else "none"
        verdict = "refused" if plan.refused else plan.migratability.value
        self._world.observer.decided(plan.policy.value, verdict, reason)


def _objects_seen(facts: VmFacts | None) -> tuple[StandingObject, ...]:
    """As others have launched it. Whether a device tracked by its IOMMU has ever been in one of
    them is not known: it is taken for granted, which promises less."""
    objects: dict[str, tuple[str, ...]] = {}
    for device in () if facts is None else facts.devices:
        if device.iommufd is not None:
            objects[device.iommufd] = (*objects.get(device.iommufd, ()), device.id)
    return tuple(StandingObject(id_, ids, True) for id_, ids in objects.items())


def placed_spec(entry: Entry) -> VmSpec:
    """Its spec, with the guest slots that its devices are seen in."""
    return placed(entry.spec, () if entry.facts is None else entry.facts.devices)


def check_devices(spec: VmSpec) -> None:
    """Raises Invalid for devices that no decision can be made about."""
    if len(spec.devices) > MOST_DEVICES:
        said = f"{len(spec.devices)} devices; a VM may have at most {MOST_DEVICES}"
        raise Invalid(said, [Violation("devices", "too_many", said)], code="too_many_devices")
    violations: list[Violation] = []
    seen: dict[str, int] = {}
    for at, device in enumerate(spec.devices):
        if (first := seen.setdefault(device.id, at)) != at:
            said = f"the id {device.id} is that of devices[{first}] already: ids are unique"
            violations.append(Violation(f"devices[{at}].id", "repeated", said))
    if violations:
        raise Invalid(violations[0].message, violations)


def _held_by(entry: Entry) -> Iterable[str]:
    """Addresses of the devices that the VM has, or may have: while it is not known whether its
    QEMU lives, it has them."""
    is_alive = entry.vmm is not None and not entry.vmm.is_dead
    if not (is_alive or entry.starting or entry.incoming):
        return ()
    seen = () if entry.facts is None else entry.facts.devices
    told = (device.address for device in seen if device.address is not None)
    return (*(device.address for device in entry.spec.devices), *told)


def _remembered(wanted: SpecDevice, now: Circumstances) -> Device | None:
    """A device that the running VM has and sysfs does not show: what is unknown is not gone."""
    evidence = now.remembered.get(wanted.id)
    is_same = evidence is not None and evidence.address == wanted.address
    return evidence.device() if is_same and wanted.id in now.attached and evidence else None


def _vm_device(wanted: SpecDevice, device: Device, now: Circumstances) -> VmDevice:
    evidence = now.remembered.get(wanted.id)
    if evidence is not None:
        device = remembering(device, evidence)
    return VmDevice(
        id=wanted.id,
        device=sound(device),
        guest_bus=wanted.guest_bus,
        guest_address=wanted.guest_address,
        attached=wanted.id in now.attached,
    )


def _unseen(wanted: SpecDevice) -> Device:
    """One that the running VM has, and nothing is known of: left out, the VM would seem to be
    without it."""
    kind = DeviceKind.VFIO_PCI if ":" in wanted.address else DeviceKind.VFIO_MDEV
    return Device(wanted.address, kind)


def _iommus_of(found: Iterable[VmDevice], inventory: Inventory) -> Mapping[str, IommuInstance]:
    names = {one.device.iommu for one in found if one.device.iommu is not None}
    return {name: inventory.iommus[name] for name in sorted(names) if name in inventory.iommus}


def _neighbours_of(found: Iterable[VmDevice], inventory: Inventory) -> Mapping[str, Device]:
    addresses = {address for one in found for address in one.device.group_devices}
    known = inventory.devices
    return {address: sound(known[address]) for address in sorted(addresses) if address in known}


def _unknown(wanted: SpecDevice) -> str:
    return (
        f"{wanted.address} is no device of this host that could be passed through (it may have "
        "gone away): /v1/devices (migrd devices) lists those that are"
    )


def _violation(spec: VmSpec, reason: Reason) -> Violation:
    """A refusal of the core's, at the field that it is about."""
    at = next((n for n, one in enumerate(spec.devices) if one.id == reason.device), None)
    if at is not None:
        field, place = f"devices[{at}].address", f"{spec.devices[at].address}: "
    elif reason.code.value.startswith("policy_"):
        field, place = "tracking_policy", ""
    else:
        field, place = "devices", ""
    is_named = at is not None and spec.devices[at].address in reason.message
    message = reason.message if is_named else f"{place}{reason.message}"
    return Violation(
        field, reason.code.value, f"{message}; {reason.cure}" if reason.cure else message
    )


def _told(reason: Reason) -> dict[str, str | None]:
    return {"code": reason.code.value, "device": reason.device, "message": reason.message}


def bare(spec: VmSpec) -> VmSpec:
    """Without its devices: what is asked about it then is not answered with what is wrong with
    them, which is told all at once."""
    return replace(spec, devices=())


def without(spec: VmSpec, id_: str) -> VmSpec:
    """The spec with one device less."""
    return replace(spec, devices=tuple(device for device in spec.devices if device.id != id_))
