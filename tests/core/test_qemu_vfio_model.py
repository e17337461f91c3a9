"""QEMU's holes open without the plan, in the model, and closed with it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from migrd.core.hot_plug import reconsider
from migrd.core.tracking import Migratability, TrackingPolicy
from tests.core.qemu_vfio_model import Given, Outcome, QemuModel, Seen, StartFails, started
from tests.core.tracking_cases import (
    GIB,
    asked,
    both,
    by_iommu,
    by_log,
    by_none,
    launched,
    plan,
    truth_of,
)

ABLE = Given("able", cap=True)
UNABLE = Given("unable", instance="iommu9")
LOGS = Given("logs", log=True, instance="iommu9")
FORCED = replace(UNABLE, id="forced", enable_migration="on")


def test_h1_an_able_device_after_an_unable_one_is_put_on_its_plain_page_table() -> None:
    assert started([UNABLE, ABLE]).migrate()["able"] is Seen.ALL_DIRTY
    assert len(started([UNABLE, ABLE]).blockers()) == 2
    assert len(started([ABLE, UNABLE]).blockers()) == 1


def test_h1_does_not_happen_where_the_other_instance_refuses_the_page_table() -> None:
    qemu = QemuModel(plain_fits_elsewhere=False)
    qemu.attach(UNABLE)
    qemu.attach(ABLE)
    assert len(qemu.blockers()) == 1


def test_h1_is_closed_by_the_plans_order_whatever_the_requests_was() -> None:
    unable, able = by_log("a"), by_iommu("b")
    for devices in ((unable, able), (able, unable)):
        found = plan(*devices)
        truth = {one.id: truth_of(one) for one in devices}
        assert started(launched(found, truth)).migrate() == {"a": Seen.LOG, "b": Seen.PAGE_TABLE}


def test_h2_the_log_of_a_device_beside_an_able_one_is_never_started() -> None:
    qemu = started([ABLE, LOGS])
    assert qemu.blockers() == []
    assert qemu.migrate()["logs"] is Seen.UNSEEN
    assert qemu.outcome() is Outcome.CORRUPTS


def test_h2_is_closed_by_an_object_of_its_own() -> None:
    devices = by_iommu("able"), by_log("logs")
    found = plan(*devices)
    assert [one.devices for one in found.iommufds] == [("able",), ("logs",)]
    truth = {one.id: truth_of(one) for one in devices}
    assert started(launched(found, truth)).outcome() is Outcome.LIVE
    assert found.migratability is Migratability.LIVE


def test_h3_a_device_forced_to_migrate_beside_an_able_one_is_not_watched() -> None:
    assert started([ABLE, FORCED]).outcome() is Outcome.CORRUPTS
    assert started([FORCED]).outcome() is Outcome.ALL_DIRTY


@pytest.mark.parametrize("policy", [TrackingPolicy.AUTO, TrackingPolicy.ALWAYS])
def test_h3_is_closed_by_never_forcing_in_mixed_company(policy: TrackingPolicy) -> None:
    devices = by_iommu("able"), by_none("none")
    found = plan(*devices, policy=policy)
    assert [one.devices for one in found.iommufds] == [("able",), ("none",)]
    truth = {one.id: truth_of(one) for one in devices}
    assert started(launched(found, truth)).outcome() is Outcome.ALL_DIRTY
    alone = plan(*devices, policy=policy, max_iommufds=1)
    assert alone.launch is not None
    assert all("enable-migration" not in one.properties for one in alone.launch.devices)
    assert started(launched(alone, truth)).outcome() is Outcome.BLOCKED
    assert alone.migratability is Migratability.NEEDS_UNPLUG


def test_h4_after_the_able_one_is_gone_the_forced_one_is_still_not_watched() -> None:
    qemu = started([ABLE, FORCED])
    qemu.unplug("able")
    assert qemu.outcome() is Outcome.CORRUPTS


def test_h4_is_closed_because_a_forced_one_never_was_in_that_container() -> None:
    able, none = by_iommu("able"), by_none("none")
    found = plan(able, none)
    qemu = started(launched(found, {one.id: truth_of(one) for one in (able, none)}))
    qemu.unplug("able")
    assert qemu.outcome() is Outcome.ALL_DIRTY
    after = reconsider(found, asked(replace(none, attached=True)))
    assert after.migratability is Migratability.STOP_AND_COPY


def test_h4_a_container_that_an_able_device_was_in_is_never_used_for_one_to_be_copied() -> None:
    able, logs = both("able"), by_log("logs")
    first = plan(able, logs)
    assert len(first.iommufds) == 1
    after = reconsider(first, asked(replace(logs, attached=True)))
    assert after.iommufds[0].saw_iommu_tracking
    plugged = reconsider(after, asked(replace(logs, attached=True), by_none("new")))
    assert [one.devices for one in plugged.iommufds] == [("logs",), ("new",)]
    assert plugged.launched["new"].may_copy_all


def test_h5_flags_that_the_kernel_refuses_fail_the_start() -> None:
    with pytest.raises(StartFails, match="EOPNOTSUPP"):
        started([replace(ABLE, refuses_flags=True)])


def test_a_device_log_under_a_viommu_blocks() -> None:
    assert started([LOGS], has_viommu=True).outcome() is Outcome.BLOCKED
    assert started([ABLE], has_viommu=True).outcome() is Outcome.LIVE


def test_two_devices_one_without_p2p_block_and_forced_ones_do_not_start() -> None:
    other = replace(ABLE, id="other", p2p=False)
    assert started([ABLE, other]).outcome() is Outcome.BLOCKED
    with pytest.raises(StartFails, match="P2P"):
        started([ABLE, replace(other, enable_migration="on")])


def test_the_legacy_interface_takes_all_for_dirty_unless_all_log() -> None:
    forced, logs = replace(FORCED, container=None), replace(LOGS, container=None)
    assert started([logs]).outcome() is Outcome.LIVE
    assert started([logs, forced]).outcome() is Outcome.ALL_DIRTY
    assert started([replace(ABLE, container=None)]).outcome() is Outcome.BLOCKED


def test_more_than_8_tib_cannot_be_taken_for_dirty() -> None:
    found = plan(by_none("none"), memory_bytes=8193 * GIB)
    assert found.migratability is Migratability.NEEDS_UNPLUG
    assert not found.launched["none"].may_copy_all
