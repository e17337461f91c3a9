"""Changes to a VM that runs, judged before anything is touched, and lived through by a QEMU."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import example, given, settings
from hypothesis import strategies as st

from migrd.core.devices import Capability
from migrd.core.hot_plug import compare, judge_plug, reconsider
from migrd.core.tracking import (
    Migratability,
    Plan,
    StandingDevice,
    TrackingPolicy,
    TrackingRequest,
    VmDevice,
)
from tests.core.qemu_vfio_model import Given, Outcome, QemuModel
from tests.core.tracking_cases import (
    ASK,
    MEANS,
    MOVES_ALONE,
    NO,
    STAYS,
    YES,
    Truth,
    as_told,
    asked,
    both,
    by_iommu,
    by_log,
    by_none,
    codes,
    device,
    launched,
    plan,
    truth_of,
    truths,
)

LIVE, COPY = Migratability.LIVE, Migratability.STOP_AND_COPY
UNPLUG = Migratability.NEEDS_UNPLUG


def held(*devices: VmDevice) -> list[VmDevice]:
    return [replace(one, attached=True) for one in devices]


def test_an_able_device_may_be_added_and_what_is_there_stays_where_it_is() -> None:
    old, new = by_iommu("old"), by_iommu("a", iommu="other")
    standing = plan(old)
    judged = judge_plug(standing, asked(*held(old), new))
    assert judged.allowed
    assert judged.reasons == ()
    assert judged.plan.iommufds[0].devices == ("old", "a")
    assert not judged.change.is_any


def test_a_device_that_lowers_the_vm_is_refused_with_reasons_unless_that_is_accepted() -> None:
    old, new = by_iommu("old"), by_none("new")
    standing = plan(old)
    judged = judge_plug(standing, asked(*held(old), new))
    assert not judged.allowed
    assert judged.change.is_lower
    assert {"iommu_no_dirty_tracking", "device_no_dma_logging"} <= codes(judged.reasons)
    assert {one.device for one in judged.reasons} >= {"new"}
    accepted = judge_plug(standing, asked(*held(old), new), accept_lower=True)
    assert accepted.allowed
    assert accepted.reasons == judged.reasons
    assert accepted.plan.migratability is COPY
    assert [one.devices for one in accepted.plan.iommufds] == [("old",), ("new",)]


def test_a_second_device_awakens_the_p2p_rule_for_the_first() -> None:
    old = by_iommu("old", migration=MOVES_ALONE)
    judged = judge_plug(plan(old), asked(*held(old), by_iommu("new")))
    assert not judged.allowed
    assert codes(judged.reasons) == {"device_no_p2p"}
    assert [one.device for one in judged.reasons] == ["old"]


def test_a_device_is_not_blamed_for_what_was_lost_before_it_came() -> None:
    old = by_iommu("old")
    worse = replace(by_none("old"), attached=True)
    judged = judge_plug(plan(old), asked(worse, by_iommu("new")))
    assert judged.plan.migratability.rank > LIVE.rank
    assert judged.allowed


def test_a_device_that_cannot_be_opened_is_refused_even_if_lowering_is_accepted() -> None:
    old, new = by_iommu("old"), by_iommu("new", driver=None, vfio_cdev=None)
    judged = judge_plug(plan(old), asked(*held(old), new), accept_lower=True)
    assert not judged.allowed
    assert codes(judged.reasons) == {"driver_not_bound"}


def test_under_require_a_device_that_is_not_live_is_refused_even_if_accepted() -> None:
    old, new = by_iommu("old"), by_none("new")
    request = asked(*held(old), new, policy=TrackingPolicy.REQUIRE)
    standing = plan(old, policy=TrackingPolicy.REQUIRE)
    assert not judge_plug(standing, request, accept_lower=True).allowed


def test_unplugging_the_last_offender_raises_the_vm_again() -> None:
    able, none = by_iommu("able"), by_none("none")
    standing = plan(able, none)
    after = reconsider(standing, asked(*held(able)))
    change = compare(standing, after)
    assert (change.before, change.after, change.is_higher) == (COPY, LIVE, True)
    assert {one.device for one in change.disappeared} == {"able", "none"}
    assert change.appeared == ()


def test_unplugging_the_only_able_device_leaves_what_was_to_be_copied_copied() -> None:
    able, none = by_iommu("able"), by_none("none")
    after = reconsider(plan(able, none), asked(*held(none)))
    assert after.migratability is COPY
    assert [one.devices for one in after.iommufds] == [("none",)]


def test_a_device_given_without_what_copying_needs_must_be_plugged_again() -> None:
    stuck, none = by_none("stuck", migration=MOVES_ALONE), by_none("none")
    standing = plan(stuck, none)
    assert standing.launched["none"] == StandingDevice("none")
    after = reconsider(standing, asked(*held(none)))
    assert after.migratability is UNPLUG
    assert "started_without" in codes(after.reasons)
    assert reconsider(after, asked(none)).migratability is COPY


def test_an_adopted_vm_is_promised_only_what_qemu_does_by_itself() -> None:
    (none,) = held(by_none("none"))
    assert plan(none).migratability is UNPLUG
    (able,) = held(by_iommu("able"))
    assert plan(able).migratability is UNPLUG, "without iommufd objects it is on the old interface"


def test_an_able_device_is_never_added_beside_a_plain_page_table() -> None:
    log = by_log("log")
    judged = judge_plug(plan(log), asked(*held(log), by_iommu("able")))
    assert judged.allowed
    assert [one.devices for one in judged.plan.iommufds] == [("log",), ("able",)]


def test_a_device_joins_its_group_even_where_it_can_then_not_be_copied() -> None:
    able, log = both("able"), by_log("log", iommu_group=7)
    standing = plan(able, log)
    assert len(standing.iommufds) == 1
    new = by_none("new", iommu_group=7)
    judged = judge_plug(standing, asked(*held(able, log), new), accept_lower=True)
    assert [one.devices for one in judged.plan.iommufds] == [("able", "log", "new")]
    assert not judged.plan.launched["new"].may_copy_all
    assert judged.plan.migratability is UNPLUG
    assert "iommufd_limit" in codes(judged.plan.reasons)


def test_ids_of_new_objects_are_free_ones() -> None:
    able, log = by_iommu("able"), by_log("log")
    standing = plan(able, log)
    assert [one.id for one in standing.iommufds] == ["iommufd0", "iommufd1"]
    after = reconsider(standing, asked(*held(log)))
    assert [one.id for one in after.iommufds] == ["iommufd1"]
    again = reconsider(after, asked(*held(log), able))
    assert [one.id for one in again.iommufds] == ["iommufd1", "iommufd0"]


def test_facts_that_turn_out_unsafe_while_it_runs_block_and_say_so() -> None:
    one, other = by_log("a"), both("b")
    standing = plan(one, other)
    assert len(standing.iommufds) == 1
    found = reconsider(standing, asked(*held(one, replace(by_iommu("b")))))
    assert found.migratability is Migratability.BLOCKED
    assert "no_safe_partition" in codes(found.limits)


def test_a_verdict_with_other_figures_is_no_change() -> None:
    before = plan(by_none("a"))
    after = plan(by_none("a", driver="other_vfio_driver"))
    assert before.reasons != after.reasons
    assert not compare(before, after).is_any


# A QEMU through plugs and unplugs: what was promised holds after each, and nothing is ever lost

MAKERS = [both, by_iommu, by_log, by_none]
UNKNOWN = [
    device("u0", ASK, NO, iommu="iommu3"),
    device("u1", ASK, YES, iommu="iommu3"),
    device("u2", ASK, ASK, iommu="iommu4"),
    device("u3", NO, ASK, iommu="iommu9"),
]
TRUTHS = list(truths(UNKNOWN))
DEVICES = [
    *(maker(f"{letter}{n}") for maker, letter in zip(MAKERS, "bign", strict=True) for n in (0, 1)),
    by_none("s0", migration=STAYS),
    by_iommu("p0", migration=MOVES_ALONE),
    *UNKNOWN,
]
IDS = sorted(one.id for one in DEVICES)
SETTLE = "settle"
"""Everything unknown is probed."""


def settled(one: VmDevice, truth: Given) -> VmDevice:
    facts = replace(
        one.device,
        iommu_dirty_tracking=Capability.probed(truth.cap),
        dma_logging=Capability.probed(truth.log),
    )
    return replace(one, device=facts)


class Running:
    """One VM in the model of QEMU, changed as the judgements say."""

    def __init__(
        self, devices: list[str], truth: Truth, *, fits_elsewhere: bool, most: int | None
    ) -> None:
        self.most = most
        self.facts = {one.id: one for one in DEVICES}
        self.truth = {one.id: truth_of(one) for one in DEVICES if one not in UNKNOWN} | dict(truth)
        self.devices = list(devices)
        self.qemu = QemuModel(plain_fits_elsewhere=fits_elsewhere)
        self.standing = plan(*(self.facts[id_] for id_ in devices), max_iommufds=most)
        if self.standing.refused:
            self.devices = []
            self.standing = plan(max_iommufds=most)
        for one in launched(self.standing, self.truth):
            self.qemu.attach(one)

    def request(self, *new: str) -> TrackingRequest:
        attached = held(*(self.facts[id_] for id_ in self.devices))
        return asked(*attached, *(self.facts[id_] for id_ in new), max_iommufds=self.most)

    def change(self, what: str) -> None:
        """Settle, or unplug a device that is there, or plug one that is not."""
        if what == SETTLE:
            self.facts = {id_: settled(one, self.truth[id_]) for id_, one in self.facts.items()}
        elif what in self.devices:
            self.qemu.unplug(what)
            self.devices.remove(what)
        else:
            judged = judge_plug(self.standing, self.request(what), accept_lower=True)
            if judged.allowed:
                self._plug(judged.plan, what)
            return
        self.standing = reconsider(self.standing, self.request())

    def _plug(self, found: Plan, id_: str) -> None:
        assert found.launch is not None
        told = next(one for one in found.launch.devices if one.id == id_)
        self.qemu.attach(as_told(told, self.truth[id_]))
        self.devices.append(id_)
        self.standing = found

    def check(self) -> None:
        outcome = self.qemu.outcome()
        assert outcome is not Outcome.CORRUPTS, self.devices
        assert MEANS[outcome].rank <= self.standing.migratability.rank, self.devices


@settings(max_examples=300, deadline=None)
@example(  # b0 logs, so a plain page table would do for it: until i0 comes to it
    start=["g0"], changes=["b0", "g0", "i0"], truth=TRUTHS[0], fits_elsewhere=True, most=None
)
@given(
    start=st.lists(st.sampled_from(IDS), unique=True, max_size=5),
    changes=st.lists(st.sampled_from([*IDS, SETTLE]), max_size=12),
    truth=st.sampled_from(TRUTHS),
    fits_elsewhere=st.booleans(),
    most=st.sampled_from([None, None, 1, 2]),
)
def test_no_sequence_of_plugs_and_unplugs_loses_dirt_or_breaks_a_promise(
    start: list[str], changes: list[str], truth: Truth, fits_elsewhere: bool, most: int | None
) -> None:
    vm = Running(start, truth, fits_elsewhere=fits_elsewhere, most=most)
    vm.check()
    for change in changes:
        vm.change(change)
        vm.check()
