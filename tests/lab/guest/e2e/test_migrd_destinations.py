"""Destinations worse than the source: incapable devices, and devices left in some state."""

from __future__ import annotations

from migrd.core.device_state import DeviceState
from tests.lab.guest.e2e_devices import opened
from tests.lab.guest.e2e_fleet import Lab, given

NO_EQUAL = {"less_migratable_there", "no_way_back"}


async def test_a_destination_where_it_would_be_less_migratable_is_refused_unless_accepted(
    two: Lab,
) -> None:
    async with given(two, True, False) as (here, there):
        await two.define({"nic": here})
        await two.start()
        ended = await two.ended(await two.migrate({"nic": there}))
        assert ended["phase"] == "refused"
        (refusal,) = ended["refusals"]
        assert refusal["code"] in NO_EQUAL
        assert "you may go there, but" in refusal["message"]
        assert "cannot track dirty pages" in refusal["message"]
        assert await two.qemus("beta") == []
        plan = await two.what_if({"nic": there}, accept_less_migratable=True)
        assert plan["possible"], plan["refusals"]
        assert [warning["code"] in NO_EQUAL for warning in plan["warnings"]] == [True]
        await two.runs_only_on("alpha")


async def test_a_device_left_in_some_state_there_fails_the_move_and_after_a_reset_it_works(
    two: Lab,
) -> None:
    async with given(two, True, True) as (here, there):
        await two.define({"nic": here})
        await two.start()
        with opened(there) as device:
            device.set_state(DeviceState.RESUMING)
        ended = await two.ended(await two.migrate({"nic": there}))
        assert ended["phase"] == "rolled_back"
        assert (ended["guest_runs_on"], ended["cause"] is None) == ("source", False)
        await two.runs_only_on("alpha")
        await two.free(there, host="beta")
        with opened(there) as device:
            device.reset()
        ended = await two.ended(await two.migrate({"nic": there}))
        assert ended["phase"] == "succeeded", ended["cause"]
        await two.runs_only_on("beta", switches=1)
