"""What is kept of a decision: bounded, plain text, and enough to decide again."""

from dataclasses import replace

from migrd.core.devices import Capability, DeviceMigration, Unknown
from migrd.core.facts import PassthroughFacts, SpecDevice, VmSpec
from migrd.core.standing import (
    LONGEST_TEXT,
    DeviceEvidence,
    may_be_asked,
    placed,
    placed_launch,
    remembering,
    sound,
    with_addresses,
)
from migrd.core.vfio_launch import GivenBy, VfioLaunch, VfioLaunchDevice
from tests.fakes.inventory import LIVE, mdev, pci

NIC = "0000:41:00.1"
UNKNOWN = Capability.unknown(Unknown.IN_USE, "QEMU 4711")
ASKED = pci(
    NIC,
    iommu_dirty_tracking=Capability.probed(True),
    dma_logging=Capability.probed(False),
    migration=LIVE,
)
IN_USE = replace(
    ASKED,
    iommu_dirty_tracking=UNKNOWN,
    dma_logging=UNKNOWN,
    migration=DeviceMigration(UNKNOWN),
)


def test_texts_from_sysfs_become_plain_and_bounded_wherever_they_are() -> None:
    hostile = replace(ASKED, driver="x\udcff", trouble=("y\udcfe" * 5000,))
    kept = sound(hostile)
    assert kept.driver == "x?"
    assert len(kept.trouble[0]) == LONGEST_TEXT
    kept.trouble[0].encode()
    assert sound(ASKED) == ASKED


def test_what_the_kernel_answered_outlives_the_moment_when_it_answers_nobody() -> None:
    found = remembering(IN_USE, DeviceEvidence.of("hostdev0", ASKED))
    assert found.iommu_dirty_tracking == ASKED.iommu_dirty_tracking
    assert found.dma_logging == ASKED.dma_logging
    assert found.migration == ASKED.migration


def test_a_newer_answer_of_the_kernel_is_better_than_a_remembered_one() -> None:
    newer = replace(ASKED, iommu_dirty_tracking=Capability.probed(False))
    assert remembering(newer, DeviceEvidence.of("hostdev0", ASKED)) == newer


def test_what_was_only_estimated_is_not_remembered() -> None:
    guessed = replace(ASKED, iommu_dirty_tracking=Capability.estimated(True, "ecap"))
    found = remembering(IN_USE, DeviceEvidence.of("hostdev0", guessed))
    assert found.iommu_dirty_tracking == UNKNOWN


def test_evidence_is_about_one_address_only() -> None:
    other = replace(IN_USE, address="0000:41:00.2")
    assert remembering(other, DeviceEvidence.of("hostdev0", ASKED)) == other


def test_a_device_that_sysfs_does_not_show_is_known_by_its_evidence() -> None:
    back = DeviceEvidence.of("hostdev0", ASKED).device()
    assert DeviceEvidence.of("hostdev0", back) == DeviceEvidence.of("hostdev0", ASKED)
    emulated = mdev("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001")
    assert DeviceEvidence.of("m", emulated).device().kind is emulated.kind


def test_only_what_the_kernel_has_not_answered_is_asked() -> None:
    assert not may_be_asked(ASKED)
    assert may_be_asked(IN_USE)
    assert may_be_asked(pci(NIC))


def test_addresses_change_from_host_to_host_and_nothing_else_does() -> None:
    spec = VmSpec("vm", "p", devices=(SpecDevice("a", NIC, "rp0"), SpecDevice("b", "x")))
    moved = with_addresses(spec, {"a": "y"})
    assert moved.devices == (SpecDevice("a", "y", "rp0"), SpecDevice("b", "x"))


def test_slots_that_qemu_chose_are_kept_and_those_that_were_given_stand() -> None:
    spec = VmSpec("vm", "p", devices=(SpecDevice("a", "x"), SpecDevice("b", "y", "rp0", "00.0")))
    seen = (
        PassthroughFacts("a", guest_bus="pcie.0", guest_address="04.0"),
        PassthroughFacts("b", guest_bus="pcie.0", guest_address="05.0"),
        PassthroughFacts("c"),
    )
    found = placed(spec, seen)
    assert found.devices == (SpecDevice("a", "x", "pcie.0", "04.0"), spec.devices[1])
    told = VfioLaunch(devices=(VfioLaunchDevice("a", "x", None, GivenBy.FD),))
    (device,) = (placed_launch(told, found) or told).devices
    assert (device.guest_bus, device.guest_address) == ("pcie.0", "04.0")
    assert placed_launch(None, found) is None
