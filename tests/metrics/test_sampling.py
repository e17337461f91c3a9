"""Measured dirty rates as series: the last one of each VM with its time, gone with the VM."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from migrd.core.rate_reading import Tracker
from migrd.engine.rate_views import RateSeen
from migrd.metrics import Exposition, Metrics
from tests.metrics.views import Host, migration_view, vm_facts, vm_view

AT_S = 1_795_000_000.0


def seen(outcome: str = "ok", rate: float | None = 8192.0, vm: str = "web") -> RateSeen:
    pages = 5.0 if outcome == "ok" else 0.0
    return RateSeen(vm, Tracker.QEMU, outcome, rate, pages, 0.002, AT_S)


async def series(metrics: Metrics, host: Host) -> dict[tuple[str, ...], float]:
    """(name, label values by label name) -> value."""
    body = (await Exposition(metrics, host).refresh()).body.decode()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body)
        for sample in family.samples
    }


def host() -> Host:
    return Host(known=[vm_view("web", vm_facts())])


async def test_the_last_rate_shows_with_the_time_it_was_measured_at() -> None:
    metrics = Metrics()
    metrics.rate_sampled(seen(rate=1.0))
    metrics.rate_sampled(seen())
    found = await series(metrics, host())
    assert found["migrd_vm_dirty_bytes_per_second", "qemu", "web"] == 8192
    assert found["migrd_vm_dirty_rate_sampled_timestamp_seconds", "qemu", "web"] == AT_S
    assert found["migrd_vm_dirty_pages_total", "qemu", "web"] == 10
    assert found["migrd_dirty_rate_samples_total", "ok", "qemu"] == 2
    assert found["migrd_dirty_rate_sampling_cpu_seconds_total", "qemu"] == 0.004


async def test_a_failure_counts_and_leaves_the_last_rate_with_its_age() -> None:
    metrics = Metrics()
    metrics.rate_sampled(seen())
    metrics.rate_sampled(seen("failed", None))
    metrics.rate_sampled(seen("of a new kind", None))
    found = await series(metrics, host())
    assert found["migrd_vm_dirty_bytes_per_second", "qemu", "web"] == 8192
    assert found["migrd_dirty_rate_samples_total", "failed", "qemu"] == 1
    assert found["migrd_dirty_rate_samples_total", "other", "qemu"] == 1


async def test_a_migration_tells_better_what_its_vm_writes() -> None:
    metrics, moving = Metrics(), host()
    metrics.rate_sampled(seen(rate=1.0))
    moving.moving = [migration_view("web", dirty_bytes_per_s=77.0)]
    found = await series(metrics, moving)
    assert found["migrd_vm_dirty_bytes_per_second", "qemu", "web"] == 77


async def test_the_series_end_with_the_measuring_and_with_the_vm() -> None:
    metrics = Metrics()
    metrics.rate_sampled(seen())
    metrics.rate_sampled(seen(vm="gone"))
    assert not [key for key in await series(metrics, host()) if "gone" in key]
    metrics.rates_ended("web")
    names = {key[0] for key in await series(metrics, host()) if "qemu" in key and "web" in key}
    assert names <= {"migrd_vm_dirty_pages_total"}


async def test_a_sample_alone_makes_no_new_rendering() -> None:
    """Two hundred VMs are measured all the time."""
    metrics = Metrics()
    before = metrics.changes
    metrics.rate_sampled(seen())
    assert metrics.changes == before
