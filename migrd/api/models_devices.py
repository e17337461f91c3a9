"""Wire models of the host's IOMMUs and of the devices behind them.

What sysfs and drivers say may be anything: texts are made encodable, lists are cut at a length, and
numbers of 64 bits travel as hex text (JSON readers keep 53 bits).
"""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Self

from pydantic import Field, PlainValidator, WithJsonSchema

from migrd.api.wire import WireModel
from migrd.core import devices as core
from migrd.core.tracking import Migratability
from migrd.engine import service

MOST_TROUBLE: Final = 100
"""Lines about what could not be read; there may be one for every file of every device."""
MAX_WORD: Final = 64

_UUID: Final = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_SLOT: Final = r"[0-9a-f]{2}:[01][0-9a-f]\.[0-7]"
ADDRESS_PATTERN: Final = rf"^([0-9a-f]{{4,8}}:{_SLOT}|{_UUID})$"
_ADDRESS: Final = re.compile(ADDRESS_PATTERN)
_WITHOUT_DOMAIN: Final = re.compile(_SLOT)


def _address(given: Any) -> str:
    """As sysfs writes it; of the usual other ways to write one, the message has the right form."""
    text = str(given)
    if _ADDRESS.fullmatch(text):
        return text
    lower = text.lower().removeprefix("pci:")
    if _WITHOUT_DOMAIN.fullmatch(lower):
        raise ValueError(f"should have its PCI domain in front, 0000:{lower}")
    if _ADDRESS.fullmatch(lower):
        raise ValueError(f"should be written {lower}")
    raise ValueError("should be a PCI address such as 0000:41:00.2, or the UUID of an mdev")


Address = Annotated[
    str,
    PlainValidator(_address),
    # inside allOf: for programs; people are told the right form, not the expression
    WithJsonSchema(
        {"type": "string", "allOf": [{"pattern": ADDRESS_PATTERN}], "examples": ["0000:41:00.2"]}
    ),
]
Word = Annotated[str, Field(min_length=1, max_length=MAX_WORD, pattern=r"^[!-~]+$")]
Hex = Annotated[str, Field(pattern=r"^0x[0-9a-f]+$", examples=["0x1"])]


def hexed(number: int | None, digits: int = 1) -> str | None:
    """A number as JSON readers keep it whole."""
    return None if number is None else f"0x{number & (2**64 - 1):0{digits}x}"


def safe(text: str) -> str:
    """Names in sysfs are bytes: what is no UTF-8 is shown as `?`."""
    return text.encode("utf-8", "replace").decode()


def safe_or_none(text: str | None) -> str | None:
    return None if text is None else safe(text)


def _several(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(safe(text) for text in texts)


class Capability(WireModel):
    """Can it? An answer with its evidence."""

    answer: core.Answer
    """unknown is neither yes nor no."""
    evidence: core.Evidence
    """probed: the kernel's own answer. estimated: from registers, before a device was bound."""
    reason: str | None
    """Why it is unknown, and so which probe would settle it."""
    detail: str
    """For people: the register, file or error it rests on."""

    @classmethod
    def of(cls, known: core.Capability) -> Self:
        return cls(
            answer=known.answer,
            evidence=known.evidence,
            reason=None if known.reason is None else known.reason.value,
            detail=safe(known.detail),
        )


class Iommu(WireModel):
    """One IOMMU instance: features belong to it, not to the devices below it."""

    name: str
    """As in /sys/class/iommu."""
    kind: core.IommuKind
    dirty_tracking: Capability
    registers: Mapping[str, Hex]
    """As sysfs shows them: `cap`, `ecap` (VT-d), `features` (AMD)."""
    hardware_type: int | None
    """`out_data_type` of IOMMU_GET_HW_INFO; null until a device below it was bound."""
    capability_bits: Hex | None
    """`out_capabilities` of IOMMU_GET_HW_INFO; null until a device below it was bound."""
    unknown_capability_bits: Hex | None
    """Those of them that this version of migrd does not know; null: there are none."""
    devices: int
    """How many PCI functions are below it."""

    @classmethod
    def of(cls, known: core.IommuInstance) -> Self:
        return cls(
            name=safe(known.name),
            kind=known.kind,
            dirty_tracking=Capability.of(known.dirty_tracking),
            registers={
                safe(name): hexed(value) or "" for name, value in sorted(known.registers.items())
            },
            hardware_type=known.hardware_type,
            capability_bits=hexed(known.capability_bits),
            unknown_capability_bits=hexed(known.unknown_capability_bits or None),
            devices=len(known.devices),
        )


class Kernel(WireModel):
    """What this kernel offers for passthrough."""

    release: str
    iommufd: Capability
    """/dev/iommu is there and may be opened."""
    vfio_cdev: Capability
    """VFIO devices have character devices (/dev/vfio/devices/vfioN)."""
    unsafe_interrupts: bool | None
    """Passthrough is allowed although interrupts are not remapped; null: not known."""

    @classmethod
    def of(cls, known: core.KernelFacts) -> Self:
        return cls(
            release=safe(known.release),
            iommufd=Capability.of(known.iommufd),
            vfio_cdev=Capability.of(known.vfio_cdev),
            unsafe_interrupts=known.unsafe_interrupts,
        )


class DeviceMigration(WireModel):
    """What the device's driver says about migrating it (VFIO_DEVICE_FEATURE_MIGRATION)."""

    can: Capability
    flags: tuple[core.MigrationFlag, ...]
    unknown_flags: Hex | None
    """Flags that this version of migrd does not know; null: there are none."""
    stop_copy_bytes: int | None
    """The most it sends while the guest stands still; null: the driver does not say, or nobody
    has asked."""

    @classmethod
    def of(cls, known: core.DeviceMigration) -> Self:
        return cls(
            can=Capability.of(known.can),
            flags=tuple(flag for flag in core.MigrationFlag if flag in known.flags),
            unknown_flags=hexed(known.unknown_flags or None),
            stop_copy_bytes=known.stop_copy_bytes,
        )


class DeviceReason(WireModel):
    """What a verdict rests on: what keeps it from being `live`, or is worth knowing."""

    code: str
    """Stable, for programs; new words may come."""
    message: str
    cure: str
    """What would change it; empty when nothing needs to."""
    lowers_to: Migratability | None
    """The best that is left while this holds; null: it only is worth knowing."""
    probe: str | None
    """Of what is unknown or estimated: the question that settles it."""


class DeviceVerdict(WireModel):
    """What a VM that has this device and no other could be promised."""

    migratability: Migratability
    """What is proven."""
    migratability_at_best: Migratability
    """If what is unknown turns out well; better than `migratability` only with probes to do."""
    can_start: bool
    """A VM could be started with it as things are; false: the reasons say what is in the way."""
    reasons: tuple[DeviceReason, ...]
    """Limits first, worst first."""

    @classmethod
    def of(cls, known: service.DeviceVerdict) -> Self:
        return cls(
            migratability=known.migratability,
            migratability_at_best=known.migratability_at_best,
            can_start=known.can_start,
            reasons=tuple(
                DeviceReason(
                    code=reason.code.value,
                    message=safe(reason.message),
                    cure=safe(reason.cure),
                    lowers_to=reason.lowers_to,
                    probe=None if reason.probe is None else reason.probe.value,
                )
                for reason in known.reasons
            ),
        )


class Device(WireModel):
    """One device that is, or could be, passed through."""

    address: str
    """PCI address (domain:bus:device.function), or the UUID of an mdev."""
    resource_version: int
    """Also the ETag."""
    kind: core.DeviceKind
    passthrough: bool
    """A VFIO driver has it: a VM could be given it as things are."""
    in_use_by: str | None
    """The VM that has it; null: none that is known."""
    verdict: DeviceVerdict
    driver: str | None
    driver_override: str | None
    """Of a function without a driver: the only one that would be bound to it."""
    iommu: str | None
    """The instance it is behind, as /v1/host names it."""
    iommu_dirty_tracking: Capability
    """Its IOMMU records its DMA: as found for this device, else its instance's estimate."""
    dma_logging: Capability
    """It records its own DMA."""
    migration: DeviceMigration
    iommu_group: int | None
    group_devices: tuple[str, ...]
    """The other members of its group: they can be isolated only together."""
    physical_function: str | None
    """Of a VF: its PF."""
    virtual_functions: tuple[str, ...]
    mdev_parent: str | None
    mdev_type: str | None
    vfio_cdev: str | None
    numa_node: int | None
    vendor_id: Hex | None
    device_id: Hex | None
    class_code: Hex | None
    can_reset: Capability
    cache_coherent: Capability
    trouble: tuple[str, ...]
    """What could not be read of it, for people."""

    @classmethod
    def of(cls, view: service.DeviceView) -> Self:
        known = view.device
        return cls(
            address=safe(known.address),
            resource_version=view.resource_version,
            kind=known.kind,
            passthrough=view.is_ready,
            in_use_by=view.in_use_by,
            verdict=DeviceVerdict.of(view.verdict),
            driver=safe_or_none(known.driver),
            driver_override=safe_or_none(known.driver_override),
            iommu=safe_or_none(known.iommu),
            iommu_dirty_tracking=Capability.of(known.iommu_dirty_tracking),
            dma_logging=Capability.of(known.dma_logging),
            migration=DeviceMigration.of(known.migration),
            iommu_group=known.iommu_group,
            group_devices=_several(known.group_devices),
            physical_function=safe_or_none(known.physical_function),
            virtual_functions=_several(known.virtual_functions),
            mdev_parent=safe_or_none(known.mdev_parent),
            mdev_type=safe_or_none(known.mdev_type),
            vfio_cdev=safe_or_none(known.vfio_cdev),
            numa_node=known.numa_node,
            vendor_id=hexed(known.vendor_id, 4),
            device_id=hexed(known.device_id, 4),
            class_code=hexed(known.class_code, 6),
            can_reset=Capability.of(known.can_reset),
            cache_coherent=Capability.of(known.cache_coherent),
            trouble=_several(known.trouble[:MOST_TROUBLE]),
        )


class DeviceList(WireModel):
    """Devices by address."""

    resource_version: int
    """Hand it back with `watch` to wait for anything newer."""
    items: tuple[Device, ...]
    next_page_token: str | None
