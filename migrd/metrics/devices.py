"""Metrics of the host's IOMMUs and devices.

An answer has three values, so it is a set of states: one series for each, 1 on the one that holds.
`migrd_iommu_dirty_tracking{answer="no"} == 1` finds what cannot, and nothing that is only unknown.
Names of instances come from the hardware, so there are as many as it has; drivers are a closed set.
"""

from collections import Counter as Tally
from typing import Final

from prometheus_client import CollectorRegistry, Counter

from migrd.core.devices import Answer, DeviceKind, Inventory
from migrd.metrics.labels import OneOf
from migrd.metrics.render import Family, LabelValues, Rows

VFIO_DRIVERS: Final = (
    "vfio-pci", "hisi_acc_vfio_pci", "mlx5_vfio_pci", "nvgrace_gpu_vfio_pci", "pds_vfio_pci",
    "qat_vfio_pci", "virtio_vfio_pci", "xe_vfio_pci", "vfio_mdev",
)  # fmt: skip
NO_DRIVER: Final = "none"
MOST_IOMMUS: Final = 1024
"""More instances than any host has; the rest get no series."""

ALL_TRACK = Family(
    "migrd_host_all_iommus_track_dirty",
    "gauge",
    "Whether every IOMMU of this host can track dirty pages: 1 on the answer that holds.",
    ("answer",),
)
IOMMU_TRACKS = Family(
    "migrd_iommu_dirty_tracking",
    "gauge",
    "Whether this IOMMU instance can track dirty pages: 1 on the answer that holds.",
    ("iommu", "answer"),
)
DEVICES = Family(
    "migrd_devices",
    "gauge",
    "Devices that are, or could be, passed through, by the VFIO driver that has them.",
    ("kind", "driver"),
)


class DeviceMetrics:
    """Keeps the inventory as it was last published; a scrape shows that one."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.inventory: Inventory | None = None
        self._wrong = Counter(
            "migrd_device_estimates_wrong",
            "Times the kernel's answer about dirty tracking was not what registers had promised.",
            registry=registry,
        )

    def estimate_was_wrong(self) -> None:
        self._wrong.inc()


def device_families(inventory: Inventory | None) -> tuple[tuple[Family, Rows], ...]:
    """The series of the hardware; without an inventory, nobody has looked: no series."""
    if inventory is None:
        return ((ALL_TRACK, {}), (IOMMU_TRACKS, {}), (DEVICES, {}))
    told = {True: Answer.YES, False: Answer.NO, None: Answer.UNKNOWN}
    overall = told[inventory.all_iommus_track_dirty]
    tracks: dict[LabelValues, float] = {}
    for name in sorted(inventory.iommus)[:MOST_IOMMUS]:
        holds = inventory.iommus[name].dirty_tracking.answer
        plain = name.encode("utf-8", "replace").decode()
        tracks |= {(plain, answer.value): float(answer is holds) for answer in Answer}
    return (
        (ALL_TRACK, {(answer.value,): float(answer is overall) for answer in Answer}),
        (IOMMU_TRACKS, tracks),
        (DEVICES, _by_driver(inventory)),
    )


def _by_driver(inventory: Inventory) -> Rows:
    driver = OneOf((*VFIO_DRIVERS, NO_DRIVER))
    tally = Tally(
        (device.kind.value, driver(device.driver or NO_DRIVER))
        for device in inventory.devices.values()
    )
    passthrough = (DeviceKind.VFIO_PCI.value, "vfio-pci")  # 0 is worth a series: alerts need it
    return {key: float(tally[key]) for key in sorted({*tally, passthrough})}
