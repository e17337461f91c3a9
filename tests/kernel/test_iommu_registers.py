"""What registers promise, bit by bit, and what they do not say."""

import pytest

from migrd.core.devices import Answer, Evidence, IommuKind, Unknown
from migrd.kernel.iommu_registers import estimate, kind_of, scalable_mode_is_off

ALL_THREE = 1 << 43 | 1 << 45 | 1 << 48


@pytest.mark.parametrize(
    ("ecap", "can"),
    [
        (ALL_THREE, True),
        (0xFFFF_FFFF_FFFF_FFFF, True),
        (ALL_THREE & ~(1 << 43), False),
        (ALL_THREE & ~(1 << 45), False),
        (ALL_THREE & ~(1 << 48), False),
        (0, False),
        (0xF00F4A, False),  # intel-iommu of QEMU 10
        (0x480080F00F4A, False),  # … with x-scalable-mode=on
        (0x880000F00F4A, False),  # … and x-flts=on
    ],
)
def test_vtd_needs_scalable_mode_second_stage_dirty_bits_and_a_coherent_walk(
    ecap: int, can: bool
) -> None:
    said = estimate(IommuKind.INTEL_VTD, {"cap": 0, "ecap": ecap})
    assert said.answer is (Answer.YES if can else Answer.NO)
    assert said.evidence is Evidence.ESTIMATED
    assert f"ecap {ecap:#x}" in said.detail
    for bit in ("SMTS (bit 43)", "SSADS (bit 45)", "SMPWC (bit 48)"):
        assert bit in said.detail


def test_vtd_without_scalable_mode_on_the_command_line_cannot_track() -> None:
    said = estimate(IommuKind.INTEL_VTD, {"ecap": ALL_THREE}, scalable_mode_off=True)
    assert said.is_no
    assert "intel_iommu=sm_off" in said.detail


@pytest.mark.parametrize(
    ("command_line", "off"),
    [
        ("", False),
        ("intel_iommu=on", False),
        ("quiet intel_iommu=on,sm_off", True),
        ("intel_iommu=sm_off intel_iommu=sm_on", False),
        ("intel_iommu=sm_on,sm_off", True),
        ("not_intel_iommu=sm_off sm_off", False),
    ],
)
def test_the_last_word_about_scalable_mode_counts(command_line: str, off: bool) -> None:
    assert scalable_mode_is_off(command_line) is off


@pytest.mark.parametrize(
    ("registers", "can"),
    [
        ({"features": 1 << 52}, True),
        ({"features": ~(1 << 52) & (1 << 64) - 1}, False),
        ({"features": 0x29D3}, False),  # amd-iommu of QEMU 10
        ({"features": 1 << 52, "features2": 0x10}, True),  # Linux 6.7 and later
        ({"features": 0x10, "features2": 1 << 52}, True),  # Linux 5.19 to 6.6
        ({"features": 1 << 49, "features2": 0}, False),  # access bits alone do not do
    ],
)
def test_amd_needs_the_dirty_bit_in_whichever_order_its_registers_stand(
    registers: dict[str, int], can: bool
) -> None:
    said = estimate(IommuKind.AMD_VI, registers)
    assert said.answer is (Answer.YES if can else Answer.NO)
    assert said.evidence is Evidence.ESTIMATED
    assert "HDSup (bit 52)" in said.detail


@pytest.mark.parametrize("kind", [IommuKind.ARM_SMMU_V3, IommuKind.VIRTIO, IommuKind.OTHER])
def test_a_kind_without_registers_is_unknown_and_never_no(kind: IommuKind) -> None:
    said = estimate(kind, {"ecap": ALL_THREE})
    assert (said.answer, said.reason) == (Answer.UNKNOWN, Unknown.NO_REGISTERS)


@pytest.mark.parametrize("kind", [IommuKind.INTEL_VTD, IommuKind.AMD_VI])
def test_a_register_that_cannot_be_read_is_unknown_and_named(kind: IommuKind) -> None:
    said = estimate(kind, {})
    assert (said.answer, said.reason) == (Answer.UNKNOWN, Unknown.NOT_READABLE)
    assert "ecap" in said.detail or "features" in said.detail


@pytest.mark.parametrize("kind", IommuKind)
def test_every_kind_has_an_answer(kind: IommuKind) -> None:
    assert estimate(kind, {}).answer is Answer.UNKNOWN


@pytest.mark.parametrize(
    ("name", "driver", "kind"),
    [
        ("dmar0", None, IommuKind.INTEL_VTD),
        ("dmar12", None, IommuKind.INTEL_VTD),
        ("ivhd3", "pcieport", IommuKind.AMD_VI),
        ("smmu3.0x0000000009050000", None, IommuKind.ARM_SMMU_V3),
        ("somewhere", "arm-smmu-v3", IommuKind.ARM_SMMU_V3),
        ("0000:00:02.0", "virtio_iommu", IommuKind.VIRTIO),
        ("smmu.0x0000000009050000", None, IommuKind.OTHER),
        ("riscv-iommu@1", None, IommuKind.OTHER),
        ("selftest_iommu.0", None, IommuKind.OTHER),
        ("dmarx", None, IommuKind.OTHER),
        ("", None, IommuKind.OTHER),
    ],
)
def test_an_instance_is_known_by_its_name_or_its_driver(
    name: str, driver: str | None, kind: IommuKind
) -> None:
    assert kind_of(name, driver) is kind
