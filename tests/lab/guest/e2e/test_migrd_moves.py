"""migrd decides, launches, samples and migrates a VM with a device, on the real kernel."""

from __future__ import annotations

import re

from tests.lab.guest.e2e_fleet import Lab, QemuFds, given

TRACKS = 2
"""In `flags` of an allocation: IOMMU_HWPT_ALLOC_DIRTY_TRACKING."""


def page_tables(two: Lab, pid: int) -> dict[int, bool]:
    """Those that a QEMU has allocated: do they track?"""
    found = {}
    for line in two.trace(pid, "iommufd_backend_alloc_hwpt"):
        flags, hwpt = re.search(r"flags=0x(\w+)", line), re.search(r"out_hwpt=(\d+)", line)
        assert flags is not None
        assert hwpt is not None
        found[int(hwpt.group(1))] = bool(int(flags.group(1), 16) & TRACKS)
    return found


async def test_t1_t4_a_device_that_is_found_to_be_trackable_gets_a_tracking_page_table_and_moves(
    two: Lab,
) -> None:
    async with given(two, True, True) as (here, there):
        defined = await two.define({"nic": here})
        assert defined["decision"]["migratability_at_best"] == "live"
        started = await two.start()
        decision = started["decision"]
        assert decision["migratability"] == "live", decision["reasons"]
        assert decision["trackers"] == {"nic": "iommu"}
        assert decision["probed"]
        assert decision["evidence"][0]["iommu_dirty_tracking"]["evidence"] == "probed"
        pid = started["pid"]
        (hwpt,) = page_tables(two, pid)
        assert page_tables(two, pid) == {hwpt: True}
        assert (two.holds("alpha"), two.holds("alpha", here.node)) == (1, 0)
        seen = await two.vm_until("alpha", lambda vm: bool(vm["dma_rates"]))
        assert [(rate["hwpt_id"], rate["quality"]) for rate in seen["dma_rates"]] == [
            (hwpt, "unproven")
        ]
        with QemuFds(pid) as fds:
            fds.set_register(here, 0xA5)
        ended = await two.ended(await two.migrate({"nic": there}))
        assert ended["phase"] == "succeeded", ended["cause"]
        arrived = await two.runs_only_on("beta", switches=1)
        assert arrived["decision"]["migratability"] == "live"
        with QemuFds(arrived["pid"]) as fds:
            assert fds.register(there) == 0xA5, "the state of the device has moved"
        await two.free(here)
        two.only_peeked("alpha")
