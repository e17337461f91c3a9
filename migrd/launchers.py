"""The launchers of all engines as one: fulfils `engine.ports.Launcher`, for the daemon to build.

    a spec names a profile, and a profile is of one engine ──► that engine's launcher
    a Vmm was launched or found by one of them             ──► that one

The engines do not know each other, and the rest of migrd does not know that there are several.
"""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from migrd.core.facts import Feature, VmSpec
from migrd.core.vfio_launch import QemuVfioFeature, VfioLaunch
from migrd.engine.ports import Launcher, PassedDevices, Vmm
from migrd.errors import Invalid, NotFound, Violation


@dataclass(frozen=True)
class EngineLauncher:
    """One engine's, with the names of its profiles."""

    profiles: Collection[str]
    launcher: Launcher


class Launchers:
    """All of them. Owns none."""

    def __init__(self, engines: Sequence[EngineLauncher]) -> None:
        self._engines = tuple(engines)
        self._owners: dict[tuple[str, str], Launcher] = {}
        """By VM and instance: who launched or found it."""

    def _of_spec(self, spec: VmSpec) -> Launcher:
        if spec.profile is None:
            text = f"VM {spec.name} names no launch profile"
            raise Invalid(text, [Violation("profile", "no_launch_profile", text)])
        for engine in self._engines:
            if spec.profile in engine.profiles:
                return engine.launcher
        known = ", ".join(sorted(name for one in self._engines for name in one.profiles)) or "none"
        raise NotFound(
            f"no launch profile {spec.profile!r}; there are: {known}", code="unknown_profile"
        )

    def _of_vmm(self, vmm: Vmm) -> Launcher:
        """Any will do for one that nobody knows: it says so."""
        return self._owners.get((vmm.vm, vmm.instance), self._engines[0].launcher)

    def check(self, spec: VmSpec, devices: VfioLaunch | None = None) -> str:
        return self._of_spec(spec).check(spec, devices)

    async def probe(self, spec: VmSpec) -> tuple[str, frozenset[Feature]]:
        return await self._of_spec(spec).probe(spec)

    def memory_bytes(self, spec: VmSpec) -> int:
        return self._of_spec(spec).memory_bytes(spec)

    async def vfio_features(self, spec: VmSpec) -> frozenset[QemuVfioFeature]:
        return await self._of_spec(spec).vfio_features(spec)

    async def versions(self) -> Mapping[str, str | None]:
        versions: dict[str, str | None] = {}
        for engine in self._engines:
            versions.update(await engine.launcher.versions())
        return versions

    async def launch(
        self,
        spec: VmSpec,
        instance: str,
        *,
        incoming: bool,
        devices: PassedDevices | None = None,
    ) -> Vmm:
        launcher = self._of_spec(spec)
        vmm = await launcher.launch(spec, instance, incoming=incoming, devices=devices)
        self._owners[vmm.vm, vmm.instance] = launcher
        return vmm

    async def find(self) -> Sequence[Vmm]:
        looks = await asyncio.gather(*(engine.launcher.find() for engine in self._engines))
        for engine, found in zip(self._engines, looks, strict=True):
            self._owners.update({(vmm.vm, vmm.instance): engine.launcher for vmm in found})
        return [vmm for found in looks for vmm in found]

    def is_managed(self, vmm: Vmm) -> bool:
        return self._of_vmm(vmm).is_managed(vmm)

    def spec_of(self, vmm: Vmm) -> VmSpec:
        return self._of_vmm(vmm).spec_of(vmm)

    def devices_of(self, vmm: Vmm) -> VfioLaunch | None:
        return self._of_vmm(vmm).devices_of(vmm)

    async def note_devices(self, vmm: Vmm, devices: VfioLaunch) -> None:
        await self._of_vmm(vmm).note_devices(vmm, devices)

    def serial_path(self, vmm: Vmm) -> str | None:
        return self._of_vmm(vmm).serial_path(vmm)

    async def forget(self, vmm: Vmm) -> None:
        await self._of_vmm(vmm).forget(vmm)
        self._owners.pop((vmm.vm, vmm.instance), None)

    def last_words(self, vmm: Vmm) -> str:
        return self._of_vmm(vmm).last_words(vmm)
