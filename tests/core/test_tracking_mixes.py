"""The seven mixes that every decision is tested on, and the further cases, each by its name.

cap: the IOMMU can track; log: the device logs its own DMA.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from migrd.core.attach_ladder import LadderAction
from migrd.core.devices import (
    Capability,
    DeviceKind,
    DeviceMigration,
    IommuKind,
    MigrationFlag,
    Unknown,
)
from migrd.core.tracking import (
    CostCode,
    DomainFlag,
    Migratability,
    Probe,
    ReasonCode,
    Tracker,
    TrackingPolicy,
)
from migrd.core.vfio_launch import GivenBy, QemuVfioFeature
from tests.core.tracking_cases import (
    ASK,
    GIB,
    MAYBE_MOVES,
    MOVES_ALONE,
    QEMU,
    STAYS,
    YES,
    both,
    by_iommu,
    by_log,
    by_none,
    codes,
    device,
    iommu,
    of_device,
    parts,
    plan,
)

LIVE, COPY = Migratability.LIVE, Migratability.STOP_AND_COPY
UNPLUG, BLOCKED = Migratability.NEEDS_UNPLUG, Migratability.BLOCKED
AUTO, ALWAYS = TrackingPolicy.AUTO, TrackingPolicy.ALWAYS
NEVER, REQUIRE = TrackingPolicy.NEVER, TrackingPolicy.REQUIRE
NEST, PASID, TRACK = DomainFlag.NEST_PARENT, DomainFlag.PASID, DomainFlag.DIRTY_TRACKING


def test_mix_1_all_cap_is_tracked_by_the_iommus_on_one_ioas() -> None:
    found = plan(by_iommu("a", iommu="x"), by_iommu("b", iommu="y"), by_iommu("c", iommu="x"))
    assert found.migratability is LIVE
    assert parts(found) == [["a", "b", "c"]]
    assert {(one.iommu, one.devices, one.dirty_tracking) for one in found.domains} == {
        ("x", ("a", "c"), True),
        ("y", ("b",), True),
    }
    assert set(found.trackers.values()) == {Tracker.IOMMU}
    assert found.reasons == ()


def test_mix_2_all_log_none_cap_is_live_without_asking_any_iommu() -> None:
    found = plan(by_log("a"), by_log("b"))
    assert found.migratability is LIVE
    assert not found.requests_tracking
    assert parts(found) == [["a", "b"]]
    assert set(found.trackers.values()) == {Tracker.DEVICE}


def test_mix_3_cap_beside_log_only_is_parted() -> None:
    found = plan(by_log("a"), by_iommu("b"))
    assert found.migratability is LIVE
    assert parts(found) == [["b"], ["a"]]
    assert found.trackers == {"b": Tracker.IOMMU, "a": Tracker.DEVICE}


def test_mix_3_in_one_object_is_refused_for_nothing_else_would_keep_it_from_corrupting() -> None:
    found = plan(by_log("a"), by_iommu("b"), max_iommufds=1)
    assert codes(found.refused) == {"no_safe_partition"}
    assert found.launch is None
    assert found.migratability is BLOCKED
    assert "1 iommufd object " in found.refused[0].message


@pytest.mark.parametrize(
    ("policy", "requested", "trackers"),
    [
        (AUTO, False, {"able": Tracker.NONE, "none": Tracker.NONE}),
        (ALWAYS, True, {"able": Tracker.IOMMU, "none": Tracker.NONE}),
        (NEVER, False, {"able": Tracker.NONE, "none": Tracker.NONE}),
    ],
)
def test_mix_4_cap_beside_neither_stops_and_copies_with_the_cost_shown(
    policy: TrackingPolicy, requested: bool, trackers: dict[str, Tracker]
) -> None:
    found = plan(by_none("none"), by_iommu("able"), policy=policy)
    assert found.migratability is COPY
    assert found.requests_tracking is requested
    assert found.trackers == trackers
    assert found.expected_blackout_s == pytest.approx(17.2, abs=0.1)
    assert of_device(found, "none") == {"iommu_no_dirty_tracking", "device_no_dma_logging"}
    assert found.launch is not None
    forced = {one.id for one in found.launch.devices if "enable-migration" in one.properties}
    assert forced == {"none"}


def test_mix_4_under_require_is_refused_with_all_reasons_at_once() -> None:
    found = plan(by_none("none"), by_none("other"), by_iommu("able"), policy=REQUIRE)
    assert found.refused[0].code is ReasonCode.POLICY_NOT_MET
    offenders = {one.device for one in found.refused if one.device is not None}
    assert offenders == {"none", "other", "able"}


def test_mix_5_cap_after_incapable_goes_first_in_its_own_object() -> None:
    found = plan(by_log("a"), both("b"))
    assert found.attach_order == ("b", "a")
    assert found.trackers["b"] is Tracker.BOTH


@pytest.mark.parametrize(
    ("policy", "flags", "verdict"),
    [
        (AUTO, {NEST}, COPY),
        (REQUIRE, {NEST}, COPY),
        (ALWAYS, {TRACK}, LIVE),
        (NEVER, {NEST}, COPY),
    ],
)
def test_mix_6_nesting_on_smmu_v3_is_kept_or_given_up_as_the_policy_says(
    policy: TrackingPolicy, flags: set[DomainFlag], verdict: Migratability
) -> None:
    smmu = {"smmu3.0": iommu("smmu3.0", IommuKind.ARM_SMMU_V3)}
    found = plan(
        by_iommu("a", iommu="smmu3.0"), policy=policy, iommus=smmu, wants=frozenset({NEST})
    )
    assert found.domains[0].flags == flags
    assert found.migratability is verdict
    (cost,) = found.costs
    assert (cost.code, cost.is_wanted) == (CostCode.SMMU_V3_NO_NESTING, True)
    assert cost.is_paid is (policy is ALWAYS)
    said = codes(found.reasons)
    if policy is ALWAYS:
        assert "tracking_excludes_wanted_feature" in said
    elif policy is not NEVER:
        assert "wanted_feature_excludes_tracking" in said


@pytest.mark.parametrize(
    ("policy", "flags", "verdict"), [(AUTO, {PASID}, COPY), (ALWAYS, {TRACK}, LIVE)]
)
def test_mix_7_pasid_on_amd_is_kept_or_given_up_as_the_policy_says(
    policy: TrackingPolicy, flags: set[DomainFlag], verdict: Migratability
) -> None:
    amd = {"ivhd0": iommu("ivhd0", IommuKind.AMD_VI)}
    found = plan(by_iommu("a", iommu="ivhd0"), policy=policy, iommus=amd, wants=frozenset({PASID}))
    assert found.domains[0].flags == flags
    assert found.migratability is verdict
    wanted = {cost.code: cost.is_wanted for cost in found.costs}
    assert wanted == {CostCode.AMD_V1_PAGE_TABLE: False, CostCode.AMD_NO_PASID: True}


def test_a_device_that_logs_keeps_what_the_vm_wants_of_its_page_tables_and_is_live() -> None:
    amd = {"ivhd0": iommu("ivhd0", IommuKind.AMD_VI)}
    found = plan(both("a", iommu="ivhd0"), iommus=amd, wants=frozenset({PASID}))
    assert found.migratability is LIVE
    assert found.domains[0].flags == {PASID}
    assert found.trackers == {"a": Tracker.DEVICE}


def test_an_iommu_of_a_kind_never_met_is_tried_with_everything_and_the_ladder_finds_out() -> None:
    found = plan(by_iommu("a", iommu="new"), wants=frozenset({NEST}))
    assert found.domains[0].flags == {NEST, TRACK}
    assert found.ladders["a"].action is LadderAction.ALLOCATE


def test_two_devices_one_without_p2p_need_one_unplugged() -> None:
    alone = by_iommu("alone", migration=MOVES_ALONE)
    assert plan(alone).migratability is LIVE
    found = plan(alone, by_iommu("other"))
    assert found.migratability is UNPLUG
    assert of_device(found, "alone") == {"device_no_p2p"}
    assert of_device(found, "other") == set()
    with_stuck = plan(alone, by_iommu("stuck", migration=STAYS))
    assert of_device(with_stuck, "alone") == set(), "one alone migrates"


def test_missing_p2p_takes_back_every_enable_migration_or_qemu_would_not_start() -> None:
    found = plan(by_none("a"), by_none("b", migration=MOVES_ALONE))
    assert found.launch is not None
    assert all("enable-migration" not in one.properties for one in found.launch.devices)


def test_device_logging_under_a_viommu_is_refused_as_a_way_to_track() -> None:
    found = plan(by_log("a"), has_viommu=True)
    assert "viommu_present" in of_device(found, "a")
    assert found.migratability_at_best is UNPLUG
    assert found.trackers == {"a": Tracker.NONE}


def test_under_a_viommu_the_log_of_a_device_is_left_alone_where_the_iommu_tracks_it() -> None:
    found = plan(both("a"), has_viommu=True)
    assert found.trackers == {"a": Tracker.IOMMU}
    assert found.launch is not None
    assert found.launch.devices[0].properties["x-device-dirty-page-tracking"] == "off"
    (limit,) = found.limits
    assert (limit.lowers_to, limit.probe) == (BLOCKED, Probe.QEMU_BLOCKED_REASONS)
    assert found.migratability_at_best is LIVE
    old = plan(both("a"), has_viommu=True, qemu=QEMU - {QemuVfioFeature.DEVICE_DIRTY_TRACKING})
    assert "viommu_present" in of_device(old, "a")


def test_an_emulated_mdev_has_no_page_table_and_only_its_own_log() -> None:
    found = plan(device("a", log=YES, mdev=True), by_iommu("b"))
    assert found.migratability is LIVE
    assert [(one.iommu, one.is_ioas) for one in found.domains] == [("iommu0", False), (None, True)]
    assert found.trackers == {"b": Tracker.IOMMU, "a": Tracker.DEVICE}
    assert found.launch is not None
    given = {one.id: (one.given_by, one.sysfs_path) for one in found.launch.devices}
    assert given["a"] == (GivenBy.SYSFSDEV, "/sys/bus/mdev/devices/uuid-a")
    assert given["b"] == (GivenBy.FD, None)
    assert plan(device("a", mdev=True)).migratability is COPY


def test_an_mdev_that_the_kernel_puts_behind_an_iommu_is_tracked_by_it() -> None:
    found = plan(device("a", YES, mdev=True))
    assert found.trackers == {"a": Tracker.IOMMU}
    assert found.launch is not None
    assert found.launch.devices[0].given_by is GivenBy.FD


def test_devices_that_qemu_emulates_are_passed_over() -> None:
    emulated = by_none("a")
    emulated = replace(emulated, device=replace(emulated.device, kind=DeviceKind.EMULATED))
    found = plan(emulated)
    assert (found.migratability, found.domains, found.reasons) == (LIVE, (), ())


def test_a_vm_without_devices_is_live_and_launched_with_nothing() -> None:
    found = plan()
    assert found.migratability is LIVE
    assert found.launch is not None
    assert found.launch.devices == ()
    assert found.reasons == ()


def test_without_iommufd_in_qemu_only_logs_count_and_the_rest_is_copied() -> None:
    old = QEMU - {QemuVfioFeature.IOMMUFD}
    live = plan(by_log("a"), both("b"), qemu=old)
    assert live.migratability is LIVE
    assert live.launch is not None
    assert {one.iommufd for one in live.launch.devices} == {None}
    assert live.launch.iommufds == ()
    copied = plan(by_log("a"), by_iommu("b"), qemu=old)
    assert copied.migratability is COPY
    assert "legacy_interface" in codes(copied.reasons)
    assert not copied.requests_tracking


def test_a_qemu_without_enable_migration_blocks() -> None:
    found = plan(by_iommu("a"), qemu=QEMU - {QemuVfioFeature.ENABLE_MIGRATION})
    assert found.migratability is BLOCKED
    assert codes(found.limits) == {"qemu_too_old"}


def test_only_properties_that_the_qemu_has_are_used() -> None:
    found = plan(by_none("a"), qemu=frozenset({QemuVfioFeature.IOMMUFD}))
    assert found.launch is not None
    (only,) = found.launch.devices
    assert only.properties == {}
    assert only.given_by is GivenBy.SYSFSDEV
    assert not found.launch.iommufds_by_fd


def test_a_group_stays_together_and_shares_what_its_page_table_can() -> None:
    one = by_iommu("a", iommu_group=7)
    other = device("b", Capability.probed(False), YES, iommu_group=7)
    found = plan(one, other, by_iommu("c"))
    assert parts(found) == [["c"], ["a", "b"]]
    assert found.trackers["a"] is Tracker.NONE


def test_a_group_is_not_parted_to_save_an_object() -> None:
    found = plan(by_log("a", iommu_group=7), by_none("b", iommu_group=7), both("c"))
    assert parts(found) == [["c"], ["a", "b"]]


@pytest.mark.parametrize(
    ("facts", "probe"),
    [
        ({"cap": ASK}, Probe.GET_HW_INFO),
        ({"log": ASK}, Probe.DMA_LOGGING_FEATURE),
        ({"cap": YES, "migration": MAYBE_MOVES}, Probe.MIGRATION_FEATURE),
    ],
)
def test_an_unknown_is_neither_no_nor_yes_and_names_its_probe(
    facts: dict[str, Capability], probe: Probe
) -> None:
    found = plan(device("a", **facts))  # type: ignore[arg-type]  # one keyword of each type
    assert found.migratability is not LIVE
    assert found.migratability_at_best is LIVE
    assert probe in {one.probe for one in found.limits}


def test_an_unknown_of_a_kernel_too_old_says_so() -> None:
    told = Capability.unknown(Unknown.KERNEL_TOO_OLD, "ENOTTY")
    found = plan(device("a", YES, migration=DeviceMigration(told)))
    (limit,) = found.limits
    assert limit.code is ReasonCode.KERNEL_TOO_OLD
    assert "newer" in limit.cure


def test_an_unknown_of_a_device_is_looked_up_at_its_iommu_instance() -> None:
    known = {"x": iommu("x", dirty_tracking=Capability.estimated(True, "ecap bit 45"))}
    found = plan(device("a", ASK, iommu="x"), iommus=known)
    assert found.migratability is LIVE
    (note,) = found.reasons
    assert (note.code, note.probe) == (ReasonCode.ESTIMATED, Probe.GET_HW_INFO)


def test_an_estimate_that_the_kernel_contradicts_is_reported_and_the_kernel_counts() -> None:
    known = {"x": iommu("x", dirty_tracking=Capability.estimated(True, "ecap"))}
    found = plan(by_none("a", iommu="x"), iommus=known)
    assert found.migratability is COPY
    assert "estimate_wrong" in codes(found.reasons)


def test_a_device_whose_ladder_ended_without_tracking_is_marked() -> None:
    found = plan(by_iommu("a"), by_iommu("b"), downgraded=frozenset({"a"}))
    assert of_device(found, "a") == {"downgraded", "device_no_dma_logging"}
    assert found.migratability is COPY
    assert parts(found) == [["b"], ["a"]]


def test_a_forbidden_policy_is_refused_with_those_that_are_allowed() -> None:
    found = plan(by_iommu("a"), policy=NEVER, forbidden=frozenset({NEVER, ALWAYS}))
    (reason,) = found.refused
    assert reason.code is ReasonCode.POLICY_FORBIDDEN
    assert reason.cure == "choose one of: auto, require"


def test_bits_that_nobody_knows_are_shown_and_change_nothing() -> None:
    new = DeviceMigration(YES, frozenset(MigrationFlag), unknown_flags=64, stop_copy_bytes=0)
    known = {"iommu0": iommu("iommu0", unknown_capability_bits=1 << 40)}
    found = plan(by_iommu("a", migration=new), iommus=known)
    assert found.migratability is LIVE
    (note,) = found.reasons
    assert note.code is ReasonCode.UNKNOWN_BITS
    assert "0x10000000000" in note.message
    assert "0x40" in note.message


def test_unfixed_guest_addresses_are_noted_where_the_order_could_matter() -> None:
    free = by_iommu("a", guest_address=None)
    assert plan(free).reasons == ()
    assert "guest_address_not_fixed" in codes(plan(free, by_iommu("b")).reasons)


def test_memory_above_qemus_limit_cannot_be_taken_for_dirty() -> None:
    found = plan(by_none("a"), memory_bytes=9 << 40)
    assert found.migratability is UNPLUG
    assert "memory_above_limit" in codes(found.reasons)
    assert plan(by_none("a"), memory_bytes=8192 * GIB).migratability is COPY


def test_qemus_own_requests_are_said_where_the_policy_has_none() -> None:
    assert "qemu_always_requests" in codes(plan(by_iommu("a"), policy=NEVER).reasons)
    assert "qemu_always_requests" not in codes(plan(by_iommu("a")).reasons)
