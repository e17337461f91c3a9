"""The ladder of errnos, rung by rung, and against a kernel that answers as the real one does."""

from __future__ import annotations

from errno import EBUSY, EINVAL, ENOMEM, EOPNOTSUPP

import pytest

from migrd.core.attach_ladder import Ladder, LadderAction, step
from migrd.core.tracking import DomainFlag, TrackingPolicy
from tests.core.tracking_cases import by_iommu, by_log, device, plan

TRACK, NEST, PASID = DomainFlag.DIRTY_TRACKING, DomainFlag.NEST_PARENT, DomainFlag.PASID
ALLOCATE, ATTACH = LadderAction.ALLOCATE, LadderAction.ATTACH
DONE, FAILED = LadderAction.DONE, LadderAction.FAILED


def ladder(
    policy: TrackingPolicy = TrackingPolicy.AUTO, *wants: DomainFlag, second: bool = False
) -> Ladder:
    found = plan(by_iommu("a"), by_iommu("b"), policy=policy, wants=frozenset(wants))
    return found.ladders["b" if second else "a"]


def climbed(start: Ladder, *errnos: int | None) -> Ladder:
    for errno in errnos:
        start = step(start, errno)
    return start


def test_where_all_goes_well_the_domain_is_allocated_with_tracking_and_attached() -> None:
    start = ladder()
    assert start.action is ALLOCATE
    assert start.rung.flags == {TRACK}
    assert climbed(start, None).action is ATTACH
    end = climbed(start, None, None)
    assert (end.action, end.is_downgraded, end.errno) == (DONE, False, None)


def test_the_second_device_of_a_domain_only_attaches() -> None:
    start = ladder(second=True)
    assert (start.action, start.rung.own_domain) == (ATTACH, False)
    assert climbed(start, None).action is DONE


def test_a_refused_flag_at_allocate_leads_to_a_domain_without_it_and_a_mark() -> None:
    lower = climbed(ladder(), EOPNOTSUPP)
    assert (lower.action, lower.rung.flags) == (ALLOCATE, frozenset())
    end = climbed(lower, None, None)
    assert (end.action, end.is_downgraded, end.errno) == (DONE, True, EOPNOTSUPP)


@pytest.mark.parametrize("second", [False, True])
def test_a_domain_that_enforces_tracking_leads_to_one_of_the_devices_own(second: bool) -> None:
    start = ladder(second=second)
    at_attach = start if second else climbed(start, None)
    lower = climbed(at_attach, EINVAL)
    assert (lower.action, lower.rung.own_domain, lower.rung.flags) == (ALLOCATE, True, frozenset())
    end = climbed(lower, None, None)
    assert (end.action, end.is_downgraded, end.errno) == (DONE, True, EINVAL)


@pytest.mark.parametrize(
    "errnos",
    [
        [ENOMEM],
        [EINVAL],
        [None, EBUSY],
        [None, EOPNOTSUPP],
        [EOPNOTSUPP, EOPNOTSUPP],
        [EOPNOTSUPP, None, EINVAL],
        [None, EINVAL, EINVAL],
        [None, EINVAL, None, EINVAL],
    ],
)
def test_any_other_errno_is_an_error_and_is_not_retried(errnos: list[int | None]) -> None:
    end = climbed(ladder(), *errnos)
    assert (end.action, end.errno) == (FAILED, errnos[-1])
    with pytest.raises(ValueError, match="has ended"):
        step(end, None)


@pytest.mark.parametrize("errnos", [[EOPNOTSUPP], [None, EINVAL]])
def test_under_require_nothing_is_given_up(errnos: list[int | None]) -> None:
    assert climbed(ladder(TrackingPolicy.REQUIRE), *errnos).action is FAILED


def flags_tried(start: Ladder) -> list[set[DomainFlag]]:
    """Each allocation refused with EOPNOTSUPP, until it is an error."""
    tried = []
    while start.action is ALLOCATE:
        tried.append(set(start.rung.flags))
        start = step(start, EOPNOTSUPP)
    return tried


def test_always_gives_nesting_up_before_tracking_and_auto_gives_tracking_up() -> None:
    assert flags_tried(ladder(TrackingPolicy.ALWAYS, NEST)) == [{TRACK, NEST}, {TRACK}, {NEST}]
    assert flags_tried(ladder(TrackingPolicy.AUTO, NEST)) == [{TRACK, NEST}, {NEST}]
    assert flags_tried(ladder(TrackingPolicy.ALWAYS, NEST, PASID)) == [
        {TRACK, NEST, PASID},
        {TRACK, PASID},
        {TRACK},
        {NEST, PASID},
    ]
    assert flags_tried(ladder(TrackingPolicy.REQUIRE, NEST)) == [{TRACK, NEST}]


def test_nesting_lost_alone_is_no_downgrade() -> None:
    end = climbed(ladder(TrackingPolicy.ALWAYS, NEST), EOPNOTSUPP, None, None)
    assert (end.action, end.is_downgraded) == (DONE, False)
    assert end.rung.lost == {NEST}


def test_without_tracking_there_is_one_try_and_for_an_emulated_mdev_only_an_attach() -> None:
    found = plan(by_log("a"), device("m", mdev=True, log=by_log("x").device.dma_logging))
    assert flags_tried(found.ladders["a"]) == [set()]
    assert climbed(found.ladders["a"], None, EINVAL).action is FAILED
    assert found.ladders["m"].action is ATTACH
    assert climbed(found.ladders["m"], None).action is DONE


def test_every_way_through_every_ladder_ends() -> None:
    for policy in TrackingPolicy:
        for second in (False, True):
            ends, open_ = set(), [ladder(policy, NEST, PASID, second=second)]
            while open_:
                here = open_.pop()
                for errno in (None, EINVAL, EOPNOTSUPP, EBUSY):
                    there = step(here, errno)
                    if there.action in (DONE, FAILED):
                        ends.add((there.action, there.is_downgraded))
                    else:
                        assert there.at < here.at, "never up again"
                        open_.append(there)
            assert (DONE, False) in ends
            may_downgrade = policy in (TrackingPolicy.AUTO, TrackingPolicy.ALWAYS)
            assert ((DONE, True) in ends) == may_downgrade
