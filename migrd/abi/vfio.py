"""Mirror of linux/vfio.h (Linux 6.12): devices bound to an iommufd, features, migration, DMA logs.

What concerns a device's character device is here; groups, containers, regions and interrupts are
the VMM's and are not. Later kernels add fields at the end of some structs (`pasid`, a token); they
take these shorter ones, whose `argsz` says how long they are.
"""

from migrd.abi.ioctl import UapiEnum, UapiFlag, UapiStruct, io, s32, u32, u64

HEADERS = ("linux/vfio.h",)

VFIO_TYPE = ord(";")
VFIO_BASE = 100


# ---- a device


class vfio_device_flags(UapiFlag, prefix="VFIO_DEVICE_FLAGS_"):
    RESET = 1 << 0
    PCI = 1 << 1
    PLATFORM = 1 << 2
    AMBA = 1 << 3
    CCW = 1 << 4
    AP = 1 << 5
    FSL_MC = 1 << 6
    CAPS = 1 << 7
    CDX = 1 << 8


class vfio_device_info(UapiStruct):
    _fields_ = [
        ("argsz", u32),
        ("flags", u32),
        ("num_regions", u32),
        ("num_irqs", u32),
        ("cap_offset", u32),
        ("pad", u32),
    ]


VFIO_DEVICE_GET_INFO = io(VFIO_TYPE, VFIO_BASE + 7)

VFIO_DEVICE_RESET = io(VFIO_TYPE, VFIO_BASE + 11)


# ---- features: this header, then the struct of the feature


class vfio_device_feature(UapiStruct):
    _fields_ = [
        ("argsz", u32),  # of this and of what follows
        ("flags", u32),  # the feature's number, and what is to be done with it
    ]


VFIO_DEVICE_FEATURE_MASK = 0xFFFF
VFIO_DEVICE_FEATURE_GET = 1 << 16
VFIO_DEVICE_FEATURE_SET = 1 << 17
VFIO_DEVICE_FEATURE_PROBE = 1 << 18

VFIO_DEVICE_FEATURE = io(VFIO_TYPE, VFIO_BASE + 17)


# ---- iommufd


class vfio_device_bind_iommufd(UapiStruct):
    _fields_ = [
        ("argsz", u32),
        ("flags", u32),
        ("iommufd", s32),
        ("out_devid", u32),
    ]


VFIO_DEVICE_BIND_IOMMUFD = io(VFIO_TYPE, VFIO_BASE + 18)


class vfio_device_attach_iommufd_pt(UapiStruct):
    _fields_ = [
        ("argsz", u32),
        ("flags", u32),
        ("pt_id", u32),  # in: an IOAS or a page table; out: the page table attached, or the IOAS
    ]


VFIO_DEVICE_ATTACH_IOMMUFD_PT = io(VFIO_TYPE, VFIO_BASE + 19)


class vfio_device_detach_iommufd_pt(UapiStruct):
    _fields_ = [
        ("argsz", u32),
        ("flags", u32),
    ]


VFIO_DEVICE_DETACH_IOMMUFD_PT = io(VFIO_TYPE, VFIO_BASE + 20)


# ---- migration


class vfio_migration(UapiFlag, prefix="VFIO_MIGRATION_"):
    STOP_COPY = 1 << 0
    P2P = 1 << 1
    PRE_COPY = 1 << 2


class vfio_device_feature_migration(UapiStruct):
    _fields_ = [("flags", u64)]


VFIO_DEVICE_FEATURE_MIGRATION = 1


class vfio_device_feature_mig_state(UapiStruct):
    _fields_ = [
        ("device_state", u32),
        ("data_fd", s32),
    ]


VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE = 2


class vfio_device_mig_state(UapiEnum, prefix="VFIO_DEVICE_STATE_"):
    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    RUNNING_P2P = 5
    PRE_COPY = 6
    PRE_COPY_P2P = 7


class vfio_precopy_info(UapiStruct):
    _fields_ = [
        ("argsz", u32),
        ("flags", u32),
        ("initial_bytes", u64),
        ("dirty_bytes", u64),
    ]


VFIO_MIG_GET_PRECOPY_INFO = io(VFIO_TYPE, VFIO_BASE + 21)  # on the data fd


class vfio_device_feature_mig_data_size(UapiStruct):
    _fields_ = [("stop_copy_length", u64)]


VFIO_DEVICE_FEATURE_MIG_DATA_SIZE = 9


# ---- DMA logging


class vfio_device_feature_dma_logging_control(UapiStruct):
    _fields_ = [
        ("page_size", u64),  # in: wished for; out: the device's choice
        ("num_ranges", u32),
        ("__reserved", u32),
        ("ranges", u64),  # user pointer to the ranges
    ]


class vfio_device_feature_dma_logging_range(UapiStruct):
    _fields_ = [
        ("iova", u64),
        ("length", u64),
    ]


VFIO_DEVICE_FEATURE_DMA_LOGGING_START = 6

VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP = 7


class vfio_device_feature_dma_logging_report(UapiStruct):
    _fields_ = [
        ("iova", u64),  # address of bit 0
        ("length", u64),
        ("page_size", u64),  # bytes per bit
        ("bitmap", u64),  # user pointer; bits are only ever set in it
    ]


VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT = 8
