"""Two plans of one VM: may it go, and can it come back?"""

from __future__ import annotations

from migrd.core.tracking import Migratability, Plan, VmDevice
from migrd.core.two_hosts import judge_destination
from tests.core.tracking_cases import (
    ASK,
    GIB,
    MAYBE_MOVES,
    STAYS,
    YES,
    by_iommu,
    by_log,
    by_none,
    codes,
    device,
    plan,
)


def test_alike_hosts_have_nothing_to_say() -> None:
    judged = judge_destination(plan(by_iommu("a")), plan(by_log("a")), 0.3)
    assert judged.passed
    assert judged.warnings == ()


def test_an_incapable_destination_needs_someone_to_agree() -> None:
    here, there = plan(by_iommu("a")), plan(by_none("a"), memory_bytes=8 * GIB)
    judged = judge_destination(here, there, 0.3)
    (reason,) = judged.refusals
    assert reason.code.value == "less_migratable_there"
    assert "to come back the guest would stand still for 8.6 s" in reason.message
    assert reason.lowers_to is Migratability.STOP_AND_COPY
    agreed = judge_destination(here, there, 0.3, accept_lower=True)
    assert agreed.passed
    assert agreed.warnings == judged.refusals


def qemu_blocks(one: VmDevice) -> Plan:
    return plan(one, memory_bytes=9 << 40)


def test_you_may_go_there_but_you_cannot_come_back() -> None:
    judged = judge_destination(plan(by_iommu("a")), qemu_blocks(by_none("a")), 0.3)
    (reason,) = judged.refusals
    assert reason.code.value == "no_way_back"
    assert "you may go there, but you can't come back" in reason.message
    assert "cannot track dirty pages" in reason.message


def test_what_is_not_known_there_is_not_called_impossible() -> None:
    there = plan(device("a", ASK, migration=MAYBE_MOVES))
    judged = judge_destination(plan(by_iommu("a")), there, 0.3)
    (reason,) = judged.refusals
    assert "it is not known whether you can come back" in reason.message


def test_a_device_that_cannot_load_its_state_is_refused_whoever_agrees() -> None:
    there = plan(by_iommu("a", migration=STAYS))
    judged = judge_destination(plan(by_iommu("a")), there, 0.3, accept_lower=True)
    assert codes(judged.refusals) == {"destination_cannot_load"}
    assert judged.refusals[0].device == "a"


def test_a_vm_that_cannot_leave_is_refused_with_its_own_reasons() -> None:
    stuck = plan(by_iommu("a", migration=STAYS))
    judged = judge_destination(stuck, plan(by_iommu("a")), 0.3)
    assert codes(judged.refusals) == {"source_not_migratable", "device_no_migration"}


def test_what_the_destination_refuses_is_refused() -> None:
    there = plan(by_iommu("a", driver=None, vfio_cdev=None))
    assert codes(judge_destination(plan(by_iommu("a")), there, 0.3).refusals) == {
        "driver_not_bound"
    }


def test_a_limit_below_the_floor_or_the_blackout_is_refused_with_the_figure() -> None:
    live = plan(by_iommu("a"))
    assert codes(judge_destination(live, live, 0.01).refusals) == {"downtime_below_floor"}
    copied = plan(by_none("a"), memory_bytes=GIB, switchover_bytes_per_s=GIB)
    assert codes(judge_destination(copied, copied, 0.3).refusals) == {"blackout_above_limit"}
    assert judge_destination(copied, copied, 2.0).passed
    assert judge_destination(copied, copied, None).passed


def test_other_devices_there_are_refused() -> None:
    judged = judge_destination(plan(by_iommu("a")), plan(by_iommu("b")), 0.3)
    assert codes(judged.refusals) == {"devices_differ"}
    assert "a, b" in judged.refusals[0].message


def test_another_attach_order_there_is_refused_only_where_it_shows_in_the_guest() -> None:
    here = plan(by_iommu("a"), by_log("b"))
    there = plan(by_log("a"), by_iommu("b"))
    assert here.attach_order != there.attach_order
    assert judge_destination(here, there, 0.3).passed
    free = plan(by_log("a", guest_address=None), by_iommu("b"))
    assert codes(judge_destination(here, free, 0.3).refusals) == {"guest_addresses_differ"}


def test_a_better_destination_is_welcome() -> None:
    here = plan(by_none("a"), memory_bytes=GIB, switchover_bytes_per_s=GIB)
    assert judge_destination(here, plan(device("a", YES, YES)), 2.0).passed
