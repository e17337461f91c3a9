"""What QEMU itself says of devices it has: why they cannot be migrated, or that they can.

No NIC that QEMU emulates has a migration state, and mtty has all of it; mtty's DMA log accepts
everything and reports nothing, which QEMU has no way to know.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.bare_qemu import QmpError, migrate
from tests.lab.guest.nested import Device, nested
from tests.lab.guest.raw import bound_to_vfio, mtty, nics

UNSUPPORTED = "VFIO migration is not supported in kernel"


async def complaint_at_start(directory: Path, device: Device) -> str:
    """What QEMU says when it ends instead of starting."""
    with pytest.raises((AssertionError, QmpError, OSError)):
        async with nested(directory, device):
            pass
    return (directory / "qemu.stderr").read_text()


async def test_a_nic_has_no_migration_state_and_qemu_says_so(tmp_path: Path) -> None:
    with bound_to_vfio(nics()[0]) as node:
        async with nested(tmp_path, Device("nic", node, properties="")) as qemu:
            [reason] = await qemu.blocked_reasons()
    assert UNSUPPORTED in reason


async def test_a_nic_whose_migration_is_demanded_keeps_qemu_from_starting(tmp_path: Path) -> None:
    with bound_to_vfio(nics()[0]) as node:
        demanding = Device("nic", node, properties="enable-migration=on")
        assert UNSUPPORTED in await complaint_at_start(tmp_path, demanding)


async def test_an_mtty_is_blocked_by_nothing_and_migrates(tmp_path: Path) -> None:
    with mtty() as one, mtty() as other:
        here = Device("tty", one.node, sysfs=one.sysfs, properties="")
        there = Device("tty", other.node, sysfs=other.sysfs, properties="")
        async with (
            nested(tmp_path, here) as source,
            nested(tmp_path, there, name="destination", incoming=True) as destination,
        ):
            assert await source.blocked_reasons() == []
            await source.qemu.qmp("cont")
            await migrate(source.qemu, destination.qemu, downtime_limit_ms=5000)
            moved = await source.qemu.qmp("query-migrate")
            assert moved["vfio"]["transferred"] > 0
            assert (await destination.qemu.qmp("query-status"))["running"]


async def test_an_mtty_given_as_a_descriptor_is_taken_for_a_pci_device(tmp_path: Path) -> None:
    with mtty() as mdev:
        complaint = await complaint_at_start(tmp_path, Device("tty", mdev.node, properties=""))
    assert "Failed to get hardware info" in complaint
