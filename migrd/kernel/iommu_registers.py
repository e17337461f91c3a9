"""What the registers of an IOMMU say about dirty tracking, before any device is bound.

    kind            in sysfs             it can, if
    Intel VT-d      intel-iommu/ecap     SMTS (43), SSADS (45) and SMPWC (48) are set, and
                                         the kernel uses scalable mode
    AMD-Vi          amd-iommu/features   HDSup (52) is set
    Arm SMMUv3      nothing              unknown: IDR0.HTTU says it, which sysfs does not show
    virtio-iommu    nothing              unknown
    anything else   nothing known        unknown

Sources: the kernel's `ssads_supported` and `ecap_*` in drivers/iommu/intel/iommu.h (where SSADS has
its old name SLADS), `amd_iommu_hd_support` in drivers/iommu/amd/iommu.c, and what each driver shows
in sysfs.

An answer is an estimate, and the bind checks it (IOMMU_GET_HW_INFO). It may be wrong:

- VT-d: whether scalable mode is on by default is a choice made when the kernel was built
  (CONFIG_INTEL_IOMMU_SCALABLE_MODE_DEFAULT_ON) and shows nowhere; only `intel_iommu=sm_off` on the
  kernel's command line does. Kernels before 6.8 did not ask for SMPWC.
- AMD: since Linux 6.7 each instance shows what all of them have in common, so an instance may be
  better than its `features`. Since 5.19 the file has two registers, EFR and EFR2, whose order
  changed in 6.7 (EFR2:EFR before, EFR:EFR2 since), and distributions move such changes to other
  versions. EFR2 has nothing in bit 52, so HDSup is taken from whichever has it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from migrd.core.devices import Capability, IommuKind, Unknown


@dataclass(frozen=True)
class Bit:
    """One bit of a register, as the specifications name it."""

    number: int
    name: str

    def is_set(self, register: int) -> bool:
        return bool(register >> self.number & 1)


SMTS: Final = Bit(43, "SMTS")
SSADS: Final = Bit(45, "SSADS")
SMPWC: Final = Bit(48, "SMPWC")
HA_SUP: Final = Bit(49, "HASup")
HD_SUP: Final = Bit(52, "HDSup")

_VTD_NEEDS: Final = (SMTS, SSADS, SMPWC)
_AMD_SHOWN: Final = (HD_SUP, HA_SUP)
_KIND_BY_NAME: Final = (
    (re.compile(r"dmar\d+"), IommuKind.INTEL_VTD),
    (re.compile(r"ivhd\d+"), IommuKind.AMD_VI),
    (re.compile(r"smmu3\..+"), IommuKind.ARM_SMMU_V3),
)
_KIND_BY_DRIVER: Final = {
    "arm-smmu-v3": IommuKind.ARM_SMMU_V3,
    "virtio_iommu": IommuKind.VIRTIO,
}


def kind_of(name: str, driver: str | None) -> IommuKind:
    """By its name in /sys/class/iommu, else by the driver of the device that it is.

    A virtio-iommu is named after its transport (`0000:00:02.0`), hence the driver.
    """
    for pattern, kind in _KIND_BY_NAME:
        if pattern.fullmatch(name):
            return kind
    return _KIND_BY_DRIVER.get(driver or "", IommuKind.OTHER)


def scalable_mode_is_off(kernel_command_line: str) -> bool:
    """Whether the last word of `intel_iommu=` about scalable mode is sm_off."""
    said = [
        word
        for parameter in kernel_command_line.split()
        if parameter.startswith("intel_iommu=")
        for word in parameter.removeprefix("intel_iommu=").split(",")
        if word in ("sm_on", "sm_off")
    ]
    return said[-1:] == ["sm_off"]


def estimate(
    kind: IommuKind, registers: Mapping[str, int], *, scalable_mode_off: bool = False
) -> Capability:
    """Whether such an instance can track dirty DMA, from what sysfs shows of it."""
    match kind:
        case IommuKind.INTEL_VTD:
            return _vtd(registers.get("ecap"), scalable_mode_off)
        case IommuKind.AMD_VI:
            return _amd(registers.get("features"), registers.get("features2"))
        case IommuKind.ARM_SMMU_V3 | IommuKind.VIRTIO:
            return Capability.unknown(
                Unknown.NO_REGISTERS, f"sysfs shows no registers of {kind.value}; bind a device"
            )
        case IommuKind.OTHER:
            return Capability.unknown(
                Unknown.NO_REGISTERS, "this version has not met such an IOMMU; bind a device"
            )


def _vtd(ecap: int | None, scalable_mode_off: bool) -> Capability:
    if ecap is None:
        return Capability.unknown(Unknown.NOT_READABLE, "intel-iommu/ecap is not readable")
    bits = ", ".join(f"{bit.name} (bit {bit.number}) {bit.is_set(ecap):d}" for bit in _VTD_NEEDS)
    can = all(bit.is_set(ecap) for bit in _VTD_NEEDS)
    detail = f"ecap {ecap:#x}: {bits}"
    if can and scalable_mode_off:
        return Capability.estimated(False, f"{detail}; but intel_iommu=sm_off")
    return Capability.estimated(can, detail)


def _amd(features: int | None, features2: int | None) -> Capability:
    if features is None:
        return Capability.unknown(Unknown.NOT_READABLE, "amd-iommu/features is not readable")
    either = features | (features2 or 0)
    bits = ", ".join(f"{bit.name} (bit {bit.number}) {bit.is_set(either):d}" for bit in _AMD_SHOWN)
    told = f"{features:#x}" if features2 is None else f"{features:#x}:{features2:#x}"
    return Capability.estimated(HD_SUP.is_set(either), f"features {told}: {bits}")
