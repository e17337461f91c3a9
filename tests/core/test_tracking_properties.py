"""Properties of the decision, over VMs of any make-up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from migrd.core.devices import Answer, IommuKind, MigrationFlag
from migrd.core.tracking import (
    DomainFlag,
    Migratability,
    Plan,
    TrackingPolicy,
    TrackingRequest,
    VmDevice,
    decide,
)
from migrd.core.vfio_launch import QemuVfioFeature
from tests.core.qemu_vfio_model import Outcome, worst_outcome
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
    both,
    device,
    iommu,
    launched,
    truths,
)

ANY_TIME = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""The machine may be busy."""
LIVE = Migratability.LIVE
ANSWERS = st.sampled_from([YES, NO, ASK])
MIGRATIONS = st.sampled_from([MOVES, MOVES, MOVES_ALONE, STAYS, MAYBE_MOVES])
IOMMUS = {
    "iommu0": iommu("iommu0"),
    "iommu1": iommu("iommu1", IommuKind.AMD_VI),
    "iommu2": iommu("iommu2", IommuKind.ARM_SMMU_V3),
}
FEATURES = [QEMU, QEMU - {QemuVfioFeature.IOMMUFD}, QEMU - {QemuVfioFeature.DEVICE_DIRTY_TRACKING}]


@st.composite
def vms(draw: st.DrawFn, most: int = 6) -> tuple[VmDevice, ...]:
    """Devices on three instances; what an instance can is the same for all behind it."""
    can = {name: draw(ANSWERS) for name in IOMMUS}
    found = []
    for n in range(draw(st.integers(0, most))):
        where = draw(st.sampled_from(sorted(IOMMUS)))
        is_mdev = draw(st.integers(0, 5)) == 0
        log, moves = draw(ANSWERS), draw(MIGRATIONS)
        cap = NO if is_mdev else can[where]
        found.append(device(f"d{n}", cap, log, migration=moves, mdev=is_mdev, iommu=where))
    return tuple(found)


REQUESTS = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(TrackingPolicy),
        "has_viommu": st.booleans(),
        "qemu": st.sampled_from(FEATURES),
        "wants": st.frozensets(st.sampled_from([DomainFlag.NEST_PARENT, DomainFlag.PASID])),
        "iommus": st.just(IOMMUS),
    }
)


def with_policy(facts: dict[str, Any], policy: TrackingPolicy) -> dict[str, Any]:
    return facts | {"policy": policy}


@ANY_TIME
@given(vms(), REQUESTS, st.randoms(use_true_random=False))
def test_the_same_devices_in_any_order_have_the_same_plan(
    devices: tuple[VmDevice, ...], facts: dict[str, Any], random: Any
) -> None:
    shuffled = list(devices)
    random.shuffle(shuffled)
    assert decide(asked(*shuffled, **facts)) == decide(asked(*devices, **facts))


def awakens_p2p(devices: tuple[VmDevice, ...]) -> bool:
    """One alone migrates, without P2P: any second device that migrates brings it down."""
    moving = [one.device.migration for one in devices if one.device.migration.can is not NO]
    return len(moving) == 1 and MigrationFlag.P2P not in moving[0].flags


@ANY_TIME
@given(vms(), REQUESTS)
def test_adding_a_capable_device_never_lowers(
    devices: tuple[VmDevice, ...], facts: dict[str, Any]
) -> None:
    assume(not awakens_p2p(devices))
    assume(not facts["has_viommu"] or devices)  # the first device meets the vIOMMU
    before = decide(asked(*devices, **facts))
    after = decide(asked(*devices, both("new", iommu="iommu9"), **facts))
    if facts["has_viommu"] and QemuVfioFeature.DEVICE_DIRTY_TRACKING not in facts["qemu"]:
        return  # its log cannot be left alone: it is not capable here
    if facts["has_viommu"] and QemuVfioFeature.IOMMUFD not in facts["qemu"]:
        return  # nor is it with its log alone
    assert after.migratability.rank <= before.migratability.rank
    assert after.migratability_at_best.rank <= before.migratability_at_best.rank


@ANY_TIME
@given(vms(), REQUESTS, st.data())
def test_removing_a_device_never_lowers(
    devices: tuple[VmDevice, ...], facts: dict[str, Any], data: st.DataObject
) -> None:
    assume(devices)
    gone = data.draw(st.sampled_from(devices))
    before = decide(asked(*devices, **facts))
    after = decide(asked(*(one for one in devices if one is not gone), **facts))
    assert after.migratability.rank <= before.migratability.rank
    assert after.migratability_at_best.rank <= before.migratability_at_best.rank


@ANY_TIME
@given(vms(), REQUESTS)
def test_require_refuses_exactly_what_auto_does_not_call_live(
    devices: tuple[VmDevice, ...], facts: dict[str, Any]
) -> None:
    auto = decide(asked(*devices, **with_policy(facts, TrackingPolicy.AUTO)))
    require = decide(asked(*devices, **with_policy(facts, TrackingPolicy.REQUIRE)))
    assert bool(require.refused) == (auto.migratability is not LIVE)


@ANY_TIME
@given(vms(), REQUESTS)
def test_always_promises_no_less_than_auto_and_auto_no_less_than_never(
    devices: tuple[VmDevice, ...], facts: dict[str, Any]
) -> None:
    ranks = [
        decide(asked(*devices, **with_policy(facts, policy))).migratability.rank
        for policy in (TrackingPolicy.ALWAYS, TrackingPolicy.AUTO, TrackingPolicy.NEVER)
    ]
    assert ranks == sorted(ranks)


def bears_on_the_verdict(one: VmDevice) -> bool:
    facts = one.device
    told = (facts.iommu_dirty_tracking, facts.dma_logging)
    is_watched = any(each.answer is Answer.YES for each in told)
    is_open = any(each.answer is Answer.UNKNOWN for each in told)
    return facts.migration.can.answer is Answer.UNKNOWN or (is_open and not is_watched)


@ANY_TIME
@given(vms(), REQUESTS)
def test_an_unknown_that_matters_never_gives_live_and_always_names_a_probe(
    devices: tuple[VmDevice, ...], facts: dict[str, Any]
) -> None:
    found = decide(asked(*devices, **facts))
    for one in devices:
        if bears_on_the_verdict(one):
            assert found.migratability is not LIVE
    if found.migratability is not found.migratability_at_best:
        assert any(reason.probe for reason in found.limits)


def promised(request: TrackingRequest, found: Plan) -> None:
    for truth in truths(request.devices):
        outcome = worst_outcome(launched(found, truth), has_viommu=request.has_viommu)
        assert outcome is not Outcome.CORRUPTS, truth
        assert MEANS[outcome].rank <= found.migratability.rank, truth


@ANY_TIME
@given(vms(most=4), REQUESTS, st.sampled_from([None, None, 1, 2]))
def test_what_is_promised_holds_in_qemu_however_the_unknowns_turn_out(
    devices: tuple[VmDevice, ...], facts: dict[str, Any], most: int | None
) -> None:
    devices = tuple(
        replace(one, device=replace(one.device, migration=MOVES))
        if one.device.migration.can is ASK
        else one
        for one in devices
    )
    request = asked(*devices, **facts, max_iommufds=most)
    found = decide(request)
    if found.launch is not None:
        promised(request, found)
        assert most is None or len(found.iommufds) <= most
