"""A device's verdict is the decision about a VM that has it alone."""

from dataclasses import replace

from migrd.core.devices import Capability, DeviceMigration, Inventory, Unknown
from migrd.core.tracking import Migratability, ReasonCode
from migrd.engine.device_verdict import judge, why_all_track
from tests.fakes.inventory import CAN, CANNOT, LIVE, NOT_KNOWN, inventory, mixed_host, pci

VF = "0000:41:00.1"
NVME = "0000:81:00.0"
GPU = "0000:c1:00.0"


def codes(seen: Inventory, address: str) -> set[ReasonCode]:
    return {reason.code for reason in judge(seen.devices[address], seen).reasons}


def test_a_device_that_is_tracked_and_can_be_migrated_is_live() -> None:
    host = mixed_host()
    verdict = judge(host.devices[VF], host)
    assert verdict.migratability is verdict.migratability_at_best is Migratability.LIVE
    assert verdict.can_start
    assert all(reason.lowers_to is None for reason in verdict.reasons)


def test_a_device_without_migration_must_be_unplugged_and_the_reasons_say_why() -> None:
    host = mixed_host()
    verdict = judge(host.devices[NVME], host)
    assert verdict.migratability is Migratability.NEEDS_UNPLUG
    assert ReasonCode.DEVICE_NO_MIGRATION in codes(host, NVME)
    assert ReasonCode.IOMMU_NO_DIRTY_TRACKING in codes(host, NVME)
    for reason in verdict.reasons:
        assert reason.device == NVME
        assert NVME in reason.message
        assert reason.message.count(NVME) == 1, "named once"


def test_what_is_unknown_is_neither_promised_nor_excluded() -> None:
    host = mixed_host()
    verdict = judge(host.devices[GPU], host)
    assert verdict.migratability is not Migratability.LIVE
    assert verdict.migratability_at_best.rank < verdict.migratability.rank
    assert not verdict.can_start, "the host's own driver has it"
    assert any(reason.probe is not None for reason in verdict.reasons)


def test_a_group_that_has_others_in_it_is_a_reason() -> None:
    other = replace(pci("0000:c1:00.1"), driver="snd_hda_intel", iommu_group=33, vfio_cdev=None)
    alone = pci(GPU, migration=LIVE, iommu_group=33, group_devices=("0000:c1:00.1",))
    assert ReasonCode.IN_GROUP_WITH_OTHERS in codes(inventory([CAN], [alone, other]), GPU)
    assert ReasonCode.IN_GROUP_WITH_OTHERS not in codes(inventory([CAN], [pci(GPU)]), GPU)


def test_nothing_is_said_of_a_vm_that_nobody_has_described() -> None:
    host = mixed_host()
    for address in host.devices:
        assert ReasonCode.BANDWIDTH_UNKNOWN not in codes(host, address)
        assert ReasonCode.GUEST_ADDRESS_NOT_FIXED not in codes(host, address)


def test_a_device_of_which_nothing_could_be_read_has_a_verdict_too() -> None:
    unknown = Capability.unknown(Unknown.NOT_READABLE, "class: empty")
    bare = pci(
        VF, None, driver=None, vfio_cdev=None, iommu_group=None,
        iommu_dirty_tracking=unknown, dma_logging=unknown, migration=DeviceMigration(unknown),
    )  # fmt: skip
    verdict = judge(bare, inventory([], [bare]))
    assert verdict.migratability is not Migratability.LIVE
    assert verdict.reasons


def test_a_device_whose_instance_is_not_there_has_a_verdict_too() -> None:
    stray = pci(VF, migration=LIVE)
    assert judge(stray, inventory([], [stray])).migratability is not Migratability.BLOCKED


def test_the_sentence_names_a_few_instances_of_many() -> None:
    many = [replace(NOT_KNOWN, name=f"smmu{n:02}") for n in range(40)]
    why = why_all_track(inventory([CAN, *many]))
    assert why.startswith("not known of 40 of 41: smmu00")
    assert why.endswith("and 36 more")
    assert len(why) < 500


def test_one_that_cannot_outweighs_those_that_are_not_known() -> None:
    assert why_all_track(inventory([CAN, CANNOT, NOT_KNOWN])).startswith("1 of 3 cannot: dmar1")
