"""The full product of facts: every row has one plan, and each plan keeps what it says.

The alphabet of one device is what the decision can tell apart: what its IOMMU can (3), whether it
logs (3), how it migrates (4), as a PCI function; and an emulated mdev, which has no IOMMU. Left out
is what only decides whether a device may be opened (drivers, groups, permissions): it changes no
verdict and has its own tests.

Up to three devices: the whole alphabet, on one IOMMU instance and on instances of their own. Each
row has one plan, with at least one reason where it is not live.

What a row promises is held against the model of QEMU, for every way the unknowns may turn out: of
one and two devices each row, of three classes. A third device adds to two only what pairs decide
(who may share an iommufd object) and what all decide (the policy, the P2P rule); so there each
unknown and each lack stands once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations_with_replacement, islice, permutations, product

import pytest

from migrd.core.devices import Answer, Capability, DeviceMigration
from migrd.core.tracking import (
    Migratability,
    Plan,
    Tracker,
    TrackingPolicy,
    TrackingRequest,
    VmDevice,
    decide,
)
from migrd.core.vfio_launch import QemuVfioFeature
from tests.core.qemu_vfio_model import Outcome, StartFails, worst_outcome
from tests.core.tracking_cases import (
    ASK,
    MAYBE_MOVES,
    MEANS,
    MOVES,
    MOVES_ALONE,
    NO,
    QEMU,
    STAYS,
    YES,
    asked,
    device,
    launched,
    truths,
)

Facts = tuple[Capability, Capability, DeviceMigration, bool]
ANSWERS = (YES, NO, ASK)
MIGRATIONS = (MOVES, MOVES_ALONE, STAYS, MAYBE_MOVES)
PCI: list[Facts] = [(*facts, False) for facts in product(ANSWERS, ANSWERS, MIGRATIONS)]
MDEV: list[Facts] = [(NO, log, migration, True) for log, migration in product(ANSWERS, MIGRATIONS)]
ALPHABET = PCI + MDEV
CLASSES: list[Facts] = [
    (YES, YES, MOVES, False),
    (YES, NO, MOVES, False),
    (NO, YES, MOVES, False),
    (NO, NO, MOVES, False),
    (ASK, NO, MOVES, False),
    (NO, ASK, MOVES, False),
    (ASK, ASK, MOVES, False),
    (YES, NO, MOVES_ALONE, False),
    (NO, NO, STAYS, False),
    (YES, NO, MAYBE_MOVES, False),
    (NO, NO, MOVES, True),
    (NO, YES, MOVES, True),
]
OLD_QEMU = QEMU - {QemuVfioFeature.IOMMUFD}


def rows_of(*classes: Facts) -> Iterator[tuple[VmDevice, ...]]:
    """These devices, on one IOMMU instance (where that can be) and on instances of their own."""
    for spread in (False, True)[len(classes) == 1 :]:
        made = [
            device(f"d{n}", cap, log, migration=moves, mdev=mdev, iommu=f"iommu{n * spread}")
            for n, (cap, log, moves, mdev) in enumerate(classes)
        ]
        if spread or len({one.device.iommu_dirty_tracking for one in made}) == 1:
            yield tuple(made)


ONE_OR_TWO = [
    row
    for n in (1, 2)
    for classes in combinations_with_replacement(ALPHABET, n)
    for row in rows_of(*classes)
]
THREE = [row for classes in combinations_with_replacement(CLASSES, 3) for row in rows_of(*classes)]
PARTS = 4
"""Of the longest test, so that it is shared among workers."""


def all_of_three() -> Iterator[tuple[VmDevice, ...]]:
    for classes in combinations_with_replacement(ALPHABET, 3):
        yield from rows_of(*classes)


def test_the_rows_are_as_many_as_the_alphabet_makes() -> None:
    assert len(ALPHABET) == 48
    assert len(ONE_OR_TWO) > 1200
    assert len(THREE) > 364
    assert sum(1 for _ in combinations_with_replacement(ALPHABET, 3)) == 19600


def check(request: TrackingRequest) -> Plan:
    """What holds for every plan, whatever it says."""
    found = decide(request)
    ids = sorted(one.id for one in request.devices)
    assert (found.launch is None) == bool(found.refused)
    assert sorted(found.attach_order) == ids
    assert sorted(found.trackers) == ids == sorted(found.ladders)
    assert sorted(id_ for domain in found.domains for id_ in domain.devices) == ids
    assert found.migratability_at_best.rank <= found.migratability.rank
    limits = [reason.lowers_to for reason in found.limits]
    assert (found.migratability is Migratability.LIVE) == (not limits)
    assert found.migratability in limits or not limits
    assert all(reason.message and reason.cure for reason in found.reasons)
    if found.migratability is Migratability.LIVE:
        assert Tracker.NONE not in found.trackers.values()
    if found.migratability_at_best is not found.migratability:
        assert found.probes
    return found


def check_against_qemu(request: TrackingRequest, found: Plan) -> None:
    """What was promised holds whatever the unknowns turn out to be, and nothing is ever lost."""
    for truth in truths(request.devices):
        given = launched(found, truth)
        try:
            outcome = worst_outcome(given, has_viommu=request.has_viommu)
        except StartFails as failed:
            raise AssertionError(f"{failed}: {given}") from None
        assert outcome is not Outcome.CORRUPTS, given
        assert MEANS[outcome].rank <= found.migratability.rank, (outcome, found, given)


def check_settled(request: TrackingRequest, found: Plan) -> None:
    """Where everything is known, the verdict is what QEMU does, no worse."""
    (truth,) = truths(request.devices)
    outcome = worst_outcome(launched(found, truth), has_viommu=request.has_viommu)
    if request.policy is TrackingPolicy.ALWAYS and not request.has_viommu:
        assert MEANS[outcome] is found.migratability


def is_known(one: VmDevice) -> bool:
    facts = one.device
    told = (facts.iommu_dirty_tracking, facts.dma_logging, facts.migration.can)
    return all(each.answer is not Answer.UNKNOWN for each in told)


@pytest.mark.parametrize("qemu", [QEMU, OLD_QEMU], ids=["iommufd", "legacy"])
@pytest.mark.parametrize("has_viommu", [False, True], ids=["plain", "viommu"])
@pytest.mark.parametrize("policy", [TrackingPolicy.AUTO, TrackingPolicy.ALWAYS])
def test_every_row_of_one_and_two_devices_has_a_plan_that_keeps_its_promise(
    policy: TrackingPolicy, has_viommu: bool, qemu: frozenset[QemuVfioFeature]
) -> None:
    for row in ONE_OR_TWO:
        request = asked(*row, policy=policy, has_viommu=has_viommu, qemu=qemu)
        found = check(request)
        check_against_qemu(request, found)
        if all(is_known(one) for one in row):
            check_settled(request, found)


@pytest.mark.parametrize("has_viommu", [False, True], ids=["plain", "viommu"])
@pytest.mark.parametrize("policy", [TrackingPolicy.AUTO, TrackingPolicy.ALWAYS])
def test_every_row_of_three_devices_has_a_plan_that_keeps_its_promise(
    policy: TrackingPolicy, has_viommu: bool
) -> None:
    for row in THREE:
        request = asked(*row, policy=policy, has_viommu=has_viommu)
        found = check(request)
        check_against_qemu(request, found)
        if all(is_known(one) for one in row):
            check_settled(request, found)


@pytest.mark.parametrize("part", range(PARTS))
def test_every_row_of_three_devices_of_the_whole_alphabet_has_one_plan_with_its_reasons(
    part: int,
) -> None:
    rows = 0
    for row in islice(all_of_three(), part, None, PARTS):
        request = asked(*row)
        found = check(request)
        assert not found.refused
        assert rows % 50 or decide(request) == found, "the same facts, the same plan"
        rows += 1
    assert rows > 19600 // PARTS


def test_require_refuses_exactly_what_auto_does_not_call_live() -> None:
    for row in ONE_OR_TWO + THREE:
        auto = decide(asked(*row))
        require = check(asked(*row, policy=TrackingPolicy.REQUIRE))
        assert not auto.refused
        assert bool(require.refused) == (auto.migratability is not Migratability.LIVE)
        assert require.migratability is auto.migratability
        assert set(auto.limits) == set(require.refused[1:])


def test_never_requests_nothing_and_promises_no_more_than_the_devices_logs() -> None:
    for row in ONE_OR_TWO + THREE:
        request = asked(*row, policy=TrackingPolicy.NEVER)
        found = check(request)
        assert not found.requests_tracking
        assert not {Tracker.IOMMU, Tracker.BOTH} & set(found.trackers.values())
        check_against_qemu(request, found)


def test_the_order_of_the_devices_changes_nothing() -> None:
    for row in ONE_OR_TWO[::3] + THREE[::7]:
        request = asked(*row)
        found = decide(request)
        for other in permutations(row):
            assert decide(replace(request, devices=other)) == found
