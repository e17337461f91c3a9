"""The main job, with nothing going wrong."""

from __future__ import annotations

import pytest

from migrd.core.facts import RunState
from migrd.core.phases import Phase
from migrd.engine.service import Role, Whereabouts
from tests.fakes.virtual_time import until
from tests.fakes.wire import MIB
from tests.fakes.world import VM, Pair, running_pair


async def test_a_guest_moves_and_goes_on_at_the_destination() -> None:
    async with running_pair() as pair:
        view = await pair.migrate()
        assert view.phase == Phase.SUCCEEDED, (view.cause, view.refusals)
        assert view.guest_runs_on is Whereabouts.DESTINATION
        assert pair.running_on() == "beta"
        assert not pair.hosts["alpha"].living(VM)
        assert [run.host for run in pair.guest().runs] == ["alpha", "beta"]


async def test_the_blackout_reported_bounds_the_one_the_guest_had() -> None:
    async with running_pair() as pair:
        view = await pair.migrate()
        (truly_s,) = pair.guest().blackouts_s
        assert view.blackout_s is not None
        assert truly_s <= view.blackout_s <= truly_s + 0.01
        assert pair.alpha.observer.blackouts_s == [view.blackout_s]
        assert view.qemu_downtime_s is not None


async def test_the_phases_of_the_record_sum_to_its_total() -> None:
    async with running_pair() as pair:
        view = await pair.migrate()
        durations = [entry.duration_s for entry in view.timeline if entry.duration_s is not None]
        assert [entry.phase for entry in view.timeline] == [
            "pending",
            "preflight",
            "preparing",
            "precopy",
            "switchover",
            "granted",
            "completing",
            "succeeded",
        ]
        assert view.total_s is not None
        assert sum(durations) == pytest.approx(view.total_s)


async def test_both_hosts_show_where_the_vm_is_now() -> None:
    async with running_pair() as pair:
        view = await pair.migrate()
        await pair.settle()
        assert pair.alpha.service.vm(VM).state == "departed"
        there = pair.beta.service.vm(VM)
        await until(lambda: pair.beta.service.vm(VM).state == "running")
        assert there.epoch == view.epoch == pair.alpha.service.vm(VM).epoch
        other = pair.view(view.id, on="beta")
        assert (other.role, other.phase, other.is_terminal) == (Role.DESTINATION, "running", True)
        assert other.guest_runs_on is Whereabouts.DESTINATION


async def test_a_guest_goes_there_and_back_many_times_and_leaves_nothing_behind() -> None:
    async with running_pair() as pair:
        epochs = []
        for _ in range(10):
            source = pair.running_on()
            assert source is not None
            view = await pair.migrate(source=source)
            assert view.phase == Phase.SUCCEEDED, view.cause
            epochs.append(view.epoch)
            await pair.settle()
            assert len(pair.all_living()) == 1
        assert epochs == sorted(set(epochs)), "epochs only grow"
        left = [q for host in pair.hosts.values() for q in host.qemus]
        assert len(left) == 1, "files of ended processes are left"


async def test_a_guest_that_was_paused_is_moved_and_stays_paused() -> None:
    async with running_pair() as pair:
        pair.hosts["alpha"].qemu(VM).stop(RunState.PAUSED)
        view = await pair.migrate()
        assert view.phase == Phase.SUCCEEDED, (view.cause, view.refusals)
        assert view.blackout_s is None, "it did not run before, so it missed nothing"
        assert pair.running_on() is None
        there = pair.hosts["beta"].qemu(VM)
        assert there.run_state is RunState.PAUSED
        assert there.copy == pair.guest().version


async def test_each_dirty_sync_is_a_round_and_each_decision_is_recorded() -> None:
    async with running_pair() as pair:
        busy(pair)
        view = await pair.migrate()
        rounds = await pair.alpha.service.rounds(view.id)
        decisions = await pair.alpha.service.decisions(view.id)
        assert len(rounds) >= 3
        numbers = [r.number for r in rounds]
        assert numbers == sorted(set(numbers)), "each round once, in order"
        assert decisions[-1].reason
        assert {d.verdict for d in decisions} >= {"continue"}
        assert all(r.dirty_pages_per_s for r in rounds[1:])


async def test_the_rounds_are_still_there_after_a_restart() -> None:
    async with running_pair() as pair:
        busy(pair)
        view = await pair.migrate()
        before = await pair.alpha.service.rounds(view.id)
        await pair.restart("alpha")
        after = await pair.alpha.service.rounds(view.id)
        assert [r.number for r in after] == [r.number for r in before]
        assert pair.view(view.id).phase == Phase.SUCCEEDED


async def test_the_stream_tells_every_phase_once_in_order() -> None:
    async with running_pair() as pair:
        async with pair.alpha.service.events(after_id=None) as events:
            view = await pair.migrate()
            phases, last_id = [], 0
            async for event in events:
                assert event.id > last_id
                last_id = event.id
                if event.kind == "migration.phase":
                    phases.append(event.body["phase"])
                    if event.body["phase"] == "succeeded":
                        break
        assert phases == [entry.phase for entry in view.timeline[1:]]


async def test_the_destinations_copy_runs_by_cont_alone() -> None:
    async with running_pair() as pair:
        busy(pair)
        pair.ground.load.device_s = 0.2
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.SWITCHOVER)
        there = pair.hosts["beta"].qemu(VM)
        assert not there.is_running
        assert there.autostart is False
        await pair.until_over(migration_id)
        assert pair.beta.gate.calls.count("vmm.run_guest") == 1


async def test_nothing_is_asked_of_qemu_between_stop_and_grant_but_what_must_be() -> None:
    """The guest stands still meanwhile."""
    async with running_pair() as pair:
        await pair.migrate()
        calls = pair.alpha.gate.calls
        start = calls.index("vmm.continue_switchover")
        between = calls[start + 1 : calls.index("peer.grant")]
        assert [call for call in between if call.startswith("vmm.")] == []
        records = "the switchover, written while QEMU goes on, and granted"
        assert between.count("journal.append_outgoing") == 2, records


async def test_hosts_that_a_guest_comes_to_again_and_again_keep_nothing_of_how_it_was_before() -> (
    None
):
    async with running_pair() as pair:
        await pair.migrates_again(times=4)
        await pair.settle()
        assert [len(d.engine.migrations._before) for d in pair.daemons.values()] == [0, 0]


def busy(pair: Pair) -> None:
    """A guest that takes some rounds."""
    pair.ground.wire.bandwidth_bytes_per_s = 200 * MIB
    pair.ground.load.dirty_bytes_per_s = 120 * MIB
    pair.ground.load.working_set_bytes = 160 * MIB
