"""The doctor on passthrough: what is missing matters as much as passthrough is wanted."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from migrd.core.devices import Capability, Inventory, KernelFacts, Unknown
from migrd.doctor.finding import Finding, Status
from migrd.doctor.passthrough import MOST_TOLD, checks, findings, look_at_passthrough
from tests.daemon.hosts import Host, bad
from tests.fakes.inventory import CAN, KERNEL, inventory, mdev, pci
from tests.fakes.sysfs import FakeHost

NIC = "0000:41:00.0"
SOUND = "0000:41:00.1"
MDEV = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


def found(
    seen: Inventory, expected: Sequence[str] = (), may_open: Callable[[str], bool] = lambda _: True
) -> dict[str, Finding]:
    told = list(findings(seen, expected, may_open))
    names = [finding.name for finding in told]
    assert len(names) == len(set(names)), names
    for finding in bad(told):
        assert finding.cure, finding
    return {finding.name: finding for finding in told}


# How much it matters


LACKS = [
    ("iommu and vfio", inventory([]), "no IOMMU", "intel_iommu=on"),
    (
        "kernel",
        inventory(kernel=replace(KERNEL, release="6.1.0-28-amd64")),
        "since 6.6",
        "Linux 6.7 or newer",
    ),
    ("kernel", inventory(kernel=replace(KERNEL, release="6.6.9")), "since 6.7", "6.12"),
    (
        "iommufd",
        inventory(kernel=replace(KERNEL, iommufd=Capability.probed(False, "/dev/iommu: ENOENT"))),
        "/dev/iommu: ENOENT",
        "modprobe iommufd",
    ),
    (
        "iommufd",
        inventory(
            kernel=replace(KERNEL, iommufd=Capability.unknown(Unknown.NO_PERMISSION, "EACCES"))
        ),
        "may not be opened",
        "/etc/udev/rules.d/",
    ),
    (
        "vfio",
        inventory(kernel=replace(KERNEL, vfio_cdev=Capability.probed(False, "no vfio-dev"))),
        "no character devices",
        "CONFIG_VFIO_DEVICE_CDEV",
    ),
    (
        "vfio",
        inventory(
            kernel=replace(KERNEL, vfio_cdev=Capability.unknown(Unknown.DRIVER_NOT_BOUND, "none"))
        ),
        "not known",
        "modprobe vfio-pci",
    ),
    (
        "interrupts",
        inventory(kernel=replace(KERNEL, unsafe_interrupts=True)),
        "without interrupt remapping",
        "allow_unsafe_interrupts=N",
    ),
    ("sysfs", inventory(trouble=["cap: is empty"]), "cap: is empty", "look at them"),
]


@pytest.mark.parametrize(
    ("name", "seen", "said", "cure"), LACKS, ids=[f"{n}: {c}" for n, _, _, c in LACKS]
)
def test_what_the_host_lacks_fails_only_where_a_device_is_meant_for_vms(
    name: str, seen: Inventory, said: str, cure: str
) -> None:
    nobody_wants_it = found(seen)
    assert {finding.status for finding in nobody_wants_it.values()} == {Status.OK}
    assert said in nobody_wants_it[name].message
    bound = replace(seen, devices={NIC: pci(NIC)})
    assert found(bound)[name].status is Status.WARN
    wanted = found(bound, [NIC])[name]
    assert wanted.status is Status.FAIL
    assert said in wanted.message
    assert cure in wanted.cure


def test_a_sound_host_is_called_sound_whatever_is_wanted() -> None:
    for expected in ((), (NIC,)):
        told = found(inventory([CAN], [pci(NIC)]), expected)
        assert bad(told.values()) == []
        assert "interrupts" not in told
        assert "sysfs" not in told
        assert "1 IOMMUs, all track dirty pages" in told["iommu and vfio"].message
    assert of(inventory([CAN], [pci(NIC)])).message.startswith("ready (vfio-pci)")


@pytest.mark.parametrize("release", ["", "rolling", "7", "99999999999.1"])
def test_a_release_that_says_no_version_is_no_failure(release: str) -> None:
    told = found(inventory(kernel=replace(KERNEL, release=release)), [NIC])
    assert told["kernel"].status is Status.OK


def test_a_newer_kernel_than_anybody_knows_is_fine() -> None:
    assert found(inventory(kernel=replace(KERNEL, release="10.0.0")))["kernel"].status is Status.OK


# Devices that are meant for VMs


def of(seen: Inventory, address: str = NIC, **more: Callable[[str], bool]) -> Finding:
    return found(seen, [address], **more)[f"device {address}"]


def test_a_device_that_is_not_there_is_named_with_how_to_look_for_it() -> None:
    missing = of(inventory([CAN]))
    assert missing.status is Status.FAIL
    assert f"lspci -D | grep {NIC[5:]}" in missing.cure
    assert "mdevctl start" in of(inventory([CAN]), MDEV).cure


def test_a_device_with_another_driver_or_none_is_told_how_to_bind_it() -> None:
    for driver, said in (("nouveau", "nouveau has it"), (None, "no driver has it")):
        told = of(inventory([CAN], [pci(NIC, driver=driver, vfio_cdev=None)]))
        assert told.status is Status.FAIL
        assert said in told.message
        assert f"driverctl set-override {NIC} vfio-pci" in told.cure


def test_a_group_that_the_host_uses_too_is_not_viable() -> None:
    other = pci(SOUND, driver="snd_hda_intel", vfio_cdev=None)
    device = pci(NIC, group_devices=(SOUND,))
    told = of(inventory([CAN], [device, other]))
    assert told.status is Status.FAIL
    assert f"not viable: the host's own drivers have {SOUND} (snd_hda_intel)" in told.message
    assert f"driverctl set-override {SOUND} vfio-pci" in told.cure
    for harmless in (pci(SOUND), pci(SOUND, driver=None, vfio_cdev=None)):
        assert of(inventory([CAN], [device, harmless])).status is Status.OK


def test_a_device_behind_no_iommu_cannot_be_given_away() -> None:
    assert "behind none" in of(inventory([CAN], [pci(NIC, None)])).message
    assert "no IOMMU" in of(inventory([], [pci(NIC, None)])).message
    assert of(inventory([], [mdev(MDEV)]), MDEV).status is Status.OK  # an mdev needs none


def test_a_character_device_that_is_missing_or_closed_is_told() -> None:
    assert "no character device" in of(inventory([CAN], [pci(NIC, vfio_cdev=None)])).message
    closed = of(inventory([CAN], [pci(NIC)]), may_open=lambda _: False)
    assert closed.status is Status.FAIL
    assert "/dev/vfio/devices/vfio0 may not be opened" in closed.message
    assert "udevadm" in closed.cure


def test_what_could_be_promised_of_a_sound_device_is_said_and_is_no_failure() -> None:
    cannot = pci(NIC, migration=replace(pci(NIC).migration, can=Capability.probed(False, "ENOTTY")))
    told = of(inventory([CAN], [cannot]))
    assert told.status is Status.OK
    assert "a VM with it alone is 'needs unplug'" in told.message


# Devices that somebody has bound


def test_a_bound_device_with_trouble_is_a_warning_and_one_without_is_not_mentioned() -> None:
    other = pci(SOUND, driver="snd_hda_intel", vfio_cdev=None)
    told = found(inventory([CAN], [pci(NIC, group_devices=(SOUND,)), other]))
    assert told[f"device {NIC}"].status is Status.WARN
    assert f"device {SOUND}" not in told


def test_a_thousand_devices_with_trouble_are_not_a_thousand_findings() -> None:
    many = [pci(f"0000:{n >> 5:02x}:{n & 0x1F:02x}.0") for n in range(1000)]
    told = found(inventory([CAN], many), may_open=lambda _: False)
    devices = [name for name in told if name.startswith("device ")]
    assert len(devices) == MOST_TOLD
    assert f"{1000 - MOST_TOLD} more" in told["devices"].message


# Against files


def test_it_reads_the_host_as_the_daemon_does(tmp_path: Path) -> None:
    host = FakeHost(tmp_path)
    host.add_vtd("dmar0")
    host.bind(host.add_function(NIC, iommu="dmar0", group=7), "vfio-pci")
    told = {f.name: f for f in look_at_passthrough([NIC], tmp_path)}
    assert bad(told.values()) == []
    assert told["iommufd"].message.endswith("opens")
    assert told[f"device {NIC}"].message.startswith("ready (vfio-pci)")


def test_an_empty_host_and_one_without_sysfs_are_no_failure_where_nothing_is_wanted(
    tmp_path: Path,
) -> None:
    assert bad(look_at_passthrough([], tmp_path / "nothing")) == []
    FakeHost(tmp_path / "bare", release="5.10.0", iommufd=False)
    assert bad(look_at_passthrough([], tmp_path / "bare")) == []


def test_the_configuration_says_what_is_meant_for_vms(host: Host) -> None:
    host.more = f'[devices]\nexpected = ["{NIC}"]\n'
    (check,) = checks(host.settings())
    assert check.blocking is not None
    told = check.blocking()
    assert not isinstance(told, Finding)
    assert f"device {NIC}" in {finding.name for finding in told}


def test_odd_facts_never_end_the_examination() -> None:
    bare = KernelFacts(
        "", Capability.unknown(Unknown.PROBE_FAILED), Capability.unknown(Unknown.NOT_PROBED)
    )
    for expected in ((), (NIC, MDEV)):
        assert found(Inventory(bare, {}, {}), expected)
