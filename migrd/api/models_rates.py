"""Wire models of what a VM's devices write."""

from typing import Self

from migrd.api.wire import At, WireModel, at, exact_ms
from migrd.core import dma_rate
from migrd.core.dma_rate import RateQuality


class DmaRate(WireModel):
    """The last sample of one page table: what its devices write, by looks that change nothing."""

    devices: tuple[str, ...]
    """QEMU ids of the devices whose writes it shows, together. Empty: not known."""
    iommufd: int
    """Which of the VM's iommufd objects."""
    hwpt_id: int
    """The page table's id on it."""
    quality: RateQuality
    """measured; else why there is no rate: unproven (nothing was dirty, and outside a migration
    QEMU does not track), saturated (hardly a page was clean), cleared (QEMU's own dirty sync fell
    into the window), nothing_mapped."""
    dirty_bytes_per_s: float | None
    low_bytes_per_s: float | None
    """Lower end of the 95 % interval."""
    high_bytes_per_s: float | None
    amplification: float | None
    """At most so many times too much is counted, because the IOMMU marks whole page-table entries;
    null: nothing was dirty, or not known."""
    page_size_bytes: int
    window_ms: float
    """Between the two looks."""
    sampled_bytes: int
    """Looked at."""
    total_bytes: int
    """Mapped for the devices, as far as it is known."""
    sampled_at: At

    @classmethod
    def of(cls, sampled: dma_rate.SampledRate) -> Self:
        rate = sampled.rate
        return cls(
            devices=sampled.devices,
            iommufd=sampled.iommufd,
            hwpt_id=sampled.hwpt_id,
            quality=rate.quality,
            dirty_bytes_per_s=rate.dirty_bytes_per_s,
            low_bytes_per_s=_in_bytes(rate.low_pages_per_s, rate.page_size_bytes),
            high_bytes_per_s=_in_bytes(rate.high_pages_per_s, rate.page_size_bytes),
            amplification=rate.amplification,
            page_size_bytes=rate.page_size_bytes,
            window_ms=exact_ms(rate.window_s),
            sampled_bytes=rate.sampled_bytes,
            total_bytes=rate.total_bytes,
            sampled_at=at(sampled.wall_s),
        )


def _in_bytes(pages_per_s: float | None, page_size_bytes: int) -> float | None:
    return None if pages_per_s is None else pages_per_s * page_size_bytes
