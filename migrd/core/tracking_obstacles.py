"""Why a device cannot be given to the VM as things are: nothing about migration yet.

Asked only of devices that the VM does not have already; all of them make the start (or the plug)
refused.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Final

from migrd.core.devices import Capability, Device, Unknown
from migrd.core.tracking_facts import Traits, has_no_cdev, is_unbound
from migrd.core.tracking_layout import Layout
from migrd.core.tracking_reasons import Reason, ReasonCode
from migrd.core.tracking_request import TrackingRequest
from migrd.core.tracking_words import name

_BRIDGE: Final = 0x06
_MOST_NAMED: Final = 4


def obstacles(layout: Layout) -> Iterator[Reason]:
    """All of them."""
    request = layout.request
    yield from _given_twice(request)
    new = [one for one in layout.traits.values() if not one.vm_device.attached]
    if new:
        yield from _of_kernel(request)
    given = {one.vm_device.device.address for one in layout.traits.values()}
    for one in new:
        yield from _of_device(one, layout)
        yield from _of_group(one, given, request)


def _given_twice(request: TrackingRequest) -> Iterator[Reason]:
    devices = [one for one in request.devices if one.device.is_passthrough]
    for what, counted in (
        ("id", Counter(one.id for one in devices)),
        ("address", Counter(one.device.address for one in devices)),
    ):
        for value, times in sorted(counted.items()):
            if times > 1:
                yield Reason(
                    ReasonCode.GIVEN_TWICE,
                    value if what == "id" else None,
                    f"{times} devices of the VM have the {what} {value}",
                    "name each device once",
                )


def _of_kernel(request: TrackingRequest) -> Iterator[Reason]:
    iommufd = request.kernel.iommufd if request.kernel is not None else None
    if iommufd is not None and iommufd.reason is Unknown.NO_PERMISSION:
        yield Reason(
            ReasonCode.NO_PERMISSION,
            None,
            "/dev/iommu may not be opened" + (f" ({iommufd.detail})" if iommufd.detail else ""),
            "let migrd open it (group and mode of the device node)",
        )


def _of_device(one: Traits, layout: Layout) -> Iterator[Reason]:
    device = one.vm_device.device
    told = _unknowns(device)
    if is_unbound(device):
        other = f"is bound to {device.driver}" if device.driver else "has no driver"
        yield Reason(
            ReasonCode.DRIVER_NOT_BOUND,
            one.id,
            f"{name(one)} {other}, not a VFIO driver",
            "set its driver_override to vfio-pci, or its vendor's VFIO driver, and bind it",
        )
    elif has_no_cdev(device) and not layout.is_legacy:
        yield Reason(
            ReasonCode.KERNEL_TOO_OLD,
            one.id,
            f"{name(one)} has no VFIO character device, and the VM runs on iommufd",
            "use a kernel with CONFIG_VFIO_DEVICE_CDEV",
        )
    if Unknown.IN_USE in told:
        yield Reason(
            ReasonCode.IN_USE,
            one.id,
            f"{name(one)} is in use" + _detail(told[Unknown.IN_USE]),
            "take it away from whoever has it open",
        )
    if Unknown.NO_PERMISSION in told:
        yield Reason(
            ReasonCode.NO_PERMISSION,
            one.id,
            f"{name(one)} may not be opened" + _detail(told[Unknown.NO_PERMISSION]),
            "let migrd open it (group and mode of the device node)",
        )
    if one.is_behind_iommu and Unknown.NO_IOMMU in told:
        yield Reason(
            ReasonCode.NO_IOMMU,
            one.id,
            f"{name(one)} is behind no IOMMU: its DMA could reach all memory of the host",
            "switch the IOMMU on in the firmware and on the kernel's command line",
        )


def _detail(told: Capability) -> str:
    return f" ({told.detail})" if told.detail else ""


def _unknowns(device: Device) -> dict[Unknown, Capability]:
    answers = (device.iommu_dirty_tracking, device.dma_logging, device.migration.can)
    return {one.reason: one for one in answers if one.reason is not None}


def _of_group(one: Traits, given: set[str], request: TrackingRequest) -> Iterator[Reason]:
    """A group is isolated from the rest of the host only as a whole."""
    device = one.vm_device.device
    others = [
        address
        for address in sorted(device.group_devices)
        if address not in given and _is_active(request.neighbours.get(address))
    ]
    if one.is_behind_iommu and others:
        more = f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
        yield Reason(
            ReasonCode.IN_GROUP_WITH_OTHERS,
            one.id,
            f"{name(one)} is in IOMMU group {device.iommu_group} together with "
            f"{', '.join(others[:_MOST_NAMED])}{more}, which the VM is not given",
            "give the VM all of the group, or unbind the others from their drivers",
        )


def _is_active(neighbour: Device | None) -> bool:
    """It may do DMA: not a bridge, and not known to be without a driver."""
    if neighbour is None:
        return True
    is_bridge = neighbour.class_code is not None and neighbour.class_code >> 16 == _BRIDGE
    return not is_bridge and neighbour.driver is not None
