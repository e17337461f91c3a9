"""What if: other devices, another policy, a downtime limit, a destination. Nothing is changed.

as it is, running    the standing decision, with the facts of now (core.hot_plug.reconsider)
as it is, stopped    what its next start would decide, as far as it is known without a probe
otherwise            what a start like that would decide
with a destination   that host's decision besides, and all of preflight
"""

import asyncio
from dataclasses import dataclass, replace

from migrd.core.device_preflight import as_refusal
from migrd.core.facts import Feature, VmFacts, VmSpec
from migrd.core.migration import Mode, Refusal
from migrd.core.standing import StandingDecision
from migrd.core.vfio_launch import VfioLaunch
from migrd.engine.decisions import Decided, Decisions, placed_spec
from migrd.engine.ownership import Proof
from migrd.engine.ports import HostProfile, Peer, Vmm
from migrd.engine.prepare import Candidate, judge
from migrd.engine.service import PlanView, WhatIf
from migrd.engine.vms import Entry
from migrd.engine.world import World


@dataclass(frozen=True)
class _Here:
    """What is decided on this host."""

    spec: VmSpec
    decision: StandingDecision | None
    refusals: tuple[Refusal, ...]
    told: VfioLaunch | None
    """What QEMU would be told; None: what it has been told."""


@dataclass(frozen=True)
class WhatIfs:
    """Answers what-if questions about the VMs of this host."""

    world: World
    decisions: Decisions
    proves: Proof = lambda _: False

    async def here(self, entry: Entry, question: WhatIf) -> PlanView:
        """Without a destination: may it be started like this, and what could be promised of it?"""
        found = await self._here(entry, question)
        facts = entry.facts
        return PlanView(
            vm=question.vm,
            destination=None,
            possible=not found.refusals,
            refusals=found.refusals,
            warnings=(),
            memory_bytes=None if facts is None else facts.memory_bytes,
            mode_choices=_modes(found.spec, facts),
            decision=found.decision,
        )

    async def there(self, entry: Entry, question: WhatIf, vmm: Vmm, peer: Peer) -> PlanView:
        """With a destination: would it go, and could it come back?"""
        assert question.move is not None
        found = await self._here(entry, question)
        plan = None if found.decision is None else found.decision.plan
        candidate = Candidate(found.spec, entry.epoch, vmm, plan, found.told, self.proves)
        facts: VmFacts | None
        profile: HostProfile | None
        async with asyncio.timeout(self.world.options.preflight_deadline_s):
            result, facts, profile = await judge(self.world, question.move, candidate, peer)
        refusals = tuple(dict.fromkeys((*found.refusals, *result.refusals)))
        return PlanView(
            vm=question.vm,
            destination=question.move.destination,
            possible=not refusals,
            refusals=refusals,
            warnings=result.warnings,
            memory_bytes=None if facts is None else facts.memory_bytes,
            mode_choices=_modes(found.spec, facts),
            decision=found.decision,
            plan_there=None if profile is None else profile.plan,
        )

    async def _here(self, entry: Entry, question: WhatIf) -> _Here:
        spec = _as_asked(entry.spec, question)
        self.decisions.check_policy(spec)
        if not spec.devices:
            return _Here(spec, None, (), None)
        limit_s = question.downtime_limit_s
        if spec == entry.spec:
            decided, decision = await self.decisions.now_of(entry, downtime_limit_s=limit_s)
            is_running = entry.vmm is not None and not entry.vmm.is_dead
            refusals = () if is_running else _refusals(decided)
            return _Here(placed_spec(entry), decision, refusals, None)
        now = await self.decisions.circumstances(spec, entry)
        fresh: frozenset[str] = frozenset()  # as a start would find them
        now = replace(now, attached=fresh, downgraded=fresh, downtime_limit_s=limit_s)
        decided = await self.decisions.decide(spec, now)
        return _Here(spec, self._stands(decided), _refusals(decided), decided.plan.launch)

    def _stands(self, decided: Decided) -> StandingDecision:
        return decided.stands(self.world.clock.wall_s())


def _as_asked(spec: VmSpec, question: WhatIf) -> VmSpec:
    if question.devices is not None:
        spec = replace(spec, devices=question.devices)
    if question.tracking_policy is not None:
        spec = replace(spec, tracking_policy=question.tracking_policy)
    return spec


def _refusals(decided: Decided) -> tuple[Refusal, ...]:
    own = [Refusal(violation.code, violation.message) for violation in decided.own]
    refused = [as_refusal(reason, decided.plan) for reason in decided.plan.refused]
    return tuple(dict.fromkeys((*own, *refused)))


def _modes(spec: VmSpec, facts: VmFacts | None) -> tuple[Mode, ...]:
    """QEMU refuses postcopy for passthrough devices; other VMMs may have none."""
    if facts is None or Feature.POSTCOPY not in facts.features:
        return (Mode.PRECOPY,)
    has_devices = bool(spec.devices) or bool(facts.passthrough_devices)
    return (Mode.PRECOPY,) if has_devices else (Mode.PRECOPY, Mode.POSTCOPY)
