"""What a client is shown: where the guest is, what a person should do; never more than known."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from migrd.core.handover import DestinationPhase
from migrd.core.migration import Mode
from migrd.core.phases import Phase
from migrd.engine.service import Whereabouts
from migrd.engine.views import RUNS_ON_SEEN_THERE, next_step
from tests.engine.test_happy_path import busy
from tests.engine.test_steering import never_converges
from tests.fakes.virtual_time import now_s
from tests.fakes.wire import MIB
from tests.fakes.world import VM, Pair, running_pair


def truth(pair: Pair) -> set[Whereabouts]:
    """What may be said of the guest at this moment, by the ground."""
    on = pair.running_on()
    if on == "alpha":
        return {Whereabouts.SOURCE, Whereabouts.MOVING, Whereabouts.UNKNOWN}
    if on == "beta":
        return {Whereabouts.DESTINATION, Whereabouts.MOVING, Whereabouts.UNKNOWN}
    return {Whereabouts.MOVING, Whereabouts.UNKNOWN, Whereabouts.NOWHERE}


@pytest.mark.parametrize("how", ["succeeds", "is_cancelled", "stalls", "is_lost"])
async def test_both_hosts_never_say_that_the_guest_is_where_it_is_not(how: str) -> None:
    """Looked at every tenth of a millisecond. A few milliseconds pass before news has travelled;
    for so long `source` may stand for a guest that has just been stopped."""
    async with running_pair() as pair:
        pair.ground.load.device_s = 0.05
        if how != "succeeds":
            busy(pair)
        migration_id = await pair.ask()
        wrong: list[tuple[float, str, str]] = []
        ends_s = now_s() + 12.0
        acted = False
        while now_s() < ends_s and not pair.stands(migration_id)[1]:
            said = pair.view(migration_id).guest_runs_on
            if said not in truth(pair):
                wrong.append((now_s(), said, str(pair.running_on())))
            if not acted and pair.stands(migration_id)[0] == Phase.SWITCHOVER:
                acted = True
                if how == "is_cancelled":
                    await pair.alpha.service.cancel(migration_id, by="op")
                elif how == "stalls":
                    pair.ground.wire.freeze()
                elif how == "is_lost":
                    pair.hosts["alpha"].qemu(VM).die("killed")
            await asyncio.sleep(0.0001)
        assert acted
        assert not [w for w in wrong if w[1] == Whereabouts.DESTINATION], wrong
        lasting_s = max((w[0] for w in wrong), default=0.0) - min(
            (w[0] for w in wrong), default=0.0
        )
        assert len(wrong) * 0.0001 < 0.05, (len(wrong), lasting_s, wrong[:3])
        view = await pair.until_over(migration_id)
        assert view.guest_runs_on in truth(pair) - {Whereabouts.MOVING, Whereabouts.UNKNOWN}
        pair.ground.wire.heal()


async def test_progress_and_estimate_are_shown_while_it_runs_and_stand_still_afterwards() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await asyncio.sleep(10.0)
        view = pair.view(migration_id)
        assert view.progress.total_bytes == 256 * MIB
        assert view.progress.transferred_bytes
        assert view.progress.rounds >= 2
        assert view.estimate is not None
        assert view.estimate.converges is False
        assert view.last_decision is not None
        assert view.last_decision.reason == "waiting"
        assert view.total_s is None
        before = view.generation
        await pair.alpha.service.cancel(migration_id, by="op")
        ended = await pair.until_over(migration_id)
        assert ended.generation > before
        assert ended.estimate is None
        await asyncio.sleep(5.0)
        assert pair.view(migration_id).elapsed_s == ended.elapsed_s == ended.total_s


async def test_generations_only_grow_also_over_a_restart() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        migration_id = await pair.ask()
        seen = []
        for _ in range(20):
            seen.append(pair.view(migration_id).generation)
            await asyncio.sleep(0.2)
        assert seen == sorted(seen)
        versions = pair.view(migration_id).resource_version
        await pair.restart("alpha")
        assert pair.view(migration_id).resource_version > versions


async def test_a_cancel_under_way_is_shown() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        migration_id = await pair.ask(multifd_channels=2)
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await asyncio.sleep(1.0)
        pair.ground.wire.freeze()
        await pair.alpha.service.cancel(migration_id, by="op")
        await asyncio.sleep(0.5)
        types = {c.type for c in pair.view(migration_id).conditions}
        assert "CancelRequested" in types
        pair.ground.wire.heal()
        assert "CancelRequested" not in {
            c.type for c in (await pair.until_over(migration_id)).conditions
        }


async def test_every_state_that_waits_for_a_person_says_what_to_do() -> None:
    async with running_pair() as pair:
        await pair.ask()
        (m,) = pair.alpha.engine.migrations.outgoing.values()
        for phase in (Phase.NEEDS_OPERATOR, Phase.GUEST_LOST, Phase.ROLLED_BACK):
            for granted in (False, True):
                m_state, m.state = m.state, replace(m.state, phase=phase, granted=granted)
                said = next_step(m) or ""
                assert VM in said or "alpha" in said, phase
                m.state = m_state


def test_the_destination_has_a_word_for_each_of_its_phases() -> None:
    assert set(RUNS_ON_SEEN_THERE) == set(DestinationPhase)


async def test_the_host_is_shown_with_its_slots_peers_and_profiles() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await asyncio.sleep(1.0)
        alpha, beta = pair.alpha.service.host(), pair.beta.service.host()
        assert (alpha.outgoing_active, beta.incoming_active) == (1, 1)
        assert alpha.profiles == ("tiny",)
        assert alpha.qemu_binaries == {"tiny": "10.0.2"}
        assert [(p.name, p.up) for p in alpha.peers] == [("beta", True)]
        await pair.kill("beta")
        await asyncio.sleep(11.0)
        (peer,) = pair.alpha.service.host().peers
        assert (peer.up, peer.error) == (False, "beta: connection refused")
        assert all(check.ok for check in pair.alpha.service.readiness()), "that is beta's trouble"
        await pair.start("beta")
        await pair.alpha.service.cancel(migration_id, by="op")
        await pair.until_over(migration_id)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [(Mode.PRECOPY, Whereabouts.SOURCE), (Mode.POSTCOPY, Whereabouts.UNKNOWN)],
)
async def test_a_destination_that_refused_a_postcopy_does_not_say_that_the_source_runs_it(
    mode: Mode, expected: Whereabouts
) -> None:
    """It may have left the source, and be lost: only the source knows."""
    async with running_pair() as pair:
        busy(pair)
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.PRECOPY)
        i = pair.beta.engine.migrations.incoming[migration_id]
        i.want_refusal("somebody said so")
        await pair.until_over(migration_id)
        i.state = replace(i.state, mode=mode)
        assert pair.view(migration_id, on="beta").guest_runs_on is expected
