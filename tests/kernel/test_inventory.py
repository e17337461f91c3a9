"""What the inventory says of a host: its PCI functions, mdevs, IOMMUs and kernel."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from migrd.core.devices import Answer, Capability, DeviceKind, Evidence, IommuKind, Unknown
from migrd.engine.device_ports import DeviceInventory
from migrd.kernel.inventory import HostInventory
from tests.fakes.sysfs import (
    AMD_EFR_TRACKS,
    VTD_ECAP_TRACKS,
    FakeHost,
    bdf,
)

NIC, VF, BRIDGE = "0000:41:00.0", "0000:41:00.2", "0000:40:01.0"
TTY = "0d0d0d0d-1111-2222-3333-444444444444"


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


def fulfils_the_port(inventory: HostInventory) -> DeviceInventory:
    """For the type checker: the port's own words."""
    return inventory


def assert_unknown(said: Capability, reason: Unknown) -> None:
    assert (said.answer, said.reason) == (Answer.UNKNOWN, reason)
    assert said.detail


# PCI functions ------------------------------------------------------------------------------------


def test_a_function_bound_to_vfio_has_all_its_facts(host: FakeHost) -> None:
    host.add_vtd("dmar0", VTD_ECAP_TRACKS)
    host.add_function(NIC, iommu="dmar0", group=7, driver="vfio-pci", numa_node=1)
    seen = host.look()
    device = seen.devices[NIC]
    assert device.kind is DeviceKind.VFIO_PCI
    assert (device.vendor_id, device.device_id, device.class_code) == (0x8086, 0x10D3, 0x020000)
    assert (device.driver, device.driver_override) == ("vfio-pci", None)
    assert (device.iommu, device.iommu_group, device.group_devices) == ("dmar0", 7, ())
    assert device.numa_node == 1
    assert device.vfio_cdev == f"{host.dev}/vfio/devices/vfio0"
    assert Path(device.vfio_cdev).exists()
    assert device.iommu_dirty_tracking == seen.iommus["dmar0"].dirty_tracking
    assert_unknown(device.dma_logging, Unknown.NOT_PROBED)
    assert_unknown(device.migration.can, Unknown.NOT_PROBED)
    assert device.can_reset.is_yes
    assert "flr bus" in device.can_reset.detail
    assert device.trouble == ()
    assert seen.trouble == ()


def test_a_function_of_the_host_is_there_and_says_which_driver_has_it(host: FakeHost) -> None:
    host.add_function(NIC, driver="e1000e")
    device = host.look().devices[NIC]
    assert (device.driver, device.vfio_cdev) == ("e1000e", None)
    assert_unknown(device.migration.can, Unknown.DRIVER_NOT_BOUND)
    assert "e1000e" in device.migration.can.detail
    assert_unknown(device.iommu_dirty_tracking, Unknown.NO_IOMMU)


def test_a_function_without_a_driver_says_which_it_waits_for(host: FakeHost) -> None:
    host.add_function(NIC)
    assert host.look().devices[NIC].driver_override is None
    (host.device_path(NIC) / "driver_override").write_text("vfio-pci\n")
    device = host.look().devices[NIC]
    assert (device.driver, device.driver_override) == (None, "vfio-pci")
    assert_unknown(device.dma_logging, Unknown.DRIVER_NOT_BOUND)


def test_virtual_functions_and_their_physical_function_know_each_other(host: FakeHost) -> None:
    host.add_function(NIC, driver="mlx5_core", group=1)
    vfs = [bdf(number) for number in (0x4101, 0x4102, 0x4103)]
    for number, address in enumerate(vfs):
        host.add_function(address, driver="mlx5_vfio_pci", physical_function=NIC, group=number + 2)
    devices = host.look().devices
    assert devices[NIC].virtual_functions == tuple(vfs)
    assert [devices[address].physical_function for address in vfs] == [NIC] * 3
    assert all(devices[address].virtual_functions == () for address in vfs)


def test_members_of_a_group_name_the_others_but_not_bridges(host: FakeHost) -> None:
    host.add_function(BRIDGE, group=7, class_code=0x060400, driver="pcieport")
    host.add_function(NIC, group=7)
    host.add_function(VF, group=7)
    host.add_function("0000:42:00.0", group=8)
    devices = host.look().devices
    assert BRIDGE not in devices
    assert devices[NIC].group_devices == (VF,)
    assert devices[VF].group_devices == (NIC,)
    assert devices["0000:42:00.0"].group_devices == ()


@pytest.mark.parametrize(
    ("class_code", "driver", "shown"),
    [
        (0x060000, None, False),
        (0x060400, "pcieport", False),
        (0x080600, None, False),
        (0x068000, "vfio-pci", True),
        (0x080500, None, True),
        (0x030000, "nvidia", True),
        (0xFF0000, None, True),
    ],
)
def test_what_could_be_passed_through_is_shown_and_the_hosts_own_parts_are_not(
    host: FakeHost, class_code: int, driver: str | None, shown: bool
) -> None:
    host.add_function(NIC, class_code=class_code, driver=driver)
    assert (NIC in host.look().devices) is shown


@pytest.mark.parametrize(
    ("files", "answer"),
    [
        ({"reset_method": "flr\n"}, Answer.YES),
        ({"reset_method": "\n"}, Answer.NO),
        ({"reset": ""}, Answer.YES),
        ({}, Answer.NO),
        ({"reset_method": "\xff"}, Answer.YES),
    ],
)
def test_reset_is_told_by_its_methods_or_on_old_kernels_by_its_file(
    host: FakeHost, files: dict[str, str], answer: Answer
) -> None:
    host.add_function(NIC)
    (host.device_path(NIC) / "reset_method").unlink()
    for name, text in files.items():
        (host.device_path(NIC) / name).write_text(text)
    assert host.look().devices[NIC].can_reset.answer is answer


def test_a_reset_method_that_cannot_be_read_leaves_reset_unknown(host: FakeHost) -> None:
    host.add_function(NIC)
    (host.device_path(NIC) / "reset_method").write_bytes(b"\xff")
    device = host.look().devices[NIC]
    assert_unknown(device.can_reset, Unknown.NOT_READABLE)
    assert device.trouble == ("reset_method: is not text",)


def test_addresses_of_a_large_domain_are_addresses(host: FakeHost) -> None:
    host.add_function("10000:e1:00.0")
    assert list(host.look().devices) == ["10000:e1:00.0"]


def test_a_numa_node_of_minus_one_is_none(host: FakeHost) -> None:
    host.add_function(NIC, numa_node=-1)
    device = host.look().devices[NIC]
    assert (device.numa_node, device.trouble) == (None, ())


def test_a_kernel_without_character_devices_shows_none(host: FakeHost) -> None:
    host.add_function(NIC, driver="vfio-pci")
    (host.device_path(NIC) / "vfio-dev" / "vfio0" / "dev").unlink()
    device = host.look().devices[NIC]
    assert device.vfio_cdev is None
    assert_unknown(device.migration.can, Unknown.NOT_PROBED)


# mdevs --------------------------------------------------------------------------------------------


def test_an_mdev_has_its_parent_type_and_character_device_and_no_iommu_sees_it(
    host: FakeHost,
) -> None:
    host.add_mdev(TTY, group=3)
    device = host.look().devices[TTY]
    assert device.kind is DeviceKind.VFIO_MDEV
    assert (device.mdev_parent, device.mdev_type, device.driver) == ("mtty", "mtty-2", "mtty")
    assert device.vfio_cdev == f"{host.dev}/vfio/devices/vfio0"
    assert device.iommu is None
    assert device.iommu_group == 3
    assert device.iommu_dirty_tracking.is_no
    assert device.iommu_dirty_tracking.evidence is Evidence.ESTIMATED
    assert_unknown(device.migration.can, Unknown.NOT_PROBED)
    assert device.trouble == ()


def test_an_mdev_behind_an_iommu_is_judged_by_it(host: FakeHost) -> None:
    host.add_vtd("dmar0", VTD_ECAP_TRACKS)
    host.add_mdev(TTY)
    host.link(host.device_path(TTY) / "iommu", host.sys / "devices/virtual/iommu/dmar0")
    seen = host.look()
    assert seen.devices[TTY].iommu_dirty_tracking.is_yes
    assert seen.iommus["dmar0"].devices == (TTY,)


# IOMMUs -------------------------------------------------------------------------------------------


def test_each_kind_of_iommu_is_known_with_its_registers_and_estimate(host: FakeHost) -> None:
    host.add_vtd("dmar0", VTD_ECAP_TRACKS, cap=0xD2008C222F0606)
    host.add_vtd("dmar1")
    host.add_amd("ivhd0", f"{AMD_EFR_TRACKS:x}:10")
    host.add_amd("ivhd1", "29d3")
    host.add_iommu("smmu3.0x0000000009050000")
    host.add_iommu("0000:00:02.0", driver="virtio_iommu")
    host.add_iommu("riscv-iommu@1")
    iommus = host.look().iommus
    assert {name: one.kind for name, one in iommus.items()} == {
        "dmar0": IommuKind.INTEL_VTD,
        "dmar1": IommuKind.INTEL_VTD,
        "ivhd0": IommuKind.AMD_VI,
        "ivhd1": IommuKind.AMD_VI,
        "smmu3.0x0000000009050000": IommuKind.ARM_SMMU_V3,
        "0000:00:02.0": IommuKind.VIRTIO,
        "riscv-iommu@1": IommuKind.OTHER,
    }
    assert iommus["dmar0"].registers == {
        "version": 0x10,
        "cap": 0xD2008C222F0606,
        "ecap": VTD_ECAP_TRACKS,
    }
    assert iommus["ivhd0"].registers["features2"] == 0x10
    yes = [name for name, one in iommus.items() if one.dirty_tracking.is_yes]
    no = [name for name, one in iommus.items() if one.dirty_tracking.is_no]
    assert (yes, no) == (["dmar0", "ivhd0"], ["dmar1", "ivhd1"])


def test_an_instance_names_what_is_behind_it(host: FakeHost) -> None:
    host.add_vtd("dmar0")
    host.add_vtd("dmar1")
    host.add_function(VF, iommu="dmar1")
    host.add_function(NIC, iommu="dmar1")
    iommus = host.look().iommus
    assert (iommus["dmar0"].devices, iommus["dmar1"].devices) == ((), (NIC, VF))


@pytest.mark.parametrize(
    ("ecaps", "all_track"),
    [
        ((), None),
        ((VTD_ECAP_TRACKS, VTD_ECAP_TRACKS), True),
        ((VTD_ECAP_TRACKS, 0), False),
        ((VTD_ECAP_TRACKS, None), None),
        ((0, None), False),
    ],
)
def test_whether_all_iommus_track_is_one_answer_and_unknown_is_not_no(
    host: FakeHost, ecaps: tuple[int | None, ...], all_track: bool | None
) -> None:
    for number, ecap in enumerate(ecaps):
        if ecap is None:
            host.add_iommu(f"smmu3.{number:#x}")
        else:
            host.add_vtd(f"dmar{number}", ecap)
    assert host.look().all_iommus_track_dirty is all_track


def test_scalable_mode_switched_off_on_the_command_line_is_an_estimate_of_no(
    host: FakeHost,
) -> None:
    host.add_vtd("dmar0", VTD_ECAP_TRACKS)
    host.write(host.proc / "cmdline", "quiet intel_iommu=on,sm_off\n")
    assert host.look().iommus["dmar0"].dirty_tracking.is_no


@pytest.mark.parametrize(
    "break_it",
    [
        lambda path: (path / "intel-iommu" / "ecap").unlink(),
        lambda path: (path / "intel-iommu" / "ecap").write_text(""),
        lambda path: (path / "intel-iommu" / "ecap").write_text("0xyz"),
        lambda path: (path / "intel-iommu" / "ecap").write_bytes(b"\xff" * 10_000),
        lambda path: (path / "intel-iommu").rename(path / "elsewhere"),
    ],
)
def test_a_register_that_cannot_be_read_makes_the_instance_unknown(
    host: FakeHost, break_it: Callable[[Path], object]
) -> None:
    path = host.add_vtd("dmar0", VTD_ECAP_TRACKS)
    host.add_function(NIC, iommu="dmar0")
    break_it(path)
    seen = host.look()
    assert_unknown(seen.iommus["dmar0"].dirty_tracking, Unknown.NOT_READABLE)
    assert_unknown(seen.devices[NIC].iommu_dirty_tracking, Unknown.NOT_READABLE)


def test_a_device_behind_an_iommu_that_the_class_does_not_have_is_unknown(
    host: FakeHost,
) -> None:
    host.add_function(NIC, iommu="dmar9")
    device = host.look().devices[NIC]
    assert device.iommu == "dmar9"
    assert_unknown(device.iommu_dirty_tracking, Unknown.NO_IOMMU)
    assert "dmar9" in device.iommu_dirty_tracking.detail


# The kernel ---------------------------------------------------------------------------------------


def test_what_the_kernel_offers_is_told(host: FakeHost) -> None:
    host.write(host.sys / "module/iommufd/parameters/allow_unsafe_interrupts", "Y\n")
    kernel = host.look().kernel
    assert kernel.release == "6.12.117"
    assert kernel.iommufd.is_yes
    assert kernel.vfio_cdev.is_yes
    assert kernel.unsafe_interrupts is True


def test_a_kernel_without_iommufd_is_told_with_the_cure(tmp_path: Path) -> None:
    said = FakeHost(tmp_path, iommufd=False).look().kernel.iommufd
    assert said.is_no
    assert "CONFIG_IOMMUFD" in said.detail


def test_no_permission_is_unknown_with_that_reason(host: FakeHost) -> None:
    (host.dev / "iommu").chmod(0o000)
    was = os.geteuid()
    if was == 0:  # root may open it all the same
        for path in (host.root, *host.root.parents):
            if path.stat().st_mode & 0o077 == 0:
                path.chmod(0o755)
        os.seteuid(65534)
    try:
        said = host.look().kernel.iommufd
    finally:
        os.seteuid(was)
    assert_unknown(said, Unknown.NO_PERMISSION)


def test_before_a_vfio_driver_is_loaded_character_devices_are_unknown(host: FakeHost) -> None:
    (host.sys / "class" / "vfio-dev").rmdir()
    assert_unknown(host.look().kernel.vfio_cdev, Unknown.DRIVER_NOT_BOUND)


def test_a_kernel_that_makes_no_character_devices_is_told(host: FakeHost) -> None:
    host.write(host.proc / "devices", "Character devices:\n 10 misc\n")
    assert host.look().kernel.vfio_cdev.is_no


@pytest.mark.parametrize(
    ("module", "text", "allowed"),
    [
        ("vfio_iommu_type1", "N\n", False),
        ("vfio_iommu_type1", "Y\n", True),
        ("iommufd", "maybe\n", None),
        ("elsewhere", "Y\n", None),
    ],
)
def test_unsafe_interrupts_are_read_from_the_module_that_decides(
    host: FakeHost, module: str, text: str, allowed: bool | None
) -> None:
    host.write(host.sys / f"module/{module}/parameters/allow_unsafe_interrupts", text)
    assert host.look().kernel.unsafe_interrupts is allowed
