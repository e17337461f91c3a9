"""Bad input about passthrough devices: each is refused clearly, by name, and nothing is touched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from migrd.core.devices import Capability, Unknown
from migrd.core.tracking import Migratability, ReasonCode, TrackingPolicy
from migrd.errors import Invalid, Refused, Unavailable
from tests.engine.passthrough import (
    NIC,
    NIC2,
    hardware,
    hosts,
    nic,
    spec_of,
    start,
    stop,
    told,
    untouched,
    with_kernel,
)
from tests.fakes.virtual_time import until
from tests.fakes.world import VM, Pair

NEVER = TrackingPolicy.NEVER
NOT_ASKED = Capability.unknown(Unknown.NOT_PROBED)


async def refusal(pair: Pair, *addresses: str, policy: TrackingPolicy | None = None) -> Refused:
    with pytest.raises(Refused) as refused:
        await start(pair, *addresses, policy=policy)
    assert untouched(pair)
    for violation in refused.value.violations:
        assert violation.message
    return refused.value


async def test_everything_that_is_in_the_way_is_told_at_once_with_the_address() -> None:
    unbound = nic(NIC2, driver="mlx5_core", vfio_cdev=None)
    async with hosts(hardware(unbound)) as pair:
        refused = await refusal(pair, "0000:99:00.0", NIC2)
        assert ("devices[0].address", "unknown_device") in told(refused)
        assert ("devices[1].address", "driver_not_bound") in told(refused)
        assert all(
            address in violation.message
            for address, violation in zip(("0000:99:00.0", NIC2), refused.violations, strict=True)
        )


async def test_a_device_of_one_vm_is_in_use_for_every_other() -> None:
    async with hosts(hardware(nic())) as pair:
        await start(pair, NIC)
        with pytest.raises(Refused) as refused:
            await start(pair, NIC, name="vm2")
        ((field, code),) = told(refused.value)
        assert (field, code) == ("devices[0].address", "in_use")
        assert VM in refused.value.message
        assert pair.alpha.service.device(NIC).in_use_by == VM
        await stop(pair)
        await start(pair, NIC, name="vm2")
        with pytest.raises(Refused):
            await pair.alpha.service.start_vm(VM)


async def test_a_device_that_others_have_is_refused_with_the_kernels_word() -> None:
    async with hosts(hardware(nic(dma_logging=NOT_ASKED))) as pair:
        pair.hardware["alpha"].foreign[NIC] = "QEMU 4711 of somebody else"
        await pair.alpha.service.define_vm(spec_of(NIC), dry_run=False)
        with pytest.raises(Refused) as refused:
            await pair.alpha.service.start_vm(VM)
        assert "in_use" in {code for _, code in told(refused.value)}
        assert not pair.hosts["alpha"].living(VM)


async def test_a_group_is_given_whole_or_not_at_all() -> None:
    together: dict[str, Any] = {"iommu_group": 50}
    first = nic(NIC, **together, group_devices=(NIC2,))
    second = nic(NIC2, **together, group_devices=(NIC,), driver="mlx5_core", vfio_cdev=None)
    async with hosts(hardware(first, second)) as pair:
        refused = await refusal(pair, NIC)
        assert ("devices[0].address", "in_group_with_others") in told(refused)


async def test_a_device_that_went_away_since_is_refused_by_name() -> None:
    async with hosts(hardware(nic())) as pair:
        await pair.alpha.service.define_vm(spec_of(NIC), dry_run=False)
        pair.hardware["alpha"].inventory.unplug(NIC)
        await until(lambda: NIC not in pair.hardware["alpha"].inventory.current.devices)
        with pytest.raises(Refused) as refused:
            await pair.alpha.service.start_vm(VM)
        assert told(refused.value) == [("devices[0].address", "unknown_device")]
        assert untouched(pair)


async def test_a_device_that_goes_away_in_the_last_moment_leaves_nothing_open() -> None:
    async with hosts(hardware(nic(), nic(NIC2))) as pair:
        pair.hardware["alpha"].foreign[NIC2] = "a process of somebody else"
        with pytest.raises(Refused) as refused:
            await start(pair, NIC, NIC2)
        assert NIC2 in refused.value.message
        assert untouched(pair)


async def test_without_permission_for_iommufd_nothing_is_started() -> None:
    async with hosts(hardware(nic(dma_logging=NOT_ASKED))) as pair:
        pair.hardware["alpha"].denied = True
        with pytest.raises(Refused) as refused:
            await start(pair, NIC)
        assert untouched(pair)
        assert "permission" in refused.value.message or "no_permission" in {
            code for _, code in told(refused.value)
        }


async def test_a_kernel_without_iommufd_is_told_as_the_reason() -> None:
    missing = Capability.unknown(Unknown.KERNEL_TOO_OLD, "no /dev/iommu")
    async with hosts(with_kernel(hardware(nic()), iommufd=missing)) as pair:
        view, _ = await pair.alpha.service.define_vm(spec_of(NIC), dry_run=True)
        assert view.decision is not None
        codes = {reason.code for reason in view.decision.plan.reasons}
        assert codes & {ReasonCode.KERNEL_TOO_OLD, ReasonCode.LEGACY_INTERFACE}
        assert view.decision.plan.migratability is not Migratability.LIVE


@pytest.mark.parametrize("devices", [(NIC,), ()])
async def test_a_policy_that_the_host_forbids_is_refused_by_its_field(
    devices: tuple[str, ...],
) -> None:
    forbidden = frozenset({NEVER})
    async with hosts(hardware(nic()), forbidden_tracking_policies=forbidden) as pair:
        refused = await refusal(pair, *devices, policy=NEVER)
        assert ("tracking_policy", "policy_forbidden") in told(refused)


async def test_a_thousand_devices_are_refused_before_anything_is_looked_at() -> None:
    async with hosts(hardware(nic())) as pair:
        many = [f"0000:{n >> 8:02x}:{n >> 3 & 31:02x}.{n & 7}" for n in range(1000)]
        with pytest.raises(Invalid) as refused:
            await start(pair, *many)
        assert refused.value.code == "too_many_devices"
        assert "1000" in refused.value.message


async def test_the_same_id_twice_is_named() -> None:
    async with hosts(hardware(nic(), nic(NIC2))) as pair:
        spec = spec_of(NIC, NIC2)
        twice = replace(spec, devices=(spec.devices[0], replace(spec.devices[1], id="hostdev0")))
        with pytest.raises(Invalid) as refused:
            await pair.alpha.service.define_vm(twice, dry_run=False)
        assert refused.value.violations[0].field == "devices[1].id"


async def test_a_profile_that_does_not_allow_the_device_says_so_with_the_rest() -> None:
    async with hosts(hardware(nic())) as pair:
        pair.hosts["alpha"].allowed_devices["tiny"] = frozenset({NIC2})
        refused = await refusal(pair, NIC)
        assert "device_not_allowed" in {code for _, code in told(refused)}


async def test_a_device_that_never_answers_does_not_hang_the_start() -> None:
    async with hosts(hardware(nic(dma_logging=NOT_ASKED))) as pair:
        pair.hardware["alpha"].silent.add(NIC)
        with pytest.raises(Unavailable) as late:
            await start(pair, NIC)
        assert late.value.code == "probe_timed_out"
        assert NIC in late.value.message
        assert untouched(pair)


async def test_names_in_sysfs_that_are_no_text_do_not_keep_a_vm_from_being_kept() -> None:
    hostile = nic(
        trouble=("numa_node: \udcff\x00",),
        iommu_dirty_tracking=Capability.estimated(True, "x" * 100_000 + "\udcff"),
    )
    async with hosts(hardware(hostile)) as pair:
        await pair.alpha.service.define_vm(spec_of(NIC), dry_run=False)
        (stored,) = (await pair.alpha.journal.replay()).vms
        assert stored.decision is not None
        assert len(stored.decision.evidence[0].iommu_dirty_tracking.detail) <= 1000
