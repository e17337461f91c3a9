"""What the direct engine needs of the kernel, made by whoever knows both (the daemon).

Adapters do not know each other: the dirty sources and the VFIO devices are migrd.kernel's, and come
in here as functions that make them from the descriptors a process handed over.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from migrd.core.memory_map import MemoryMap
from migrd.direct.offer import (
    OfferedDeviceLog,
    OfferedHwpt,
    OfferedProcess,
    OfferedRange,
    OfferedSource,
)
from migrd.engine.device_state_ports import OpenDevice
from migrd.engine.dirty_ports import DirtySource, OnLoss
from migrd.engine.harvest import Harvest


@dataclass(frozen=True)
class KernelParts:
    """Makers. The descriptors stay their owner's; all block, and raise KernelError."""

    process_source: Callable[[int, Sequence[OfferedRange], str], DirtySource]
    """(pagemap fd, ranges, name)."""
    hwpt_source: Callable[[OfferedHwpt, str], DirtySource]
    device_log_source: Callable[[OfferedDeviceLog, str], DirtySource]
    open_device: OpenDevice

    def sources(self, offered: Sequence[OfferedSource]) -> list[DirtySource]:
        """One for each, with a name of its own; none is left open where one cannot be made."""
        made: list[DirtySource] = []
        try:
            for number, one in enumerate(offered):
                made.append(self._source(one, number))
        except BaseException:
            for source in made:
                source.close()
            raise
        return made

    def harvest(self, memory: MemoryMap, offered: Sequence[OfferedSource]) -> Harvest:
        """Of all sources of a guest; one whose log is lost is begun anew. Also raises Invalid."""
        sources = self.sources(offered)
        try:
            return Harvest(memory, sources, on_loss=OnLoss.RESTART)
        except BaseException:
            for source in sources:
                source.close()
            raise

    def _source(self, offered: OfferedSource, number: int) -> DirtySource:
        match offered:
            case OfferedProcess():
                name = f"process-{number}"
                return self.process_source(offered.pagemap_fd, offered.ranges, name)
            case OfferedHwpt():
                return self.hwpt_source(offered, f"iommu-{number}")
            case OfferedDeviceLog():
                return self.device_log_source(offered, f"device-{number}")
