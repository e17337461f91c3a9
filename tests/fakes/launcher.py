"""A simulated host: its profiles, its QEMUs (which outlive every daemon), and the Launcher port."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

from migrd.core.facts import Feature, SpecDevice, VmSpec
from migrd.core.vfio_launch import GivenBy, QemuVfioFeature, VfioLaunch, VfioLaunchDevice
from migrd.engine.ports import PassedDevices, Vmm
from migrd.errors import Conflict, Invalid, NotFound, Violation, VmmDied, VmmRefused
from tests.fakes.guest import Guest
from tests.fakes.qemu_process import FakeQemu, Load, Make
from tests.fakes.vmm import FakeVmm
from tests.fakes.wire import GOOD_BYTES_PER_S, FakeWire

LAUNCH_S = 0.05
Wanted = Sequence[SpecDevice | VfioLaunchDevice]


class Ground:
    """What all hosts share: the network for guests, and the guests themselves."""

    def __init__(self) -> None:
        self.wire = FakeWire()
        self.guests: dict[str, Guest] = {}
        self.load = Load()

    def calm(self) -> None:
        """An easy guest and a good link again, for the QEMUs there are and those to come."""
        self.wire.heal()
        self.wire.swallows_ack = False
        self.wire.bandwidth_bytes_per_s = GOOD_BYTES_PER_S
        vars(self.load).update(vars(Load()))

    def guest(self, name: str) -> Guest:
        """The only one of that name."""
        return self.guests.setdefault(name, Guest(name))


class FakeHost:
    """A machine with QEMUs on it."""

    def __init__(self, name: str, ground: Ground) -> None:
        self.name = name
        self.ground = ground
        self.make = Make()
        self.profiles: dict[str, str] = {"tiny": "pc, 256 MiB"}
        self.allowed_devices: dict[str, frozenset[str]] = {}
        """Profile -> addresses of passthrough devices that a request may bring; absent: any."""
        self.launch_fails: str | None = None
        self.qemus: list[FakeQemu] = []
        """All whose files are on this host's disk, dead ones included."""
        self.noted: dict[str, VfioLaunch] = {}
        """Instance -> its passthrough devices, as on disk."""
        self.adopted: set[str] = set()
        """Instances that others launched."""

    def boot(self, name: str, *, profile: str | None = "tiny", running: bool = True) -> FakeQemu:
        """A QEMU with a guest in it, launched by nobody's daemon."""
        qemu = self.add(VmSpec(name, profile), f"boot-{name}", incoming=False)
        if running:
            qemu.cont()
        return qemu

    def add(
        self,
        spec: VmSpec,
        instance: str,
        *,
        incoming: bool,
        devices: VfioLaunch | None = None,
    ) -> FakeQemu:
        ground = self.ground
        qemu = FakeQemu(
            self.name,
            spec,
            instance,
            ground.guest(spec.name),
            ground.wire,
            incoming=incoming,
            load=ground.load,
            make=self.make,
            devices=devices,
        )
        self.qemus.append(qemu)
        return qemu

    def living(self, name: str) -> list[FakeQemu]:
        """QEMUs of a VM whose process lives."""
        return [q for q in self.qemus if q.spec.name == name and not q.is_dead]

    def qemu(self, name: str) -> FakeQemu:
        """The only living one."""
        living = self.living(name)
        assert len(living) == 1, f"{self.name} has {len(living)} living QEMUs of {name}"
        return living[0]


class FakeLauncher:
    """Fulfils `engine.ports.Launcher`, for one daemon's life."""

    def __init__(self, host: FakeHost, is_gone: Callable[[], bool] = lambda: False) -> None:
        self.host = host
        self._is_gone = is_gone
        """Its daemon is: it starts no process any more, and those that it has started go on."""
        self._handles: dict[str, FakeVmm] = {}

    def close(self) -> None:
        """The daemon has ended."""
        for handle in self._handles.values():
            handle.disconnect()

    def check(self, spec: VmSpec, devices: VfioLaunch | None = None) -> str:
        if spec.profile not in self.host.profiles:
            raise NotFound(f"no profile {spec.profile} on {self.host.name}", code="unknown_profile")
        seen: list[object] = [self.host.profiles[spec.profile], sorted(spec.parameters.items())]
        wanted: Wanted = spec.devices if devices is None else devices.devices
        self._refuse_devices(spec.profile, wanted)
        seen += [[d.id, d.guest_bus, d.guest_address] for d in wanted]
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()

    def _refuse_devices(self, profile: str, devices: Wanted) -> None:
        allowed = self.host.allowed_devices.get(profile)
        if allowed is None or not devices:
            return
        if not allowed:
            text = f"profile {profile} allows no passthrough devices"
            raise Invalid(text, [Violation("devices", "passthrough_forbidden", text)])
        violations = [
            Violation(f"devices[{n}].address", "device_not_allowed", f"{d.address} is not allowed")
            for n, d in enumerate(devices)
            if d.address not in allowed
        ]
        if violations:
            raise Invalid("devices that the profile does not allow", violations)

    def memory_bytes(self, spec: VmSpec) -> int:
        self.check(spec)
        return self.host.ground.load.memory_bytes

    async def probe(self, spec: VmSpec) -> tuple[str, frozenset[Feature]]:
        self.check(spec)
        await asyncio.sleep(0.002)
        return self.host.make.version, self.host.make.features

    def _refuse_unfit(self, devices: PassedDevices) -> None:
        launch = devices.launch
        by_fd = {d.address for d in launch.devices if d.given_by is GivenBy.FD}
        objects = len(launch.iommufds) if launch.iommufds_by_fd else 0
        if by_fd != set(devices.device_fds) or len(devices.iommufds) != objects:
            text = "the descriptors do not fit the devices"
            raise Invalid(text, [Violation("devices", "bad_descriptors", text)])
        needed = {QemuVfioFeature.DEVICE_FD} if by_fd else set()
        needed |= {QemuVfioFeature.IOMMUFD_FD} if objects else set()
        lacking = sorted(needed - self.host.make.vfio_features)
        if lacking:
            text = f"QEMU does not offer what the devices need: {', '.join(lacking)}"
            raise VmmRefused(text, code="passthrough_unsupported")

    async def vfio_features(self, spec: VmSpec) -> frozenset[QemuVfioFeature]:
        self.check(spec)
        await asyncio.sleep(0.002)
        return self.host.make.vfio_features

    async def versions(self) -> Mapping[str, str | None]:
        return dict.fromkeys(self.host.profiles, self.host.make.version)

    async def launch(
        self,
        spec: VmSpec,
        instance: str,
        *,
        incoming: bool,
        devices: PassedDevices | None = None,
    ) -> Vmm:
        given = devices.launch if devices is not None else None
        self.check(spec, given)
        if devices is not None:
            self._refuse_unfit(devices)
        if any(q.instance == instance for q in self.host.qemus):
            raise Conflict(f"instance {instance} exists already", code="instance_exists")
        await asyncio.sleep(LAUNCH_S / 2)
        if self.host.launch_fails is not None:
            raise VmmDied(f"QEMU of {spec.name} did not start: {self.host.launch_fails}")
        if self._is_gone():
            raise VmmDied("killed before it started a process")
        qemu = self.host.add(spec, instance, incoming=incoming, devices=given)
        self.host.noted[instance] = given or VfioLaunch()
        await asyncio.sleep(LAUNCH_S / 2)
        if not incoming:
            qemu.cont()
        return self._handle(qemu)

    def give_up(self, instance: str) -> None:
        """A launch was cancelled: its process ends, as the real launcher sees to."""
        for qemu in self.host.qemus:
            if qemu.instance == instance:
                qemu.die("its launch was given up")

    def handle(self, name: str) -> FakeVmm:
        """This daemon's connection to the living QEMU of a VM."""
        return self._handles[self.host.qemu(name).instance]

    def _handle(self, qemu: FakeQemu) -> FakeVmm:
        return self._handles.setdefault(qemu.instance, FakeVmm(qemu))

    async def find(self) -> Sequence[Vmm]:
        new = [q for q in self.host.qemus if q.instance not in self._handles]
        return [self._handle(q) for q in new]

    def is_managed(self, vmm: Vmm) -> bool:
        return vmm.instance not in self.host.adopted

    def spec_of(self, vmm: Vmm) -> VmSpec:
        for qemu in self.host.qemus:
            if qemu.instance == vmm.instance and self.is_managed(vmm):
                return qemu.spec
        return VmSpec(vmm.vm, None)

    def devices_of(self, vmm: Vmm) -> VfioLaunch | None:
        noted = self.host.noted.get(vmm.instance)
        return noted if noted is not None and noted.devices else None

    async def note_devices(self, vmm: Vmm, devices: VfioLaunch) -> None:
        self.host.noted[vmm.instance] = devices

    def serial_path(self, vmm: Vmm) -> str | None:
        return f"/run/migrd/{vmm.vm}/{vmm.instance}/serial.log"

    async def forget(self, vmm: Vmm) -> None:
        assert vmm.is_dead, "only what is proven dead may be forgotten"
        self.host.qemus = [q for q in self.host.qemus if q.instance != vmm.instance]
        handle = self._handles.pop(vmm.instance, None)
        if handle is not None:
            handle.disconnect()

    def last_words(self, vmm: Vmm) -> str:
        for qemu in self.host.qemus:
            if qemu.instance == vmm.instance:
                return qemu.last_words
        return ""
