"""How long the decision takes: 16 devices on 8 IOMMU instances, as a start or a what-if asks it.

Two of each class on neighbouring instances: both, one or neither of IOMMU and device can track, and
some of it not known, so that the plan has parts, reasons and probes. It is pure, so its time is
processor time; the request is made once and decided on anew each time.
"""

import time
from typing import Final

from migrd.core.devices import (
    Answer,
    Capability,
    Device,
    DeviceKind,
    DeviceMigration,
    IommuInstance,
    IommuKind,
    MigrationFlag,
    Unknown,
)
from migrd.core.tracking import TrackingRequest, VmDevice, decide
from migrd.core.vfio_launch import QemuVfioFeature
from tests.bench.figures import Figure, Judge, Table, median, percentile

DEVICES: Final = 16
IOMMUS: Final = 8
DECISIONS: Final = 200
"""In each run."""
BOUND_MS: Final = 1.0
_YES, _NO = Capability.probed(True), Capability.probed(False, "caps 0x0")
_UNKNOWN = Capability.unknown(Unknown.NOT_PROBED)
_CLASSES = [(_YES, _YES), (_YES, _NO), (_NO, _YES), (_NO, _NO), (_UNKNOWN, _YES)]


def request() -> TrackingRequest:
    """The same each time."""
    instances = {
        f"dmar{n}": IommuInstance(f"dmar{n}", IommuKind.INTEL_VTD, _CLASSES[n % 5][0])
        for n in range(IOMMUS)
    }
    return TrackingRequest(
        tuple(_device(n) for n in range(DEVICES)),
        frozenset(QemuVfioFeature),
        iommus=instances,
        memory_bytes=64 << 30,
        switchover_bytes_per_s=1e9,
        downtime_limit_s=0.3,
    )


def _device(n: int) -> VmDevice:
    cap, log = _CLASSES[n % IOMMUS % 5]
    facts = Device(
        address=f"0000:{n:02x}:00.0",
        kind=DeviceKind.VFIO_PCI,
        iommu=f"dmar{n % IOMMUS}",
        iommu_dirty_tracking=cap,
        dma_logging=log,
        migration=DeviceMigration(_YES, frozenset(MigrationFlag), stop_copy_bytes=1 << 20),
        driver="vfio-pci",
        vfio_cdev=f"/dev/vfio/devices/vfio{n}",
        iommu_group=n,
    )
    return VmDevice(f"hostdev{n}", facts)


async def run(runs: int) -> Table:
    asked = request()
    plan = decide(asked)
    assert len(plan.attach_order) == DEVICES
    took_ms = []
    for _ in range(runs * DECISIONS):
        began_s = time.perf_counter()
        decide(asked)
        took_ms.append((time.perf_counter() - began_s) * 1e3)
    figure = Figure(
        f"the decision for {DEVICES} devices on {IOMMUS} IOMMU instances: median",
        "ms",
        median(took_ms),
        None,
        "",
        Judge.VALUE,
        BOUND_MS,
    )
    unknown = sum(one.device.iommu_dirty_tracking.answer is Answer.UNKNOWN for one in asked.devices)
    note = (
        f"the decision: 99 of 100 within {percentile(took_ms, 0.99):.2f} ms; {unknown} devices "
        f"unknown, {len(plan.iommufds)} iommufd objects, {len(plan.reasons)} reasons"
    )
    return Table.of("decision", runs, [figure], [note])
