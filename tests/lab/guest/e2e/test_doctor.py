"""What `migrd doctor` says where the kernel is told to do without interrupt remapping."""

from __future__ import annotations

from migrd.doctor.finding import Status
from migrd.doctor.passthrough import look_at_passthrough
from tests.lab.guest.raw import mtty


def test_interrupts_that_are_not_remapped_are_warned_of_and_the_device_is_ready() -> None:
    with mtty() as device:
        name = device.sysfs.name
        told = {one.name: one for one in look_at_passthrough([name])}
    assert told["interrupts"].status is Status.FAIL
    assert "allow_unsafe_interrupts" in told["interrupts"].cure
    assert told[f"device {name}"].status is Status.OK
    assert told[f"device {name}"].message.startswith("ready (mtty)")
