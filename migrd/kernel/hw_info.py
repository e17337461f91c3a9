"""What an IOMMU says of itself to a bound device (IOMMU_GET_HW_INFO), as values.

Unlike registers read from sysfs this is the kernel's own answer: DIRTY_TRACKING is set only if
the hardware can do it, the driver knows how, and it is switched on. Types and bits that no header
here names are kept as numbers.
"""

import ctypes
from dataclasses import dataclass

from migrd.abi import iommufd as abi

_KNOWN_CAPABILITIES = abi.iommufd_hw_capabilities(
    sum(bit.value for bit in abi.iommufd_hw_capabilities)
)


@dataclass(frozen=True)
class VtdRegisters:
    """The registers of an Intel VT-d unit, and what their fields say (VT-d specification, 11.4)."""

    flags: abi.iommu_hw_info_vtd_flags
    """Errata; unknown bits are kept."""
    cap: int
    ecap: int

    @property
    def address_width_bits(self) -> int:
        """MGAW: how wide an IOVA may be."""
        return (self.cap >> 16 & 0x3F) + 1

    @property
    def has_scalable_mode(self) -> bool:
        """SMTS: without it there is no dirty tracking."""
        return bool(self.ecap >> 43 & 1)

    @property
    def has_dirty_bits(self) -> bool:
        """SSADS: second-stage page tables have accessed and dirty bits."""
        return bool(self.ecap >> 45 & 1)

    @property
    def has_nesting(self) -> bool:
        """NEST."""
        return bool(self.ecap >> 26 & 1)


@dataclass(frozen=True)
class HwInfo:
    """The IOMMU behind one bound device."""

    dev_id: int
    hardware_type: int
    """`out_data_type`, of iommu_hw_info_type or newer; what `registers` holds."""
    capabilities: abi.iommufd_hw_capabilities
    """All 64 bits; unknown ones are kept."""
    max_pasid_log2: int
    """0: no PASIDs, or a kernel that does not say."""
    registers: bytes
    """As the kernel gave them, for a type that nobody here knows."""

    @property
    def tracks_dirty(self) -> bool:
        return abi.iommufd_hw_capabilities.DIRTY_TRACKING in self.capabilities

    @property
    def unknown_capability_bits(self) -> int:
        return self.capabilities.value & ~_KNOWN_CAPABILITIES.value

    @property
    def vtd(self) -> VtdRegisters | None:
        """None: not an Intel VT-d, or it gave less than its registers."""
        if self.hardware_type != abi.iommu_hw_info_type.INTEL_VTD:
            return None
        if len(self.registers) < ctypes.sizeof(abi.iommu_hw_info_vtd):
            return None
        raw = abi.iommu_hw_info_vtd.from_buffer_copy(self.registers)
        return VtdRegisters(abi.iommu_hw_info_vtd_flags(raw.flags), raw.cap_reg, raw.ecap_reg)
