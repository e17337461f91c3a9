"""The hardware as Prometheus sees it."""

from dataclasses import replace

from prometheus_client.parser import text_string_to_metric_families

from migrd.core.devices import Inventory
from migrd.metrics import Exposition, Metrics
from tests.fakes.inventory import CAN, CANNOT, NOT_KNOWN, inventory, mixed_host, pci
from tests.metrics.views import Host

Series = dict[str, dict[tuple[str, ...], float]]


async def exposed(seen: Inventory | None) -> Series:
    """Name -> (label values, by label name) -> value."""
    metrics = Metrics()
    if seen is not None:
        metrics.inventory_seen(seen)
    body = (await Exposition(metrics, Host()).refresh()).body.decode()
    return {
        sample.name: {
            tuple(dict(sorted(s.labels.items())).values()): s.value for s in family.samples
        }
        for family in text_string_to_metric_families(body)
        for sample in family.samples
        if "iommu" in sample.name or "device" in sample.name
    }


async def test_each_answer_of_an_instance_has_a_series_and_one_holds() -> None:
    seen = await exposed(inventory([CAN, CANNOT, NOT_KNOWN]))
    tracks = seen["migrd_iommu_dirty_tracking"]
    assert {key for key, value in tracks.items() if value == 1} == {
        ("yes", CAN.name),
        ("no", CANNOT.name),
        ("unknown", NOT_KNOWN.name),
    }
    assert len(tracks) == 9
    assert seen["migrd_host_all_iommus_track_dirty"] == {
        ("yes",): 0, ("no",): 1, ("unknown",): 0
    }  # fmt: skip


async def test_a_host_without_an_iommu_is_unknown_and_one_that_is_not_read_has_no_series() -> None:
    seen = await exposed(inventory([]))
    assert seen["migrd_host_all_iommus_track_dirty"][("unknown",)] == 1
    assert "migrd_iommu_dirty_tracking" not in seen
    assert set(await exposed(None)) == {"migrd_device_estimates_wrong_total"}


async def test_devices_are_counted_by_the_vfio_driver_that_has_them() -> None:
    counts = (await exposed(mixed_host()))["migrd_devices"]
    assert counts == {
        ("mlx5_vfio_pci", "vfio_pci"): 2,
        ("vfio-pci", "vfio_pci"): 1,
        ("other", "vfio_pci"): 2,
        ("other", "vfio_mdev"): 1,
    }
    assert (await exposed(inventory([])))["migrd_devices"] == {("vfio-pci", "vfio_pci"): 0}


async def test_drivers_from_outside_add_no_series_and_odd_names_do_no_harm() -> None:
    odd = [pci(f"0000:00:{n:02x}.0", driver=f'driver-{n}"\n\udcff') for n in range(30)]
    strange = replace(CAN, name='dmar\udcff"\n')
    seen = await exposed(inventory([strange], [*odd, pci("0000:01:00.0", driver=None)]))
    assert seen["migrd_devices"] == {
        ("other", "vfio_pci"): 30, ("none", "vfio_pci"): 1, ("vfio-pci", "vfio_pci"): 0
    }  # fmt: skip
    assert ("yes", 'dmar?"\n') in seen["migrd_iommu_dirty_tracking"]


async def test_a_new_inventory_is_a_change_worth_a_rendering() -> None:
    metrics = Metrics()
    before = metrics.changes
    metrics.inventory_seen(mixed_host())
    metrics.estimate_was_wrong()
    assert metrics.changes == before + 2
