"""What a restarted daemon finds and nobody needs: ended on proof, else left alone and told."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping, Sequence
from typing import Any

import pytest
import structlog

from migrd import failpoints
from migrd.core.facts import QemuStatus, RunState, VmSpec
from migrd.core.phases import Phase
from tests.engine.arbitrating import arbitrated, record
from tests.engine.test_steering import never_converges
from tests.fakes.arbiter import FakeArbiter
from tests.fakes.qemu_process import FakeQemu
from tests.fakes.virtual_time import until
from tests.fakes.world import VM, Pair, running_pair

TAKEN_UP, STRAY = "migration taken up again", "a process in no journal"
Lines = Sequence[MutableMapping[str, Any]]


async def started(pair: Pair, host: str) -> Lines:
    """Start a daemon; what its recovery has to say."""
    with structlog.testing.capture_logs() as logs:
        await pair.start(host)
    return [entry for entry in logs if entry["event"] in (TAKEN_UP, STRAY)]


async def receiving(pair: Pair) -> str:
    """A migration whose memory is on its way; both daemons are killed."""
    never_converges(pair)
    migration_id = await pair.ask()
    await pair.until_phase(migration_id, Phase.PRECOPY)
    await until(lambda: pair.hosts["beta"].qemu(VM).status is QemuStatus.ACTIVE)
    return migration_id


async def test_a_copy_that_was_durably_refused_is_ended_at_once() -> None:
    """beta is killed after its refusal was durable, before its process has ended."""
    async with running_pair() as pair:
        migration_id = await receiving(pair)
        qemu = pair.hosts["beta"].qemu(VM)
        qemu.ignores_quit = True
        await pair.alpha.service.cancel(migration_id, by="op")
        await until(lambda: pair.stands(migration_id, "beta")[0] == "refused")
        await pair.kill("beta")
        assert not qemu.is_dead
        qemu.ignores_quit = False
        [said] = await started(pair, "beta")
        assert (said["deed"], said["proof"]) == ("reap", "durable_refusal")
        await until(lambda: qemu.is_dead, within_s=1.0)
        await pair.migrates_again()


@pytest.mark.parametrize("how", ["cancelled", "rolled_back"])
async def test_a_copy_whose_source_says_that_it_ended_is_refused_and_ended_at_once(
    how: str,
) -> None:
    """beta was down when it ended, and the source's word is the proof."""
    async with running_pair(receive_idle_s=10_000.0) as pair:
        migration_id = await receiving(pair)
        qemu = pair.hosts["beta"].qemu(VM)
        await pair.kill("beta")
        if how == "cancelled":
            await pair.alpha.service.cancel(migration_id, by="op")
        else:
            source = pair.hosts["alpha"].qemu(VM)
            assert source.transfer is not None
            source.transfer.cancel()
        assert (await pair.until_over(migration_id)).phase == how
        [said] = await started(pair, "beta")
        assert (said["deed"], said["expects"]) == ("reap", "refused")
        assert said["proof"] == "ended_at_the_source_never_granted"
        assert how in said["why"]
        await until(lambda: qemu.is_dead, within_s=1.0)
        assert pair.stands(migration_id, "beta")[0] == "refused"
        await pair.migrates_again()


async def test_a_copy_whose_source_is_silent_is_left_alone() -> None:
    async with running_pair(receive_idle_s=10_000.0) as pair:
        migration_id = await receiving(pair)
        qemu = pair.hosts["beta"].qemu(VM)
        await pair.kill("alpha")
        await pair.kill("beta")
        [said] = await started(pair, "beta")
        assert (said["deed"], said["other_side"]) == ("go_on", "silent")
        assert "expects" not in said
        await asyncio.sleep(600.0)
        assert not qemu.is_dead
        await pair.start("alpha")
        pair.ground.calm()
        assert (await pair.until_over(migration_id)).phase == Phase.SUCCEEDED


async def test_a_whole_copy_that_its_source_knows_nothing_of_is_kept_and_a_person_is_told() -> None:
    """The source has lost its journal: this may be the last copy."""
    async with running_pair(loaded_idle_s=5.0, receive_idle_s=5.0) as pair:
        pair.ground.wire.swallows_ack = True
        migration_id = await pair.ask()
        await until(lambda: pair.stands(migration_id, "beta")[0] == "loaded")
        await pair.kill("alpha")
        await pair.kill("beta")
        lost = pair.disks["alpha"].outgoing
        pair.disks["alpha"].outgoing = {}
        await pair.start("alpha")
        qemu = pair.hosts["beta"].qemu(VM)
        await started(pair, "beta")
        await until(lambda: pair.stands(migration_id, "beta")[0] == "loaded")
        await asyncio.sleep(60.0)
        assert not qemu.is_dead
        view = pair.view(migration_id, "beta")
        assert [c.type for c in view.conditions] == ["NotGoingOn"]
        assert view.next_step is not None
        assert "migrd resolve" in view.next_step
        pair.disks["alpha"].outgoing = lost
        pair.ground.calm()
        await pair.restart("alpha")
        await pair.until_over(migration_id)
        await pair.migrates_again()


def waiting(pair: Pair, host: str, name: str = VM) -> FakeQemu:
    """A QEMU that waits for a guest, and of which no journal has a word."""
    return pair.hosts[host].add(VmSpec(name, "tiny"), f"{name}-nobodys", incoming=True)


async def test_a_waiting_process_in_no_journal_is_kept_shown_and_said_aloud() -> None:
    async with running_pair() as pair:
        qemu = waiting(pair, "beta", "other")
        await pair.kill("beta")
        [said] = await started(pair, "beta")
        assert (said["deed"], said["log_level"]) == ("adopt", "error")
        assert "no journal knows" in said["why"]
        assert said["pid"] == qemu.pid
        await until(lambda: pair.beta.service.vm("other").state == "inmigrate")
        await asyncio.sleep(600.0)
        assert not qemu.is_dead
        await pair.beta.service.stop_vm("other")  # a person's word ends it
        assert qemu.is_dead


async def departed(pair: Pair) -> FakeQemu:
    """The guest has gone to beta, and the process that it left from lives on."""
    qemu = pair.hosts["alpha"].qemu(VM)
    qemu.ignores_quit = True
    view = await pair.migrate()
    assert view.phase == Phase.SUCCEEDED
    assert view.cause is not None
    assert view.cause.code == "source_left_behind"
    assert not qemu.is_dead
    await pair.kill("alpha")
    return qemu


async def test_the_process_that_a_guest_has_left_from_is_ended_by_the_journalled_release() -> None:
    async with running_pair(release_deadline_s=2.0) as pair:
        qemu = await departed(pair)
        qemu.ignores_quit = False
        [said] = await started(pair, "alpha")
        assert (said["deed"], said["managed"]) == ("reap", True)
        assert qemu.is_dead
        assert pair.alpha.service.vm(VM).state == "departed"
        await pair.migrates_again()


@pytest.mark.parametrize("why", ["runs", "silent", "no_release"])
async def test_an_old_process_without_that_proof_is_left_alone_and_said_aloud(why: str) -> None:
    async with running_pair(release_deadline_s=2.0) as pair:
        qemu = await departed(pair)
        qemu.ignores_quit = False
        ended = pair.disks["alpha"].outgoing
        if why == "runs":
            qemu.run_state = RunState.RUNNING  # somebody said `cont` by hand
        elif why == "silent":
            qemu.is_silent = True
        else:
            pair.disks["alpha"].outgoing = {}
        [said] = await started(pair, "alpha")
        assert (said["deed"], said["log_level"]) == ("leave_alone", "error")
        assert said["pid"] == qemu.pid
        await asyncio.sleep(60.0)
        assert not qemu.is_dead
        pair.disks["alpha"].outgoing = ended
        qemu.die("a person ended it")


async def test_a_second_process_is_said_once_and_taken_for_the_vm_when_the_first_is_gone() -> None:
    async with running_pair() as pair:
        first = pair.hosts["alpha"].qemu(VM)
        second = pair.hosts["alpha"].boot(VM, profile=None, running=False)
        pair.hosts["alpha"].adopted.add(second.instance)
        with structlog.testing.capture_logs() as logs:
            await asyncio.sleep(30.0)
        said = [entry for entry in logs if entry["event"] == STRAY]
        assert [entry["deed"] for entry in said] == ["leave_alone"], "not at every look"
        pair.guest().may_end = True
        first.die("killed")
        await until(lambda: pair.alpha.service.vm(VM).pid == second.pid, within_s=10.0)


# The arbiter's record ----------------------------------------------------------------------------


async def test_a_guest_that_was_given_to_another_host_meanwhile_is_not_started_here() -> None:
    """beta is killed right before `cont`; then a person declares it dead, which it is not."""
    async with arbitrated() as (pair, store):

        def kill(point: str) -> None:
            if point == "destination.start_ordered.journalled":
                pair.beta.gate.crash()

        with failpoints.observing(kill):
            migration_id = await pair.ask()
            await pair.beta.gate.crashed.wait()
        await pair.kill("beta")
        found = record(store)
        assert found is not None
        assert (found.owner, found.started) == ("beta", True)
        fencing = FakeArbiter(store, "a-person")
        await fencing.assign(
            found, "alpha", epoch=found.epoch, started=True, migration_id=migration_id
        )
        assert (await pair.until_over(migration_id)).phase == Phase.ROLLED_BACK
        assert pair.running_on() == "alpha"
        [said] = await started(pair, "beta")
        assert (said["deed"], said["log_level"]) == ("leave_alone", "error")
        assert said["arbiter"] == "other_host_started"
        await asyncio.sleep(120.0)
        assert pair.running_on() == "alpha", "and nowhere else"
        assert [run.host for run in pair.guest().runs].count("beta") == 0
