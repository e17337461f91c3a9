"""Hosts with passthrough hardware, for the tests of what is decided about it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from migrd.core.devices import Capability, Device, Inventory, IommuInstance
from migrd.core.facts import SpecDevice, VmSpec
from migrd.core.tracking import TrackingPolicy
from migrd.errors import Refused
from tests.fakes.inventory import CAN, CANNOT, LIVE, NEVER, inventory, pci
from tests.fakes.world import VM, Pair

NIC, NIC2, DISK, GPU = "0000:41:00.1", "0000:41:00.2", "0000:81:00.0", "0000:c1:00.0"


def nic(address: str = NIC, iommu: IommuInstance = CAN, **facts: object) -> Device:
    """It can be migrated, and its IOMMU tracks its DMA."""
    number = int(address[-1])
    known: dict[str, object] = {
        "iommu_group": 40 + number + int(address[5:7], 16),
        "vfio_cdev": f"/dev/vfio/devices/vfio{number}",
        "dma_logging": Capability.probed(False, "ENOTTY"),
        "migration": LIVE,
    }
    return pci(address, iommu, **{**known, **facts})


def untracked(address: str = DISK, **facts: object) -> Device:
    """It could be migrated, but nothing tracks its DMA."""
    return nic(address, CANNOT, **{"iommu_group": 81, **facts})


def immovable(address: str = DISK, **facts: object) -> Device:
    """Its driver cannot migrate it."""
    return nic(address, CAN, **{"iommu_group": 82, "migration": NEVER, **facts})


def hardware(*devices: Device) -> Inventory:
    return inventory((CAN, CANNOT), devices)


@asynccontextmanager
async def hosts(
    alpha: Inventory, beta: Inventory | None = None, **options: Any
) -> AsyncIterator[Pair]:
    """Two hosts with this hardware (beta: the same, unless told otherwise)."""
    pair = Pair(**options)
    pair.hardware["alpha"].show(alpha)
    pair.hardware["beta"].show(alpha if beta is None else beta)
    async with pair:
        yield pair


def spec_of(*addresses: str, policy: TrackingPolicy | None = None, name: str = VM) -> VmSpec:
    devices = tuple(
        SpecDevice(f"hostdev{n}", address, "pcie.0", f"{5 + n:02x}.0")
        for n, address in enumerate(addresses)
    )
    return VmSpec(name, "tiny", devices=devices, tracking_policy=policy)


async def start(
    pair: Pair, *addresses: str, policy: TrackingPolicy | None = None, name: str = VM
) -> None:
    """Define and start, on alpha."""
    service = pair.alpha.service
    await service.define_vm(spec_of(*addresses, policy=policy, name=name), dry_run=False)
    await service.start_vm(name)


async def stop(pair: Pair, name: str = VM, *, on: str = "alpha") -> None:
    """By the wish of its owner: what ends then is no loss."""
    await pair.daemons[on].service.stop_vm(name)
    guest = pair.guest(name)
    guest.violations[:] = [said for said in guest.violations if not said.startswith("I2")]


def told(refused: Refused) -> list[tuple[str, str]]:
    """(field, code) of everything that was in the way."""
    return [(violation.field, violation.code) for violation in refused.violations]


def untouched(pair: Pair, on: str = "alpha") -> bool:
    """No QEMU of the VM, nothing open."""
    return not pair.hosts[on].living(VM) and not pair.hardware[on].opened


def kinds(pair: Pair, kind: str, on: str = "alpha") -> list[dict[str, Any]]:
    """Bodies of the events of a kind."""
    history = pair.daemons[on].engine._world.stream._history
    return [dict(event.body) for event in history if event.kind == kind]


def with_kernel(truth: Inventory, **facts: Any) -> Inventory:
    return replace(truth, kernel=replace(truth.kernel, **facts))
