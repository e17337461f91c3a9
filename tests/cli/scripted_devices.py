"""The hardware of the scripted engine: a made-up host, as clients see it."""

from collections.abc import Sequence
from dataclasses import replace

from migrd.core.migration import Request
from migrd.engine.device_verdict import judge
from migrd.engine.service import DeviceView, PlanView, PlugRequest, VmView, WhatIf
from migrd.errors import Conflict, NotFound
from tests.fakes.deciding import Deciding
from tests.fakes.inventory import mixed_host
from tests.fakes.rates import FakeRates


class ScriptedDevices(FakeRates):
    """The part of Service that is about devices."""

    version = 1

    def __init__(self) -> None:
        self.inventory = mixed_host()
        self.devices_in_use: dict[str, str] = {}
        """Address -> VM."""
        self.probed: list[str] = []
        self.vms_by_name: dict[str, VmView] = {}

    def vm(self, name: str) -> VmView:
        raise NotImplementedError

    async def plan(self, request: Request) -> PlanView:
        raise NotImplementedError

    def devices(self) -> tuple[int, Sequence[DeviceView]]:
        return self.version, [self.device(address) for address in sorted(self.inventory.devices)]

    def device(self, address: str) -> DeviceView:
        device = self.inventory.devices.get(address)
        if device is None:
            raise NotFound(f"{address} is no device of this host", code="unknown_device")
        verdict = judge(device, self.inventory)
        return DeviceView(device, verdict, 1, self.devices_in_use.get(address))

    async def probe_device(self, address: str, *, by: str) -> DeviceView:
        del by
        if address in self.devices_in_use:
            raise Conflict(f"{address} is in use", code="device_in_use")
        self.probed.append(address)
        return self.device(address)

    # VMs that have them, and what is decided ----------------------------------------------------

    @property
    def _deciding(self) -> Deciding:
        return Deciding(self.inventory, self.devices_in_use)

    async def plug_device(self, vm: str, request: PlugRequest, *, by: str) -> VmView:
        del by
        before = self.vm(vm)
        spec, decision = await self._deciding.plugged(before.spec, before.decision, request)
        self.vms_by_name[vm] = replace(before, spec=spec, decision=decision)
        return self.vms_by_name[vm]

    async def unplug_device(self, vm: str, id_: str, *, by: str) -> VmView:
        del by
        before = self.vm(vm)
        spec, decision = await self._deciding.unplugged(before.spec, id_)
        self.vms_by_name[vm] = replace(before, spec=spec, decision=decision)
        return self.vms_by_name[vm]

    async def what_if(self, question: WhatIf) -> PlanView:
        vm = self.vm(question.vm)
        here = await self._deciding.what_if(question, vm.spec, vm.decision)
        if question.move is None:
            return here
        view = await self.plan(question.move)
        return replace(
            view,
            possible=view.possible and here.possible,
            refusals=(*here.refusals, *view.refusals),
            decision=here.decision,
            plan_there=None if here.decision is None else here.decision.plan,
        )
