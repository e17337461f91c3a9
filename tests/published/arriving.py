"""Published failures of what a destination leaves behind: checks and their plants."""

from __future__ import annotations

from typing import Any

import pytest

from migrd.core.facts import QemuStatus, TransferSample
from migrd.core.handover import DestinationPhase, DestinationTrigger
from migrd.core.migration import Mode
from migrd.core.phases import Phase
from migrd.engine import migrations
from migrd.engine.incoming import Incoming
from migrd.errors import Conflict
from tests.fakes.virtual_time import until
from tests.fakes.world import VM, Pair
from tests.published.handover import copying
from tests.published.row import on_a_pair

# A stream that broke ------------------------------------------------------------------------------


@on_a_pair()
async def a_copy_that_is_of_no_use_is_ended(pair: Pair) -> None:
    migration_id = await copying(pair)
    pair.ground.wire.cut()
    assert (await pair.until_over(migration_id)).phase == Phase.ROLLED_BACK
    gone = lambda: not pair.hosts["beta"].living(VM)  # noqa: E731 - named for the message
    await until(gone, what="the copy on beta is ended")
    await pair.migrates_again(times=1)


def the_copy_is_left(patch: pytest.MonkeyPatch) -> None:
    async def leave_it(self: Incoming) -> None:
        return None

    patch.setattr(Incoming, "_discard_copy", leave_it)


@on_a_pair()
async def a_broken_arrival_is_no_arrival(pair: Pair) -> None:
    migration_id = await copying(pair)
    pair.ground.wire.cut()
    await pair.until_over(migration_id)
    await until(lambda: pair.stands(migration_id, "beta")[1], what="it is over there, too")
    there = pair.view(migration_id, on="beta")
    assert there.phase == "refused"
    passed = [entry.phase for entry in there.timeline]
    assert "loaded" not in passed, f"said to have the guest: {passed}"


def a_stream_that_ended_has_brought_the_guest(patch: pytest.MonkeyPatch) -> None:
    received = Incoming._received

    async def blind(self: Incoming, sample: TransferSample) -> bool:
        if sample.qemu_status not in (QemuStatus.FAILED, QemuStatus.CANCELLED):
            return await received(self, sample)
        await self._apply(DestinationTrigger.GUEST_LOADED, mode=Mode.PRECOPY)
        return True

    patch.setattr(Incoming, "_received", blind)


@on_a_pair(receive_idle_s=60.0)
async def a_destination_whose_stream_failed_says_so_without_being_told(pair: Pair) -> None:
    migration_id = await copying(pair)
    pair.road.part("alpha", "beta")
    pair.ground.wire.cut()
    refused = lambda: pair.stands(migration_id, "beta")[0] == "refused"  # noqa: E731 - named
    await until(refused, within_s=5.0, what="it gives the migration up by itself")
    await until(lambda: not pair.hosts["beta"].living(VM), what="its copy is ended")


def a_failed_stream_is_waited_for(patch: pytest.MonkeyPatch) -> None:
    received = Incoming._received

    async def patient(self: Incoming, sample: TransferSample) -> bool:
        failed = sample.qemu_status in (QemuStatus.FAILED, QemuStatus.CANCELLED)
        return False if failed else await received(self, sample)

    patch.setattr(Incoming, "_received", patient)


@on_a_pair(receive_idle_s=20.0)
async def a_destination_that_nobody_sends_to_any_more_gives_up(pair: Pair) -> None:
    migration_id = await copying(pair)
    pair.ground.wire.freeze()
    await pair.kill("alpha")
    pair.hosts["alpha"].qemu(VM).die("power off")
    over = lambda: pair.stands(migration_id, "beta")[1]  # noqa: E731 - named for the message
    await until(over, within_s=120.0, what="the destination gives up")
    assert pair.stands(migration_id, "beta")[0] == DestinationPhase.REFUSED
    await until(lambda: not pair.hosts["beta"].living(VM), what="its QEMU is ended")


def a_destination_waits_for_ever(patch: pytest.MonkeyPatch) -> None:
    async def never(self: Incoming, what: str) -> bool:
        return False

    patch.setattr(Incoming, "_given_up", never)


# After a failure, again ---------------------------------------------------------------------------


@on_a_pair()
async def a_migration_that_failed_does_not_stand_in_the_way_of_the_next(pair: Pair) -> None:
    pair.hosts["beta"].profiles["tiny"] = "pc, 512 MiB"
    view = await pair.migrate()
    assert view.phase == Phase.REFUSED, view.cause
    pair.hosts["beta"].profiles["tiny"] = pair.hosts["alpha"].profiles["tiny"]
    try:
        view = await pair.migrate()
    except Conflict as refusal:
        raise AssertionError(f"refused for the one before: {refusal.code}") from refusal
    assert view.phase == Phase.SUCCEEDED, view.cause


def whoever_migrated_once_still_does(patch: pytest.MonkeyPatch) -> None:
    active_of = migrations.Migrations.active_of

    def sticky(self: migrations.Migrations, vm: str) -> Any:
        known = [m for m in self.outgoing.values() if m.stored.request.vm == vm]
        return active_of(self, vm) or (known[-1] if known else None)

    patch.setattr(migrations.Migrations, "active_of", sticky)
