"""migrd decides, launches, samples and migrates a VM with a device, on the real kernel."""

from __future__ import annotations

from typing import Any

from tests.lab.guest.e2e_devices import DMA_BYTES, Dma, QemuFds
from tests.lab.guest.e2e_fleet import FAST, SLOW, Lab, given

SENT_AGAIN_BYTES = DMA_BYTES * 5 // 4
"""More than all that can be sent once: the rest of the memory is zeros."""
TOO_MUCH_BYTES = 100_000
"""Is left after each round: what fits into SLOW's limit."""


def is_measured(vm: dict[str, Any]) -> bool:
    return any(
        rate["quality"] == "measured" and rate["dirty_bytes_per_s"] for rate in vm["dma_rates"]
    )


def has_begun(migration: dict[str, Any]) -> bool:
    return bool(migration["is_terminal"] or migration["progress"]["transferred_bytes"])


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
        assert two.page_tables(pid) == [True]
        assert (two.holds("alpha"), two.holds("alpha", here.node)) == (1, 0)
        seen = await two.vm_until("alpha", lambda vm: bool(vm["dma_rates"]))
        assert [rate["quality"] for rate in seen["dma_rates"]] == ["unproven"], "QEMU tracks later"
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


async def test_what_a_device_writes_is_measured_and_holds_up_convergence_until_it_stops(
    two: Lab,
) -> None:
    async with given(two, True, True) as (here, there):
        await two.define({"nic": here})
        pid = (await two.start())["pid"]
        (sampled,) = (await two.vm_until("alpha", lambda vm: bool(vm["dma_rates"])))["dma_rates"]
        with QemuFds(pid) as fds:
            async with Dma(fds.iommufd(), sampled["hwpt_id"]):
                migration = await two.migrate({"nic": there}, policy=SLOW)
                await two.precopies(migration)
                assert two.switched_on(pid), "QEMU has switched tracking on by itself"
                measured = await two.vm_until("alpha", is_measured)
                assert measured["dma_rates"][0]["devices"] == ["nic"]
                seen = await two.precopies(migration, rounds=3, transferred_bytes=SENT_AGAIN_BYTES)
                assert seen["phase"] == "precopy"
        rounds = (await two.ask("alpha", "migrations", migration, "rounds"))["items"]
        assert all(it["remaining_bytes"] > TOO_MUCH_BYTES for it in rounds), rounds
        await two.policy(migration, FAST)
        ended = await two.ended(migration)
        assert ended["phase"] == "succeeded", ended["cause"]
        await two.runs_only_on("beta", switches=1)
        two.only_peeked("alpha")


async def test_a_vm_with_a_device_that_nothing_watches_stands_still_while_it_is_copied(
    two: Lab,
) -> None:
    async with given(two, False, False) as (here, there):
        await two.define({"nic": here})
        started = await two.start()
        assert started["decision"]["migratability"] == "stop_and_copy"
        slowly = {**SLOW, "downtime_limit_ms": 200_000}
        migration = await two.migrate({"nic": there}, policy=slowly)
        await two.until(migration, has_begun)
        counted = two.beats("alpha")
        ended = await two.ended(migration)
        assert ended["phase"] == "succeeded", ended["cause"]
        assert two.beats("alpha") == counted
        copied = next(it for it in ended["timeline"] if it["phase"] == "precopy")
        assert ended["blackout_ms"] >= copied["duration_ms"]
        await two.runs_only_on("beta", switches=1)
