"""What is different between two snapshots of the host's hardware. Pure, and for a worker thread:
thousands of devices are compared and judged here.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from migrd.core.devices import Device, Inventory, IommuInstance
from migrd.engine.device_verdict import judge
from migrd.engine.service import DeviceVerdict

_AT_A_TIME: Final = 50
"""So many devices are judged before other threads get the interpreter."""

Body = Mapping[str, object]


@dataclass(frozen=True)
class Changes:
    """The new snapshot, and what of it is new."""

    inventory: Inventory
    verdicts: Mapping[str, DeviceVerdict]
    """Of every device."""
    added: Sequence[str]
    removed: Sequence[str]
    changed: Sequence[str]
    iommus: Sequence[Body]
    """Bodies of `iommu.changed`."""
    is_host_changed: bool
    """The one boolean, or what the kernel offers."""

    @property
    def is_empty(self) -> bool:
        return not (self.device_count or self.iommus or self.is_host_changed)

    @property
    def device_count(self) -> int:
        return len(self.added) + len(self.removed) + len(self.changed)

    @property
    def touched(self) -> Sequence[str]:
        """The devices that are there and not as they were."""
        return (*self.added, *self.changed)

    def device_bodies(self) -> list[Body]:
        """Bodies of `device.changed`."""
        words = (("removed", self.removed), ("added", self.added), ("changed", self.changed))
        return [self._body(address, word) for word, several in words for address in several]

    def counts(self) -> Body:
        """The body of one `device.changed` for all of them."""
        return {
            "address": None,
            "change": "many",
            "added": len(self.added),
            "removed": len(self.removed),
            "changed": len(self.changed),
        }

    def _body(self, address: str, word: str) -> Body:
        device, verdict = self.inventory.devices.get(address), self.verdicts.get(address)
        return {
            "address": _plain(address),
            "change": word,
            "driver": None if device is None or device.driver is None else _plain(device.driver),
            "migratability": None if verdict is None else verdict.migratability.value,
        }


def compare(old: Inventory, old_verdicts: Mapping[str, DeviceVerdict], new: Inventory) -> Changes:
    """Judge what is new and say what is different. Blocking for up to a second."""
    verdicts = _judged(old, old_verdicts, new)
    return Changes(
        inventory=new,
        verdicts=verdicts,
        added=sorted(new.devices.keys() - old_verdicts.keys()),
        removed=sorted(old_verdicts.keys() - new.devices.keys()),
        changed=sorted(
            address
            for address, device in new.devices.items()
            if address in old_verdicts
            and not (
                _same(device, old.devices.get(address))
                and verdicts[address] == old_verdicts[address]
            )
        ),
        iommus=[_iommu_body(*altered) for altered in _altered_iommus(old, new)],
        is_host_changed=old.all_iommus_track_dirty != new.all_iommus_track_dirty
        or old.kernel != new.kernel,
    )


def _judged(
    old: Inventory, old_verdicts: Mapping[str, DeviceVerdict], new: Inventory
) -> dict[str, DeviceVerdict]:
    """Only what has changed is judged anew."""
    verdicts: dict[str, DeviceVerdict] = {}
    is_kernel_same = old.kernel == new.kernel
    altered = {name for name, _, _ in _altered_iommus(old, new)}
    for number, (address, device) in enumerate(new.devices.items(), start=1):
        known = old_verdicts.get(address)
        is_ground_same = is_kernel_same and device.iommu not in altered
        if known and is_ground_same and _same(device, old.devices.get(address)):
            verdicts[address] = known
            continue
        verdicts[address] = judge(device, new)
        if number % _AT_A_TIME == 0:
            time.sleep(0)
    return verdicts


def _same(device: Device, before: Device | None) -> bool:
    return device is before or device == before


def _plain(name: str) -> str:
    """Names in sysfs are bytes, and an event is UTF-8."""
    return name.encode("utf-8", "replace").decode()


def _altered_iommus(
    old: Inventory, new: Inventory
) -> list[tuple[str, IommuInstance | None, IommuInstance | None]]:
    """(name, before, after); that devices came or went below one is no change of its own."""
    pairs = [
        (name, old.iommus.get(name), new.iommus.get(name))
        for name in sorted(old.iommus.keys() | new.iommus.keys())
    ]
    return [
        (name, before, after)
        for name, before, after in pairs
        if before is None or after is None or replace(before, devices=after.devices) != after
    ]


def _iommu_body(name: str, before: IommuInstance | None, after: IommuInstance | None) -> Body:
    word = "added" if before is None else "removed" if after is None else "changed"
    told = None if after is None else after.dirty_tracking.answer.value
    return {"iommu": _plain(name), "change": word, "dirty_tracking": told}
