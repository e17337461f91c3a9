"""The ten points of the thread that the project started from (May 2022), each as a test of the
decision. The lab shows them on the real kernel, under the same names (tests/lab/guest/e2e).

A live migration may never happen in a VM's life: how does user space know, when it creates an I/O
page table, that it should ask for dirty tracking?
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from errno import EINVAL, EOPNOTSUPP
from pathlib import Path

from migrd.core.attach_ladder import LadderAction, step
from migrd.core.devices import (
    Capability,
    DeviceMigration,
    Inventory,
    KernelFacts,
    MigrationFlag,
    Unknown,
)
from migrd.core.hot_plug import compare, judge_plug, reconsider
from migrd.core.tracking import (
    DomainFlag,
    Migratability,
    Probe,
    Tracker,
    TrackingPolicy,
)
from tests.core.tracking_cases import (
    ASK,
    NO,
    YES,
    asked,
    by_iommu,
    by_none,
    codes,
    device,
    iommu,
    plan,
)

LIVE, COPY = Migratability.LIVE, Migratability.STOP_AND_COPY
ALWAYS, REQUIRE = TrackingPolicy.ALWAYS, TrackingPolicy.REQUIRE


def test_t1_look_at_the_devices_at_start_and_request_it_if_they_all_support_it() -> None:
    """ "look at the devices being plugged in at VM startup; if they all support it then request
    dirty tracking, otherwise don't" """
    assert plan(by_iommu("a"), by_iommu("b")).requests_tracking
    assert not plan(by_iommu("a"), by_none("b")).requests_tracking
    logs = device("b", NO, YES, iommu="iommu9")
    mixed = plan(by_iommu("a"), logs)
    assert {one.devices: one.dirty_tracking for one in mixed.domains} == {
        ("a",): True,
        ("b",): False,
    }


def test_t2_just_always_turn_it_on() -> None:
    """ "it costs nothing as long as all IOMMUs support it; just always turn it on" """
    found = plan(by_iommu("a"), by_none("b"), policy=ALWAYS)
    assert {one.devices: one.dirty_tracking for one in found.domains} == {
        ("a",): True,
        ("b",): False,
    }
    assert found.migratability is COPY, "and the VM is marked for the one that cannot"
    assert found.costs == (), "nothing, on IOMMUs that lose nothing by it"


def host(*answers: Capability) -> Inventory:
    instances = {
        f"iommu{n}": iommu(f"iommu{n}", dirty_tracking=one) for n, one in enumerate(answers)
    }
    return Inventory(KernelFacts("6.12", YES, YES), instances, {})


def test_t3_a_way_to_report_that_all_iommus_in_the_system_support_it() -> None:
    assert host(YES, YES).all_iommus_track_dirty is True
    assert host(YES, NO, ASK).all_iommus_track_dirty is False
    assert host(YES, ASK).all_iommus_track_dirty is None
    assert host().all_iommus_track_dirty is None


def test_t4_the_feature_is_asked_of_every_device_and_compared_with_the_estimate() -> None:
    known = {"x": iommu("x", dirty_tracking=Capability.estimated(True, "ecap 0x2000"))}
    before = plan(device("a", ASK, iommu="x"), iommus=known)
    assert before.probes[0].probe is Probe.GET_HW_INFO
    agreed = plan(by_iommu("a", iommu="x"), iommus=known)
    assert agreed.reasons == ()
    wrong = plan(by_none("a", iommu="x"), iommus=known)
    assert "estimate_wrong" in codes(wrong.reasons)
    assert compare(before, wrong).is_lower


def test_t5_nothing_depends_on_the_device_it_is_the_iommu_instance_below_it() -> None:
    known = {"x": iommu("x", dirty_tracking=YES)}
    found = plan(device("a", ASK, iommu="x"), device("b", ASK, iommu="x"), iommus=known)
    assert found.migratability is LIVE
    assert [one.devices for one in found.domains] == [("a", "b")]


def test_t6_a_host_with_iommu_instances_of_different_features() -> None:
    mixed = plan(
        by_iommu("a", iommu="able"), by_none("b", iommu="unable"), by_iommu("c", iommu="able2")
    )
    assert {one.iommu: one.devices for one in mixed.domains} == {
        "able": ("a",),
        "able2": ("c",),
        "unable": ("b",),
    }
    assert mixed.attach_order[-1] == "b", "capable ones first: no plain page table captures them"
    assert mixed.iommufds[0].devices == ("a", "c"), "and apart from what nothing watches"
    assert mixed.migratability is COPY


def test_t7_bail_out_preemptively_listing_every_offending_device() -> None:
    """ "bail out preemptively if any device's IOMMU doesn't support it" """
    found = plan(by_iommu("a"), by_none("b"), by_none("c"), policy=REQUIRE)
    assert found.launch is None
    blamed = {one.device for one in found.refused if one.code.value == "iommu_no_dirty_tracking"}
    assert blamed == {"b", "c"}
    assert plan(by_iommu("a"), policy=REQUIRE).refused == ()


def test_t8_a_device_attached_later_must_support_tracking_too() -> None:
    """ "domains must not change behaviour once created" """
    (there,) = [replace(by_iommu("a"), attached=True)]
    standing = plan(by_iommu("a"))
    assert judge_plug(standing, asked(there, by_iommu("b"))).allowed
    judged = judge_plug(standing, asked(there, by_none("b")))
    assert not judged.allowed
    assert {one.device for one in judged.reasons} >= {"b"}
    assert reconsider(standing, asked(there)).iommufds == standing.iommufds


def test_t9_a_failed_attach_is_known_by_its_errno_and_retried_without_never_silently() -> None:
    """ "how does it know a failed attach is due to missing dirty tracking … and retry" """
    found = plan(by_iommu("a"), by_iommu("b"))
    first, second = found.ladders["a"], found.ladders["b"]
    refused_flag = step(first, EOPNOTSUPP)
    assert DomainFlag.DIRTY_TRACKING not in refused_flag.rung.flags
    refused_domain = step(second, EINVAL)
    assert refused_domain.rung.own_domain
    for lower in (refused_flag, refused_domain):
        end = step(step(lower, None), None)
        assert (end.action, end.is_downgraded) == (LadderAction.DONE, True)
        assert end.errno in (EOPNOTSUPP, EINVAL)
    marked = plan(by_iommu("a"), by_iommu("b"), downgraded=frozenset({"b"}))
    assert compare(found, marked).is_lower
    assert "downgraded" in codes(one for one in marked.limits if one.device == "b")
    assert marked.trackers["b"] is Tracker.NONE


def test_t10_other_capabilities_may_follow() -> None:
    known = {"x": iommu("x", dirty_tracking=YES, unknown_capability_bits=0xF0)}
    moves = DeviceMigration(YES, frozenset(MigrationFlag), unknown_flags=0x30, stop_copy_bytes=0)
    found = plan(by_iommu("a", iommu="x", migration=moves), iommus=known)
    assert found.migratability is LIVE
    assert codes(found.reasons) == {"unknown_bits"}
    old = plan(device("a", Capability.unknown(Unknown.KERNEL_TOO_OLD), iommu="y"))
    assert "kernel_too_old" in codes(old.limits)


def rows_named_in(files: Iterable[Path]) -> set[int]:
    """Of test_t1_..., test_t1_t6_...: the numbers."""
    names = re.findall(r"def test_((?:t\d+_)+)", "".join(file.read_text() for file in files))
    return {int(row) for name in names for row in re.findall(r"\d+", name)}


def test_every_row_has_a_test_of_its_name_here_and_on_the_real_kernel() -> None:
    rows = set(range(1, 11))
    assert rows_named_in([Path(__file__)]) == rows
    guest = Path(__file__).parents[1] / "lab" / "guest"
    assert rows_named_in(guest.glob("*/test_*.py")) == rows
