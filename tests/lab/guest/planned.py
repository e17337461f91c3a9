"""What migrd plans for devices of a guest, and a nested QEMU that is told exactly that.

facts   HostInventory.rescan + KernelPassthrough.probe, as in the daemon
plan    core.tracking.decide
QEMU    core.vfio_launch.arguments of the plan, with descriptors opened here
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from migrd.core.devices import Capability
from migrd.core.tracking import Plan, TrackingPolicy, TrackingRequest, VmDevice, decide
from migrd.core.vfio_launch import GivenBy, QemuVfioFeature, VfioLaunch, arguments
from migrd.kernel.inventory import HostInventory
from migrd.kernel.passthrough import KernelPassthrough
from tests.lab.guest.nested import IOMMU_ONLY, Nested, nested
from tests.lab.guest.raw import Iommufd

QEMU_10 = frozenset(QemuVfioFeature)


async def plan_for(
    devices: Mapping[str, str],
    *,
    without_log: Sequence[str] = (),
    policy: TrackingPolicy = TrackingPolicy.AUTO,
) -> Plan:
    """Decide for devices (QEMU id -> address), as found on this kernel.

    mtty's log is a stub that QEMU and migrd cannot know for one; for those in `without_log` the
    kernel is taken to have said that there is none.
    """
    inventory, passthrough = HostInventory(), KernelPassthrough()
    try:
        found = await inventory.rescan()
        for address in devices.values():
            device = await passthrough.probe(found.devices[address])
            found = inventory.note_probed(device)
    finally:
        passthrough.close()
    facts = {id_: found.devices[address] for id_, address in devices.items()}
    for id_ in without_log:
        none = Capability.probed(False, "told so by the test")
        facts[id_] = replace(facts[id_], dma_logging=none)
    return decide(
        TrackingRequest(
            devices=tuple(VmDevice(id_, device) for id_, device in facts.items()),
            qemu=QEMU_10,
            policy=policy,
            iommus=found.iommus,
            kernel=found.kernel,
            neighbours=found.devices,
        )
    )


@contextlib.asynccontextmanager
async def launched(
    directory: Path,
    plan: Plan,
    nodes: Mapping[str, Path],
    *,
    without_log: Sequence[str] = (),
    name: str = "qemu",
    incoming: bool = False,
) -> AsyncIterator[Nested]:
    """Start QEMU as `plan` says. `nodes`: the cdev of each device, by address."""
    assert plan.launch is not None, [reason.message for reason in plan.refused]
    told = _with_logs_off(plan.launch, without_log)
    with contextlib.ExitStack() as held:
        iommufds = {id_: Iommufd() for id_ in told.iommufds}
        for iommufd in iommufds.values():
            held.callback(iommufd.close)
        fds = {}
        for device in told.devices:
            if device.given_by is GivenBy.FD:
                fds[device.address] = os.open(nodes[device.address], os.O_RDWR | os.O_CLOEXEC)
                held.callback(os.close, fds[device.address])
        given = [iommufd.fd for iommufd in iommufds.values()]
        async with nested(
            directory,
            name=name,
            incoming=incoming,
            arguments=tuple(arguments(told, given, fds)),
            inherited=(*given, *fds.values()),
        ) as qemu:
            qemu.iommufds.update(iommufds)
            yield qemu


def _with_logs_off(launch: VfioLaunch, without_log: Sequence[str]) -> VfioLaunch:
    name, _, value = IOMMU_ONLY.partition("=")
    return replace(
        launch,
        devices=tuple(
            replace(device, properties={**device.properties, name: value})
            if device.id in without_log
            else device
            for device in launch.devices
        ),
    )
