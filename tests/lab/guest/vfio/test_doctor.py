"""What `migrd doctor` says of a real kernel's passthrough, with a NIC that is bound and without."""

from __future__ import annotations

from migrd.doctor.finding import Finding, Status
from migrd.doctor.passthrough import look_at_passthrough
from tests.lab.guest.raw import bound_to_vfio, nics


def found(*expected: str) -> dict[str, Finding]:
    return {finding.name: finding for finding in look_at_passthrough(expected)}


def test_a_nic_that_is_meant_for_a_vm_is_ready_once_a_vfio_driver_has_it() -> None:
    nic = next(nic for nic in nics() if not nic.name.endswith(".1"))
    before = found(nic.name)[f"device {nic.name}"]
    assert before.status is Status.FAIL
    assert "no VFIO driver has it" in before.message
    assert f"driverctl set-override {nic.name} vfio-pci" in before.cure
    with bound_to_vfio(nic):
        told = found(nic.name)
        bad = [finding for finding in told.values() if finding.status is not Status.OK]
        assert bad == []
        ready = told[f"device {nic.name}"].message
        assert ready.startswith("ready (vfio-pci)")
        assert "at best" in ready, "nobody has asked it yet"
        assert "not all track dirty pages" in told["iommu and vfio"].message
        assert told["iommufd"].message == "/dev/iommu opens"
        assert "interrupts" not in told, "they are remapped"


def test_what_is_not_there_is_named() -> None:
    missing = found("0000:99:00.0")["device 0000:99:00.0"]
    assert missing.status is Status.FAIL
    assert "it is not there" in missing.message
