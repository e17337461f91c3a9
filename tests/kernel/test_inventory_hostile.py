"""Hosts that are not what they should be: nothing raises, nothing is lost, unknown says why."""

import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrd.core.devices import Answer, Capability, Unknown
from migrd.kernel import sysfs
from migrd.kernel.host_scan import scan_host
from migrd.kernel.probed import MAX_GROUP_SHOWN, Answers, assemble
from tests.fakes.sysfs import VTD_ECAP_TRACKS, FakeHost, bdf

NIC, VF = "0000:41:00.0", "0000:41:00.2"
TTY = "0d0d0d0d-1111-2222-3333-444444444444"


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


def assert_unknown(said: Capability, reason: Unknown) -> None:
    assert (said.answer, said.reason) == (Answer.UNKNOWN, reason)
    assert said.detail


def test_a_host_without_any_of_it_has_an_empty_inventory(tmp_path: Path) -> None:
    inventory = assemble(scan_host(sysfs.Roots.below(tmp_path)), Answers())
    assert (dict(inventory.iommus), dict(inventory.devices)) == ({}, {})
    assert inventory.kernel.iommufd.is_no
    assert inventory.all_iommus_track_dirty is None


def test_this_machines_own_sysfs_is_read_without_an_exception() -> None:
    inventory = assemble(scan_host(sysfs.Roots()), Answers())
    assert inventory.kernel.release == os.uname().release
    listed = set(os.listdir("/sys/bus/pci/devices"))
    assert set(inventory.devices) <= listed | set(_names("/sys/bus/mdev/devices"))
    assert set(inventory.iommus) == set(_names("/sys/class/iommu"))


def _names(path: str) -> list[str]:
    return os.listdir(path) if os.path.isdir(path) else []


@pytest.mark.parametrize(
    "name", ["not-a-bdf", "0000:41:00.8", "0000:41:20.0", "zz:00.0", "0000:41:00.0\n", "\udcff"]
)
def test_an_entry_that_is_no_address_is_told_and_not_taken_for_one(
    host: FakeHost, name: str
) -> None:
    host.add_function(NIC)
    (host.sys / "bus/pci/devices" / name).mkdir()
    (host.sys / "bus/mdev/devices" / name).mkdir()
    seen = host.look()
    assert list(seen.devices) == [NIC]
    assert len(seen.trouble) == 2
    assert all(line.isprintable() for line in seen.trouble)


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("/etc", "leads out of"),
        ("../../../..", "leads out of"),
        ("nowhere", "leads nowhere"),
        (VF, "symbolic links"),
    ],
)
def test_a_device_whose_link_is_bad_is_kept_with_nothing_known_of_it(
    host: FakeHost, target: str, told: str
) -> None:
    host.add_function(NIC)
    (host.sys / "bus/pci/devices" / VF).symlink_to(target)
    seen = host.look()
    device = seen.devices[VF]
    assert told in device.trouble[0]
    assert (device.driver, device.vendor_id, device.vfio_cdev) == (None, None, None)
    assert_unknown(device.iommu_dirty_tracking, Unknown.NOT_READABLE)
    assert_unknown(device.migration.can, Unknown.NOT_READABLE)
    assert seen.devices[NIC].trouble == ()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("modalias", None),
        ("modalias", b""),
        ("modalias", b"usb:v1D6Bp0002"),
        ("modalias", b"\xff"),
        ("numa_node", b"many"),
        ("numa_node", b"-2"),
        ("reset_method", b"x" * 5000),
        ("driver_override", b"\x00\x01"),
    ],
)
def test_a_device_with_a_bad_file_is_kept_with_its_trouble(
    host: FakeHost, name: str, content: bytes | None
) -> None:
    host.add_function(NIC, group=3)
    path = host.device_path(NIC) / name
    path.unlink() if content is None else path.write_bytes(content)
    device = host.look().devices[NIC]
    assert len(device.trouble) == 1
    assert device.trouble[0].startswith(name)
    assert device.iommu_group == 3


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("iommu_group", "../x/seven"),
        ("iommu_group", "../x/٣"),
        ("physfn", "../0000:zz:00.0"),
        ("driver", "/"),
        ("iommu", ".."),
    ],
)
def test_a_link_that_leads_to_no_such_thing_is_told_and_not_followed(
    host: FakeHost, name: str, target: str
) -> None:
    host.add_function(NIC)
    (host.device_path(NIC) / name).symlink_to(target)
    device = host.look().devices[NIC]
    assert len(device.trouble) == 1
    assert device.trouble[0].startswith(name)
    assert (device.iommu_group, device.physical_function, device.iommu) == (None, None, None)


def test_what_is_in_vfio_dev_but_no_vfio_device_is_told(host: FakeHost) -> None:
    host.add_function(NIC, driver="vfio-pci")
    (host.device_path(NIC) / "vfio-dev" / "../vfio-dev/evil").mkdir()
    (host.device_path(NIC) / "vfio-dev" / "vfio1").mkdir()
    device = host.look().devices[NIC]
    assert device.vfio_cdev == f"{host.dev}/vfio/devices/vfio0"
    assert len(device.trouble) == 2


def test_a_group_of_hundreds_names_a_bounded_number_of_others_and_says_so(
    host: FakeHost,
) -> None:
    for number in range(MAX_GROUP_SHOWN + 10):
        host.add_function(bdf(number), group=1)
    device = host.look().devices[bdf(5)]
    assert len(device.group_devices) == MAX_GROUP_SHOWN
    assert bdf(5) not in device.group_devices
    assert f"{MAX_GROUP_SHOWN + 9} other members" in device.trouble[0]


NAMES = ["modalias", "numa_node", "reset_method", "driver_override"]
LINKS = ["driver", "iommu", "iommu_group", "physfn", "vfio-dev"]


@settings(max_examples=150, deadline=None)
@given(
    files=st.dictionaries(st.sampled_from(NAMES + LINKS), st.binary(max_size=40), max_size=5),
    links=st.dictionaries(
        st.sampled_from(NAMES + LINKS),
        st.binary(min_size=1, max_size=40).filter(lambda name: b"\0" not in name),
        max_size=5,
    ),
    removed=st.sets(st.sampled_from(NAMES)),
)
def test_whatever_stands_in_a_devices_directory_it_is_listed_and_its_text_is_clean(
    tmp_path_factory: pytest.TempPathFactory,
    files: dict[str, bytes],
    links: dict[str, bytes],
    removed: set[str],
) -> None:
    host = FakeHost(tmp_path_factory.mktemp("host"))
    host.add_function(NIC)
    directory = host.device_path(NIC)
    for name in {*removed, *files, *links}:
        (directory / name).unlink(missing_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    for name, target in links.items():
        (directory / name).unlink(missing_ok=True)
        os.symlink(target, os.fsencode(directory / name))
    seen = host.look()
    devices = seen.devices
    if not devices:  # its own class may say that it is a bridge
        assert "modalias" in files
        return
    device = devices[NIC]
    texts = [*device.trouble, *seen.trouble, device.driver or "", device.iommu or ""]
    texts += [device.can_reset.detail, device.iommu_dirty_tracking.detail]
    assert all(text.isprintable() for text in texts)
    for name in files:
        if name in LINKS and name not in links:
            assert any(line.startswith(name) for line in device.trouble)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(min_value=0))
def test_the_order_of_directory_entries_never_matters(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    host = FakeHost(tmp_path_factory.mktemp("host"))
    host.add_vtd("dmar0", VTD_ECAP_TRACKS)
    host.add_vtd("dmar1")
    host.add_function(NIC, iommu="dmar0", group=1, driver="mlx5_core")
    for number in range(0x4101, 0x4106):
        host.add_function(
            bdf(number), iommu="dmar1", group=2, driver="vfio-pci", physical_function=NIC
        )
    host.add_mdev(TTY)
    (host.sys / "bus/pci/devices/odd").mkdir()
    (host.sys / "bus/pci/devices/even").mkdir()
    (host.device_path(NIC) / "vfio-dev").mkdir()
    for name in ("vfio7", "vfio8", "x"):
        (host.device_path(NIC) / "vfio-dev" / name).mkdir()
    in_their_order = host.look()
    chance = random.Random(seed)
    listed = sysfs.entries

    def shuffled(fd: int) -> list[str]:
        names = listed(fd)
        chance.shuffle(names)
        return names

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sysfs, "entries", shuffled)
        in_any_order = host.look()
    assert in_any_order == in_their_order
    assert list(in_any_order.devices) == list(in_their_order.devices)
    assert list(in_any_order.iommus) == list(in_their_order.iommus)
