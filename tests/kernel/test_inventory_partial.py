"""Reading a few devices again comes to the same as reading everything, whatever has happened."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrd.core.devices import Device
from migrd.kernel import host_scan
from migrd.kernel.host_scan import scan_again, scan_host
from migrd.kernel.probed import Answers, assemble, concerned
from migrd.kernel.sysfs import Directory, Roots
from tests.fakes.sysfs import VTD_ECAP_TRACKS, FakeHost, bdf

PF = "0000:40:00.0"
UUIDS = [f"{number:08x}-1111-2222-3333-444444444444" for number in range(3)]
ADDRESSES = [bdf(0x4100 + number) for number in range(4)] + UUIDS


def plug(host: FakeHost, address: str, how: int) -> None:
    if address in UUIDS:
        host.add_mdev(address, group=how % 3)
        return
    host.add_function(
        address,
        iommu=("dmar0", "dmar1", "dmar9", None)[how % 4],
        group=(1, 2, None)[how % 3],
        driver=("vfio-pci", None)[how % 2],
        physical_function=(PF, None)[how // 2 % 2],
        class_code=0x060400 if how % 7 == 3 else 0x020000,
    )


def change(host: FakeHost, address: str, how: int) -> None:
    """Something that may happen to this address."""
    place = host.device_path(address)
    if not place.exists():
        plug(host, address, how)
    elif how % 3 == 0:
        host.remove(address)
    elif (place / "driver").is_symlink():
        host.unbind(address)
    else:
        host.bind(address, "vfio-pci" if how % 2 else "e1000e")


def a_host(root: Path) -> FakeHost:
    host = FakeHost(root)
    host.add_vtd("dmar0", VTD_ECAP_TRACKS)
    host.add_vtd("dmar1")
    host.add_function(PF, iommu="dmar0", group=1, driver="mlx5_core")
    return host


@settings(max_examples=100, deadline=None)
@given(
    batches=st.lists(
        st.dictionaries(st.sampled_from(ADDRESSES), st.integers(0, 83), min_size=1, max_size=4),
        max_size=6,
    )
)
def test_a_partial_scan_comes_to_what_a_full_one_finds(
    tmp_path_factory: pytest.TempPathFactory, batches: list[dict[str, int]]
) -> None:
    host = a_host(tmp_path_factory.mktemp("host"))
    scan = scan_host(host.roots)
    inventory = assemble(scan, Answers())
    for batch in batches:
        for address, how in batch.items():
            change(host, address, how)
        now = scan_again(host.roots, scan, batch)
        about = concerned(batch, scan, now)
        inventory = assemble(now, Answers(), previous=inventory, changed=about)
        scan = now
        fresh = host.look()
        assert inventory == fresh
        assert list(inventory.devices) == list(fresh.devices)
        assert list(inventory.iommus) == list(fresh.iommus)


@pytest.mark.parametrize(
    "change_iommu",
    [
        lambda host: (host.sys / "class/iommu/dmar0").unlink(),
        lambda host: (host.sys / "class/iommu/dmar0/intel-iommu/ecap").write_text("0\n"),
    ],
)
def test_an_iommu_that_has_changed_is_seen_by_all_below_it(
    tmp_path: Path, change_iommu: Callable[[FakeHost], object]
) -> None:
    host = a_host(tmp_path)
    host.add_function(ADDRESSES[0], iommu="dmar0", group=5)
    scan = scan_host(host.roots)
    inventory = assemble(scan, Answers())
    change_iommu(host)
    now = scan_again(host.roots, scan, [PF])
    about = concerned([PF], scan, now)
    assert assemble(now, Answers(), previous=inventory, changed=about) == host.look()


def test_a_partial_scan_reads_only_the_named_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = a_host(tmp_path)
    for address in ADDRESSES[:4]:
        host.add_function(address, iommu="dmar1", group=2)
    scan = scan_host(host.roots)
    read: list[str] = []
    original = host_scan._PCI

    def counted(
        bus: Directory, address: str, roots: Roots, iommus: host_scan.Iommus
    ) -> Device | None:
        read.append(address)
        return original.read(bus, address, roots, iommus)

    monkeypatch.setattr(host_scan, "_PCI", replace(original, read=counted))
    scan_again(host.roots, scan, [ADDRESSES[2]])
    assert read == [ADDRESSES[2]]


def test_addresses_that_never_were_change_nothing(tmp_path: Path) -> None:
    host = a_host(tmp_path)
    scan = scan_host(host.roots)
    assert scan_again(host.roots, scan, ["0000:99:00.0", UUIDS[0]]) == scan
