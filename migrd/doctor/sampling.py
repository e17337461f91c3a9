"""Dirty rates outside of migrations: whether what is configured can be measured."""

from pathlib import Path
from typing import Final

from migrd.config import QemuSampling, Settings
from migrd.core.working_set import LEAST_RATIO
from migrd.doctor.finding import Check, Finding, ok, warn

NAME: Final = "dirty rates"


def checks(settings: Settings) -> list[Check]:
    return [Check(NAME, blocking=lambda: look_at_sampling(settings))]


def look_at_sampling(settings: Settings, kvm: Path = Path("/dev/kvm")) -> Finding:
    """Blocking."""
    sampling = settings.sampling
    if sampling.qemu_mode is QemuSampling.OFF:
        return ok(NAME, "not measured outside of migrations (sampling.qemu_mode is off)")
    if sampling.qemu_mode is QemuSampling.DIRTY_BITMAP and not kvm.exists():
        message = f"{kvm} is not there: no guest of this host can be measured by dirty-bitmap"
        return warn(NAME, message, 'set sampling.qemu_mode to "page-sampling"')
    if max(sampling.windows_ms) < LEAST_RATIO * min(sampling.windows_ms):
        message = "windows of one length tell no working set"
        return warn(NAME, message, "set sampling.windows_ms to [250, 1000, 4000]")
    how = (
        f"{sampling.qemu_mode.value} every {sampling.interval_s:g} s, "
        f"at most {sampling.budget_percent:g} % of a core"
    )
    return ok(NAME, how)
