"""What launch.json keeps of passthrough devices, and what the next daemon makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from migrd.core.facts import SpecDevice, VmSpec
from migrd.core.tracking_request import TrackingPolicy
from migrd.core.vfio_launch import GivenBy, VfioLaunch, VfioLaunchDevice
from migrd.qemu.instances import Instance, LaunchRecord
from migrd.qemu.passthrough import KnownDevices
from tests.qemu.vfio import FIRST, SECOND, device

MDEV = VfioLaunchDevice("hostdev1", SECOND, None, GivenBy.SYSFSDEV, "/sys/x", "port1", "00.0")
KNOWN = KnownDevices(VfioLaunch(("iommufd0",), True, (device(), MDEV)), {"VFIO_FD34": "hostdev0"})
RECORD = LaunchRecord(
    spec=VmSpec(
        "vm", "lab", {"memory_mib": 64}, (SpecDevice("hostdev0", FIRST),), TrackingPolicy.REQUIRE
    ),
    instance="one",
    incoming=False,
    argv=("qemu",),
    digest="d",
    has_serial=True,
    requested_wall_s=1.0,
    devices=KNOWN,
    locked_bytes=1 << 30,
)


@pytest.fixture
def at(tmp_path: Path) -> Instance:
    instance = Instance(tmp_path, "vm", "one")
    instance.directory.mkdir(parents=True)
    return instance


def rewritten(at: Instance, **changes: Any) -> LaunchRecord | None:
    fields = json.loads(at.record_path.read_text())
    at.record_path.write_text(json.dumps({**fields, **changes}))
    return LaunchRecord.read(at)


def test_a_record_is_read_as_it_was_written(at: Instance) -> None:
    RECORD.write(at)
    assert LaunchRecord.read(at) == RECORD


def test_the_record_of_a_daemon_that_knew_no_devices_has_none(at: Instance) -> None:
    RECORD.write(at)
    fields = json.loads(at.record_path.read_text())
    for key in ("devices", "locked_bytes", "wanted_devices", "tracking_policy"):
        del fields[key]
    at.record_path.write_text(json.dumps(fields))
    old = LaunchRecord.read(at)
    assert old is not None
    assert (old.devices, old.locked_bytes) == (KnownDevices(), 0)
    assert old.spec == VmSpec("vm", "lab", {"memory_mib": 64})


@pytest.mark.parametrize(
    "odd",
    [
        7,
        [],
        {"devices": [{}], "iommufds": [], "iommufds_by_fd": True, "names": {}},
        {"devices": [{"given_by": "magic"}], "iommufds": [], "iommufds_by_fd": 1, "names": {}},
        {"devices": [], "iommufds": None, "iommufds_by_fd": True, "names": {}},
        {"devices": [], "iommufds": [], "iommufds_by_fd": True, "names": 3},
    ],
)
def test_devices_that_cannot_be_understood_make_a_record_that_cannot(
    at: Instance, odd: Any
) -> None:
    RECORD.write(at)
    assert rewritten(at, devices=odd) is None
