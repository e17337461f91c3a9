"""The passthrough devices of one QEMU, as its launch.json keeps them for the next daemon."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from migrd.core.vfio_launch import GivenBy, VfioLaunch, VfioLaunchDevice
from migrd.qemu.passthrough import KnownDevices


def devices_as_json(known: KnownDevices) -> Mapping[str, object]:
    return {**asdict(known.launch), "names": dict(known.names)}


def devices_of_json(fields: Any) -> KnownDevices:
    """From what `devices_as_json` gave; none where there is nothing (an older daemon's record).

    Raises ValueError, TypeError or KeyError when it is something else.
    """
    if fields is None:
        return KnownDevices()
    launch = VfioLaunch(
        iommufds=tuple(map(str, fields["iommufds"])),
        iommufds_by_fd=bool(fields["iommufds_by_fd"]),
        devices=tuple(map(_device, fields["devices"])),
    )
    return KnownDevices(launch, _texts(fields["names"]))


def _device(row: Any) -> VfioLaunchDevice:
    return VfioLaunchDevice(
        id=str(row["id"]),
        address=str(row["address"]),
        iommufd=_text(row["iommufd"]),
        given_by=GivenBy(row["given_by"]),
        sysfs_path=_text(row["sysfs_path"]),
        guest_bus=_text(row["guest_bus"]),
        guest_address=_text(row["guest_address"]),
        properties=_texts(row["properties"]),
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _texts(fields: Any) -> dict[str, str]:
    return {str(key): str(value) for key, value in dict(fields).items()}
