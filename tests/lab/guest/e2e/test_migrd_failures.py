"""Moves of a VM with a device that do not come to their end: who runs, and what is left."""

from __future__ import annotations

import contextlib
import os
import signal

from migrd.cli.client import Problem, path
from tests.lab.guest.e2e_devices import opened
from tests.lab.guest.e2e_fleet import FAST, HELD, Lab, given


async def test_a_move_that_is_cancelled_or_loses_its_destination_leaves_the_guest_which_moves_then(
    two: Lab,
) -> None:
    async with given(two, True, True, True) as (here, there, elsewhere):
        await two.define({"nic": here})
        await two.start()
        cancelled = await two.migrate({"nic": there}, policy=HELD)
        await two.precopies(cancelled)
        await two.call("alpha", "POST", path("migrations", cancelled, verb="cancel"))
        ended = await two.ended(cancelled)
        assert (ended["phase"], ended["guest_runs_on"]) == ("cancelled", "source")
        await two.runs_only_on("alpha")
        await two.free(there, host="beta")

        orphaned = await two.migrate({"nic": elsewhere}, policy=HELD)
        await two.precopies(orphaned)
        (pid,) = await two.qemus("beta")
        os.kill(pid, signal.SIGKILL)
        ended = await two.ended(orphaned)
        assert (ended["phase"], ended["guest_runs_on"]) == ("rolled_back", "source")
        await two.runs_only_on("alpha")
        await two.free(elsewhere, host="beta")

        with opened(there) as device:  # mtty keeps the state that it was left in
            device.reset()
        ended = await two.ended(await two.migrate({"nic": there}))
        assert ended["phase"] == "succeeded", ended["cause"]
        await two.runs_only_on("beta", switches=1)
        await two.free(here)


async def test_when_the_sources_qemu_is_killed_the_guest_is_lost_and_can_be_started_anew(
    two: Lab,
) -> None:
    async with given(two, True, True) as (here, there):
        await two.define({"nic": here})
        pid = (await two.start())["pid"]
        migration = await two.migrate({"nic": there}, policy=HELD)
        await two.precopies(migration)
        os.kill(pid, signal.SIGKILL)
        ended = await two.ended(migration)
        assert ended["phase"] == "guest_lost", ended["cause"]
        assert str(pid) in ended["cause"]["message"], "it says which process died"
        await two.free(here)
        await two.free(there, host="beta")
        assert await two.qemus() == []
        with opened(here) as device:  # mtty keeps the state that it was left in
            device.reset()
        await two.start()


async def test_a_daemon_that_is_killed_in_a_move_goes_on_with_the_device_when_it_is_back(
    two: Lab,
) -> None:
    async with given(two, True, True) as (here, there):
        await two.define({"nic": here})
        await two.start()
        migration = await two.migrate({"nic": there}, policy=HELD)
        await two.precopies(migration)
        two.end_daemon("alpha", signal.SIGKILL)
        two.begin_daemon("alpha")
        await two.ready("alpha")
        vm = await two.vm_until("alpha", lambda vm: bool(vm["facts"] and vm["facts"]["devices"]))
        assert vm["decision"]["trackers"] == {"nic": "iommu"}
        assert vm["facts"]["devices"][0]["address"] == here.sysfs.name
        with contextlib.suppress(Problem):  # it has come to the switchover by now
            await two.policy(migration, FAST)
        ended = await two.ended(migration)
        assert ended["phase"] == "succeeded", ended["cause"]
        await two.runs_only_on("beta", switches=1)
        await two.free(here)
