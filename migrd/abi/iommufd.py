"""Mirror of linux/iommufd.h (Linux 6.12): what migrd uses of it. The calls: migrd.kernel.iommufd.

Every struct begins with its own size, so that the kernel can tell old callers from new ones; all
numbers are _IO(), without direction and size.
"""

from typing import Final

from migrd.abi.ioctl import UapiEnum, UapiFlag, UapiStruct, io, u8, u32, u64

HEADERS: Final = ("linux/iommufd.h",)

IOMMUFD_TYPE: Final = ord(";")

IOMMU_DESTROY: Final = io(IOMMUFD_TYPE, 0x80)
IOMMU_IOAS_ALLOC: Final = io(IOMMUFD_TYPE, 0x81)
IOMMU_IOAS_ALLOW_IOVAS: Final = io(IOMMUFD_TYPE, 0x82)
IOMMU_IOAS_COPY: Final = io(IOMMUFD_TYPE, 0x83)
IOMMU_IOAS_IOVA_RANGES: Final = io(IOMMUFD_TYPE, 0x84)
IOMMU_IOAS_MAP: Final = io(IOMMUFD_TYPE, 0x85)
IOMMU_IOAS_UNMAP: Final = io(IOMMUFD_TYPE, 0x86)
IOMMU_HWPT_ALLOC: Final = io(IOMMUFD_TYPE, 0x89)
IOMMU_GET_HW_INFO: Final = io(IOMMUFD_TYPE, 0x8A)
IOMMU_HWPT_SET_DIRTY_TRACKING: Final = io(IOMMUFD_TYPE, 0x8B)
IOMMU_HWPT_GET_DIRTY_BITMAP: Final = io(IOMMUFD_TYPE, 0x8C)


class iommu_destroy(UapiStruct):
    _fields_ = [
        ("size", u32),
        ("id", u32),
    ]


class iommu_ioas_alloc(UapiStruct):
    _fields_ = [
        ("size", u32),
        ("flags", u32),
        ("out_ioas_id", u32),
    ]


class iommu_iova_range(UapiStruct):
    _fields_ = [
        ("start", u64),
        ("last", u64),  # inclusive
    ]


class iommu_ioas_iova_ranges(UapiStruct):
    _fields_ = [
        ("size", u32),
        ("ioas_id", u32),
        ("num_iovas", u32),  # in: room in the array; out: how many there are
        ("__reserved", u32),
        ("allowed_iovas", u64),  # user pointer to iommu_iova_range[]
        ("out_iova_alignment", u64),
    ]


class iommu_ioas_allow_iovas(UapiStruct):
    _fields_ = [
        ("size", u32),
        ("ioas_id", u32),
        ("num_iovas", u32),
        ("__reserved", u32),
        ("allowed_iovas", u64),  # user pointer to iommu_iova_range[]
    ]


class iommufd_ioas_map_flags(UapiFlag, prefix="IOMMU_IOAS_MAP_"):
    FIXED_IOVA = 1
    WRITEABLE = 2
    READABLE = 4


class iommu_ioas_map(UapiStruct):
    _fields_ = [
        ("size", u32),
        ("flags", u32),
        ("ioas_id", u32),
        ("__reserved", u32),
        ("user_va", u64),
        ("length", u64),
        ("iova", u64),  # in with FIXED_IOVA, else out
    ]


class iommu_ioas_copy(UapiStruct):
    _fields_ = [
        ("size", u32),
        ("flags", u32),  # iommufd_ioas_map_flags
        ("dst_ioas_id", u32),
        ("src_ioas_id", u32),
        ("length", u64),
        ("dst_iova", u64),
        ("src_iova", u64),
    ]


class iommu_ioas_unmap(UapiStruct):
    _fields_ = [
        ("size", u32),
        ("ioas_id", u32),
        ("iova", u64),
        ("length", u64),  # out: bytes unmapped
    ]


class iommufd_hwpt_alloc_flags(UapiFlag, prefix="IOMMU_HWPT_"):
    ALLOC_NEST_PARENT = 1
    ALLOC_DIRTY_TRACKING = 2
    FAULT_ID_VALID = 4


class iommu_hwpt_data_type(UapiEnum, prefix="IOMMU_HWPT_DATA_"):
    NONE = 0
    VTD_S1 = 1


class iommu_hwpt_alloc(UapiStruct):
    _fields_ = [
        ("size", u32),
        ("flags", u32),
        ("dev_id", u32),
        ("pt_id", u32),
        ("out_hwpt_id", u32),
        ("__reserved", u32),
        ("data_type", u32),
        ("data_len", u32),
        ("data_uptr", u64),
        ("fault_id", u32),
        ("__reserved2", u32),
    ]


class iommu_hw_info_vtd_flags(UapiFlag, prefix="IOMMU_HW_INFO_VTD_"):
    ERRATA_772415_SPR17 = 1


class iommu_hw_info_vtd(UapiStruct):
    _fields_ = [
        ("flags", u32),
        ("__reserved", u32),
        ("cap_reg", u64),
        ("ecap_reg", u64),
    ]


class iommu_hw_info_type(UapiEnum, prefix="IOMMU_HW_INFO_TYPE_"):
    NONE = 0
    INTEL_VTD = 1


class iommufd_hw_capabilities(UapiFlag, prefix="IOMMU_HW_CAP_"):
    DIRTY_TRACKING = 1
    PCI_PASID_EXEC = 2
    PCI_PASID_PRIV = 4


class iommu_hw_info(UapiStruct):
    _fields_ = [
        ("size", u32),
        ("flags", u32),
        ("dev_id", u32),
        ("data_len", u32),  # in: room; out: bytes that the kernel has
        ("data_uptr", u64),
        ("out_data_type", u32),
        ("out_max_pasid_log2", u8),  # reserved, and zero, before Linux 6.15
        ("__reserved", u8 * 3),
        ("out_capabilities", u64),
    ]


class iommufd_hwpt_set_dirty_tracking_flags(UapiFlag, prefix="IOMMU_HWPT_DIRTY_TRACKING_"):
    ENABLE = 1


class iommu_hwpt_set_dirty_tracking(UapiStruct):
    _fields_ = [
        ("size", u32),
        ("flags", u32),  # before hwpt_id; get_dirty_bitmap has them the other way round
        ("hwpt_id", u32),
        ("__reserved", u32),
    ]


class iommufd_hwpt_get_dirty_bitmap_flags(UapiFlag, prefix="IOMMU_HWPT_GET_DIRTY_BITMAP_"):
    NO_CLEAR = 1  # peek: without it, reading also clears


class iommu_hwpt_get_dirty_bitmap(UapiStruct):
    _fields_ = [
        ("size", u32),
        ("hwpt_id", u32),
        ("flags", u32),
        ("__reserved", u32),
        ("iova", u64),  # address of bit 0
        ("length", u64),  # bytes of IOVA space, not of bitmap
        ("page_size", u64),  # bytes per bit
        ("data", u64),  # user pointer to the bitmap
    ]
