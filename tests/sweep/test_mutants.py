"""Each rule of the handover is broken once, on purpose: the sweep, or a scenario, must see it.

The mutants of the design's model, planted in the real code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest

from migrd.core import handover
from migrd.core.handover import DestinationPhase, DestinationTrigger, advance_destination
from migrd.core.migration import MigrationEvent
from migrd.core.phases import Instruction, Trigger
from migrd.engine import migrations
from migrd.engine.incoming import Incoming
from migrd.engine.outgoing import Outgoing
from migrd.engine.ports import Replay
from migrd.engine.switchover import obtain_answer
from migrd.errors import PeerError
from tests.fakes.gate import Fault
from tests.fakes.journal import FakeJournal
from tests.fakes.world import Pair
from tests.sweep import scenarios, scripts
from tests.sweep.sweeping import Limbo, Strike, calls_of, run, run_scenario

Hunt = Callable[[], None]


# The hunts: parts of the sweep, small enough to be repeated for each mutant ----------------------


def kills_and_cuts_off_the_source() -> None:
    for number, call in enumerate(calls_of(scripts.plain, "alpha"), 1):
        if call in ("journal.append_outgoing", "peer.grant"):
            for after_effect in (False, True):
                strike = Strike(number, "killed", Fault(after_effect=after_effect))
                run(scripts.plain, {"alpha": strike}, cut_off_s=40.0)


def kills_the_destination() -> None:
    for number, call in enumerate(calls_of(scripts.plain, "beta"), 1):
        if call.startswith(("journal.append", "vmm.run")):
            strike = Strike(number, "killed", Fault(after_effect=False))
            run(scripts.plain, {"beta": strike})


def lets_records_be_durable_although_their_write_failed() -> None:
    for number, call in enumerate(calls_of(scripts.plain, "alpha"), 1):
        if call == "journal.append_outgoing":
            for lives_on in range(1, 7):
                run(scripts.plain, {"alpha": Limbo(number, lives_on)})


def plays(scenario: Callable[[Pair], Awaitable[str]]) -> Hunt:
    return lambda: run_scenario(scenario)


# The mutants -------------------------------------------------------------------------------------


def grant_before_it_is_journalled(patch: pytest.MonkeyPatch) -> None:
    apply = Outgoing.apply

    async def early(self: Outgoing, event: MigrationEvent) -> None:
        if event.trigger is Trigger.TRANSFER_COMPLETED:
            with contextlib.suppress(PeerError):
                await self.peer.grant(self.id, self.state.epoch, run_guest=self.state.run_guest)
        await apply(self, event)

    patch.setattr(Outgoing, "apply", early)


def resume_on_a_time_out(patch: pytest.MonkeyPatch) -> None:
    async def impatient(m: Outgoing) -> MigrationEvent:
        event = await obtain_answer(m)
        if event.trigger is Trigger.OUTCOME_UNKNOWN:
            return m.event(Trigger.DESTINATION_REFUSED)
        return event

    steps = {**migrations.STEPS, Instruction.OBTAIN_ANSWER: impatient}
    patch.setattr(migrations, "STEPS", steps)


def the_last_record_is_lost_on_restart(patch: pytest.MonkeyPatch) -> None:
    replay = FakeJournal.replay

    async def forgetful(self: FakeJournal) -> Replay:
        whole = await replay(self)
        outgoing = [(stored, events[:-1]) for stored, events in whole.outgoing]
        return replace(whole, outgoing=outgoing)

    patch.setattr(FakeJournal, "replay", forgetful)


def a_refusal_that_is_not_durable(patch: pytest.MonkeyPatch) -> None:
    async def in_words_only(self: Incoming, why: str) -> None:
        event = handover.DestinationEvent(DestinationTrigger.REFUSAL_DECIDED, 0.0, 0.0, reason=why)
        self._enter(advance_destination(self.state, event))

    patch.setattr(Incoming, "_refuse", in_words_only)


def owned_before_cont(patch: pytest.MonkeyPatch) -> None:
    async def hasty(self: Incoming) -> None:
        await self._apply(DestinationTrigger.GUEST_RAN)
        await self._living().run_guest()

    patch.setattr(Incoming, "_start_guest", hasty)


def refuse_after_it_may_have_started(patch: pytest.MonkeyPatch) -> None:
    table: dict[DestinationPhase, Any] = dict(handover.DESTINATION_TRANSITIONS)
    refusing = {DestinationTrigger.REFUSAL_DECIDED: DestinationPhase.REFUSED}
    table[DestinationPhase.STARTING] = {**table[DestinationPhase.STARTING], **refusing}
    patch.setattr(handover, "DESTINATION_TRANSITIONS", MappingProxyType(table))


def no_record_before_the_start(patch: pytest.MonkeyPatch) -> None:
    apply = Incoming._apply

    async def unrecorded(self: Incoming, *triggers: DestinationTrigger, **facts: Any) -> None:
        if DestinationTrigger.START_ORDERED not in triggers:
            await apply(self, *triggers, **facts)
            return
        state = self.state
        for trigger in triggers:
            event = handover.DestinationEvent(trigger, 0.0, 0.0, run_guest=True)
            state = advance_destination(state, event)
            self._unsaved.append(event)
        self._enter(state)

    patch.setattr(Incoming, "_apply", unrecorded)


def the_abort_is_a_blind_write(patch: pytest.MonkeyPatch) -> None:
    async def blind(self: Outgoing, reason: str) -> bool:
        return True

    patch.setattr(Outgoing, "_refused_for_good", blind)


PAIRS: Sequence[tuple[Callable[[pytest.MonkeyPatch], None], Hunt]] = (
    (grant_before_it_is_journalled, kills_and_cuts_off_the_source),
    (resume_on_a_time_out, kills_and_cuts_off_the_source),
    (the_last_record_is_lost_on_restart, kills_and_cuts_off_the_source),
    (the_abort_is_a_blind_write, lets_records_be_durable_although_their_write_failed),
    (owned_before_cont, kills_the_destination),
    (a_refusal_that_is_not_durable, plays(scenarios.a_late_grant_after_a_refusal)),
    (refuse_after_it_may_have_started, plays(scenarios.the_destination_dies_as_it_starts)),
    (no_record_before_the_start, plays(scenarios.the_destination_dies_as_it_starts_unwatched)),
)


@pytest.mark.parametrize(("plant", "hunt"), PAIRS, ids=[plant.__name__ for plant, _ in PAIRS])
def test_a_planted_fault_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], hunt: Hunt, monkeypatch: pytest.MonkeyPatch
) -> None:
    hunt()  # the code as it is stands the same hunt
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        hunt()
