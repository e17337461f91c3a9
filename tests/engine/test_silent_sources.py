"""A destination where a guest may come by postcopy gives up on silence only once nothing can come.

While its refusal is being written the guest may leave, and then this process alone has all of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from migrd.core.facts import QemuStatus
from migrd.core.handover import DestinationTrigger
from migrd.core.phases import Phase
from tests.fakes.virtual_time import until
from tests.fakes.world import VM, Pair, running_pair
from tests.sweep import scripts


async def until_silent(pair: Pair) -> str:
    """A postcopy is prepared; its source is gone before it has connected."""

    def wrote(kind: str, id_: str, values: Iterable[object]) -> None:
        triggers = [getattr(value, "trigger", None) for value in values]
        if DestinationTrigger.INCOMING_READY in triggers:
            pair.alpha.gate.crash()

    disk = pair.disks["beta"]
    before, disk.wrote = disk.wrote, wrote
    migration_id = await scripts.postcopy(pair)
    await until(lambda: pair.alpha.gate.is_dead)
    disk.wrote = before
    await pair.kill("alpha")
    return migration_id


async def test_a_guest_that_may_come_by_postcopy_is_waited_for_while_nobody_has_connected() -> None:
    """A refusal that crosses with it would end the only process that has all of the guest."""
    async with running_pair(receive_idle_s=5.0) as pair:
        migration_id = await until_silent(pair)
        await asyncio.sleep(60.0)
        view = pair.view(migration_id, "beta")
        assert (view.phase, [c.type for c in view.conditions]) == ("receiving", ["NotGoingOn"])
        assert "may still come" in view.conditions[0].message
        qemu = pair.hosts["beta"].qemu(VM)
        assert view.next_step is not None
        assert f"end process {qemu.pid}" in view.next_step
        await pair.start("alpha")
        pair.ground.calm()
        await pair.until_over(migration_id)
        assert not pair.view(migration_id, "beta").conditions or qemu.is_dead
        await pair.migrates_again()


async def test_where_that_host_is_gone_for_good_its_end_by_hand_is_a_refusal() -> None:
    async with running_pair(receive_idle_s=5.0) as pair:
        migration_id = await until_silent(pair)
        await asyncio.sleep(60.0)
        pair.hosts["beta"].qemu(VM).die("ended by hand")
        await until(lambda: pair.stands(migration_id, "beta")[0] == "refused")
        assert pair.beta.engine.migrations.incoming_active == 0


async def test_a_source_that_falls_silent_is_cut_off_before_it_is_given_up() -> None:
    async with running_pair(receive_idle_s=5.0) as pair:
        migration_id = await scripts.postcopy(pair)
        await until(lambda: pair.hosts["alpha"].qemu(VM).status is QemuStatus.ACTIVE)
        await pair.kill("alpha")
        await asyncio.sleep(60.0)
        assert pair.stands(migration_id, "beta")[0] == "refused"
        assert pair.hosts["alpha"].qemu(VM).status is QemuStatus.FAILED
        assert pair.running_on() == "alpha"
        await pair.start("alpha")
        pair.ground.calm()
        assert (await pair.until_over(migration_id)).phase == Phase.ROLLED_BACK
        await pair.migrates_again()
