"""A daemon is killed and started again: migrations, VMs and clients go on."""

from __future__ import annotations

import asyncio

import pytest

from migrd.core.facts import QemuStatus, VmSpec
from migrd.core.migration import Policy
from migrd.core.phases import Phase
from migrd.engine.service import Resolution
from migrd.errors import JournalError
from tests.engine.test_happy_path import busy
from tests.engine.test_steering import never_converges
from tests.fakes.virtual_time import until
from tests.fakes.wire import MIB
from tests.fakes.world import VM, Pair, running_pair


@pytest.mark.parametrize("side", ["alpha", "beta"])
async def test_a_restart_during_precopy_takes_the_migration_up_and_steers_on(side: str) -> None:
    async with running_pair() as pair:
        never_converges(pair)
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await asyncio.sleep(5.0)
        rounds = len(await pair.alpha.service.rounds(migration_id))
        transfers = list(pair.ground.wire.transfers)
        await pair.restart(side)
        await asyncio.sleep(5.0)
        assert pair.ground.wire.transfers == transfers, "QEMU's own migration was left alone"
        assert pair.stands(migration_id)[0] == Phase.PRECOPY
        assert len(await pair.alpha.service.rounds(migration_id)) > rounds
        await pair.alpha.service.change_policy(migration_id, Policy(downtime_limit_s=5.0), by="op")
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.SUCCEEDED, view.cause
        numbers = [r.number for r in await pair.alpha.service.rounds(migration_id)]
        assert numbers == sorted(set(numbers)), "no round twice"


async def test_both_daemons_restarted_again_and_again_during_precopy_do_no_harm() -> None:
    async with running_pair() as pair:
        busy(pair)
        pair.ground.wire.bandwidth_bytes_per_s = 130 * MIB
        migration_id = await pair.ask()
        for side in ("alpha", "beta", "alpha", "beta"):
            await asyncio.sleep(0.4)
            await pair.restart(side)
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.SUCCEEDED, view.cause
        await pair.migrates_again()


async def test_an_orderly_stop_leaves_qemu_and_the_migration_as_they_are() -> None:
    async with running_pair() as pair:
        busy(pair)
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await until(lambda: pair.hosts["alpha"].qemu(VM).status is QemuStatus.ACTIVE)
        await pair.daemons.pop("alpha").stop()
        await until(lambda: pair.hosts["alpha"].qemu(VM).status is QemuStatus.PRE_SWITCHOVER)
        assert len(pair.all_living()) == 2
        await pair.start("alpha")
        assert (await pair.until_over(migration_id)).phase == Phase.SUCCEEDED


async def test_a_source_that_is_down_for_long_finds_what_its_destination_has_decided() -> None:
    async with running_pair(receive_idle_s=30.0) as pair:
        never_converges(pair)
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await pair.kill("alpha")
        await until(lambda: pair.stands(migration_id, "beta")[0] == "refused", within_s=120.0)
        await pair.start("alpha")
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.ROLLED_BACK
        assert pair.running_on() == "alpha"
        await pair.migrates_again()


async def test_vms_epochs_and_ended_migrations_are_remembered() -> None:
    async with running_pair() as pair:
        view = await pair.migrate()
        await pair.settle()
        for side in ("alpha", "beta"):
            await pair.restart(side)
        assert pair.view(view.id).phase == Phase.SUCCEEDED
        assert pair.view(view.id, on="beta").phase == "running"
        assert pair.alpha.service.vm(VM).state == "departed"
        await until(lambda: pair.beta.service.vm(VM).state == "running")
        assert pair.beta.service.vm(VM).epoch == view.epoch
        await pair.migrates_again()


async def test_a_vm_that_died_while_the_daemon_was_down_is_seen_to_be_dead() -> None:
    async with running_pair() as pair:
        await pair.kill("alpha")
        pair.hosts["alpha"].qemu(VM).die("killed")
        await pair.start("alpha")
        assert pair.alpha.service.vm(VM).state == "dead"
        await pair.alpha.service.start_vm(VM)
        await pair.migrates_again()


async def test_the_source_qemu_dies_while_nobody_watches_and_a_person_decides() -> None:
    """It may have resumed by itself meanwhile."""
    async with running_pair() as pair:
        pair.ground.wire.swallows_ack = True
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.SWITCHOVER)
        await until(lambda: pair.hosts["beta"].qemu(VM).status is QemuStatus.COMPLETED)
        await pair.kill("alpha")
        pair.hosts["alpha"].qemu(VM).die("killed")
        await pair.start("alpha")
        await pair.until_phase(migration_id, Phase.NEEDS_OPERATOR)
        await asyncio.sleep(60.0)
        assert pair.running_on() is None
        await pair.alpha.service.resolve(
            migration_id, Resolution.USE_DESTINATION_COPY, evidence="its log says so", by="op"
        )
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.SUCCEEDED, view.cause
        assert pair.running_on() == "beta"


async def test_the_source_qemu_dies_in_precopy_while_its_daemon_is_down_and_it_is_lost() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await asyncio.sleep(1.0)
        await pair.kill("alpha")
        pair.hosts["alpha"].qemu(VM).die("killed")
        await pair.start("alpha")
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.GUEST_LOST
        await pair.settle()


async def test_a_qemu_whose_directory_is_gone_is_not_called_dead() -> None:
    """Nothing is concluded from what cannot be found."""
    async with running_pair() as pair:
        never_converges(pair)
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await pair.kill("alpha")
        lost = pair.hosts["alpha"].qemus
        pair.hosts["alpha"].qemus = []
        await pair.start("alpha")
        await asyncio.sleep(120.0)
        assert pair.stands(migration_id)[0] == Phase.NEEDS_OPERATOR
        await pair.kill("alpha")
        pair.hosts["alpha"].qemus = lost
        await pair.start("alpha")
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.ROLLED_BACK
        assert pair.running_on() == "alpha"


async def test_a_destination_taken_out_of_the_roster_is_not_forgotten() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.PRECOPY)
        host = pair.hosts.pop("beta")
        await pair.restart("alpha")
        await asyncio.sleep(5.0)
        assert "roster" in pair.view(migration_id).conditions[0].message
        pair.hosts["beta"] = host
        await pair.restart("alpha")
        pair.ground.calm()
        assert (await pair.until_over(migration_id)).phase == Phase.SUCCEEDED


async def test_a_journal_that_makes_no_sense_stops_the_start() -> None:
    async with running_pair() as pair:
        view = await pair.migrate()
        stored, events = pair.disks["alpha"].outgoing[view.id]
        pair.disks["alpha"].outgoing[view.id] = (stored, events[2:])
        await pair.kill("alpha")
        with pytest.raises(JournalError) as caught:
            await pair.start("alpha")
        assert caught.value.code == "journal_corrupt"
        pair.disks["alpha"].outgoing[view.id] = (stored, events)
        await pair.start("alpha")


async def test_an_adopted_vm_comes_and_goes_with_the_rescan() -> None:
    async with Pair() as pair:
        qemu = pair.hosts["alpha"].boot("guest", profile=None)
        pair.hosts["alpha"].adopted.add(qemu.instance)
        await until(lambda: "guest" in {v.name for v in pair.alpha.service.vms()[1]}, within_s=5.0)
        view = pair.alpha.service.vm("guest")
        assert not view.managed
        await until(lambda: pair.alpha.service.vm("guest").state == "running")
        qemu.die("its owner stopped it")
        await until(lambda: pair.alpha.service.vm("guest").state == "dead")


async def test_an_adopted_process_that_gave_its_guest_away_is_not_taken_for_the_guest() -> None:
    """It lives on, and is found again by the daemon that starts after it."""
    async with running_pair() as pair:
        old = pair.hosts["alpha"].qemu(VM)
        pair.hosts["alpha"].adopted.add(old.instance)
        old.ignores_quit = True
        await pair.restart("alpha")
        await pair.migrate()
        await pair.settle()
        assert not old.is_dead
        await pair.restart("alpha")
        await asyncio.sleep(10.0)
        assert pair.alpha.service.vm(VM).state == "departed"
        await pair.migrates_again()


async def test_a_qemu_launched_for_a_guest_that_never_came_is_not_left_behind() -> None:
    """beta's daemon is killed between the launch and its record."""
    async with running_pair() as pair:
        await pair.beta.service.define_vm(VmSpec("other", "tiny"), dry_run=False)
        migration_id = await pair.ask()
        await until(lambda: pair.hosts["beta"].living(VM), what="the launch")
        await pair.restart("beta")
        view = await pair.until_over(migration_id)
        assert view.is_terminal
        await pair.settle()
        await until(lambda: len(pair.all_living()) == 1, within_s=90.0, what="one QEMU is left")
