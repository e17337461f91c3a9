"""A postcopy that is long over is over after a restart, too."""

from __future__ import annotations

from migrd.core.phases import Phase
from tests.fakes.world import VM, running_pair
from tests.sweep import scripts


async def test_a_postcopy_whose_guest_has_gone_on_to_another_host_is_not_taken_up_again() -> None:
    async with running_pair(incoming_slots=1) as pair:
        first = await scripts.postcopy(pair)
        assert (await pair.until_over(first)).phase == Phase.SUCCEEDED
        await pair.settle()
        pair.ground.calm()
        assert (await pair.migrate(source="beta")).phase == Phase.SUCCEEDED
        await pair.settle()
        await pair.restart("beta")
        assert pair.beta.engine.migrations.active_of(VM) is None
        assert pair.beta.engine.migrations.incoming_active == 0
        assert not pair.view(first, on="beta").conditions
        await pair.migrates_again()


async def test_a_postcopy_whose_guest_died_and_was_started_anew_is_not_taken_up_again() -> None:
    async with running_pair(incoming_slots=1) as pair:
        first = await scripts.postcopy(pair)
        assert (await pair.until_over(first)).phase == Phase.SUCCEEDED
        await pair.settle()
        pair.ground.calm()
        pair.guest().may_end = True
        pair.hosts["beta"].qemu(VM).die("abort")
        await pair.beta.service.start_vm(VM)
        await pair.restart("beta")
        assert pair.beta.engine.migrations.incoming_active == 0
        assert pair.running_on() == "beta"
