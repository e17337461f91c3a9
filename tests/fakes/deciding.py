"""Decisions about VMs' passthrough devices for simulators of the engine's Service, made by the real
rules from the hardware that the simulator shows.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from migrd.core.devices import Inventory
from migrd.core.facts import SpecDevice, VmSpec
from migrd.core.standing import StandingDecision
from migrd.core.tracking import Migratability, TrackingPolicy
from migrd.core.vfio_launch import QemuVfioFeature
from migrd.engine.decisions import Decisions, without
from migrd.engine.options import EngineOptions
from migrd.engine.service import PlanView, PlugRequest, WhatIf
from migrd.engine.vms import Entry
from migrd.engine.what_if import WhatIfs
from migrd.errors import NotFound, Refused, Violation

WALL_S = 1_795_000_000.0
MEMORY_BYTES = 4 << 30


class _Launcher:
    async def vfio_features(self, spec: VmSpec) -> frozenset[QemuVfioFeature]:
        del spec
        return frozenset(QemuVfioFeature)

    def check(self, spec: VmSpec, devices: object = None) -> str:
        return f"digest of {spec} {devices}"

    def memory_bytes(self, spec: VmSpec) -> int:
        del spec
        return MEMORY_BYTES


class _Decisions(Decisions):
    def __init__(self, world: Any, in_use: Mapping[str, str]) -> None:
        super().__init__(world, SimpleNamespace(all=list))  # type: ignore[arg-type]  # unused
        self._in_use = in_use

    def users(self) -> dict[str, str]:
        return dict(self._in_use)


class Deciding:
    """A simulated host's decisions; nothing of it is kept."""

    def __init__(
        self,
        inventory: Inventory,
        in_use: Mapping[str, str],
        forbidden: frozenset[TrackingPolicy] = frozenset(),
    ) -> None:
        world: Any = SimpleNamespace(
            options=EngineOptions(host="host-a", forbidden_tracking_policies=forbidden),
            inventory=SimpleNamespace(current=inventory),
            launcher=_Launcher(),
            clock=SimpleNamespace(wall_s=lambda: WALL_S),
        )
        self._decisions = _Decisions(world, in_use)
        self._what_ifs = WhatIfs(world, self._decisions)

    async def defined(self, spec: VmSpec) -> StandingDecision | None:
        """Raises Refused, Invalid."""
        self._decisions.check_policy(spec)
        if not spec.devices:
            return None
        now = await self._decisions.circumstances(spec)
        decided = await self._decisions.decide(spec, now)
        decided.require()
        return decided.stands(WALL_S)

    async def what_if(
        self, question: WhatIf, spec: VmSpec, decision: StandingDecision | None
    ) -> PlanView:
        """Without a destination."""
        entry = Entry(spec)
        entry.decision = decision
        return await self._what_ifs.here(entry, question)

    async def plugged(
        self, spec: VmSpec, decision: StandingDecision | None, request: PlugRequest
    ) -> tuple[VmSpec, StandingDecision | None]:
        """Raises Refused, for a device that would lower the VM too."""
        id_ = request.id or f"hostdev{len(spec.devices)}"
        wanted = replace(spec, devices=(*spec.devices, SpecDevice(id_, request.address)))
        after = await self.defined(wanted)
        if after is not None and not request.accept_lower:
            was, would = Migratability.LIVE, after.plan.migratability
            if decision is not None:
                was = decision.plan.migratability
            if would.rank > was.rank:
                said = [
                    Violation(f"devices[{reason.device}]", reason.code.value, reason.message)
                    for reason in after.plan.limits
                ]
                text = f"with {request.address} it would be {would.value}, it is {was.value} now"
                raise Refused(text, said, code="lowers_migratability")
        return wanted, after

    async def unplugged(self, spec: VmSpec, id_: str) -> tuple[VmSpec, StandingDecision | None]:
        left = without(spec, id_)
        if left == spec:
            raise NotFound(f"{spec.name} has no passthrough device {id_}", code="unknown_device")
        return left, await self.defined(left)
