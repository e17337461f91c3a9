"""Which passthrough devices a launch profile lets a request bring.

    [passthrough]
    allowed = true                              without it: none
    addresses = ["0000:41:*", "83b8f4f2-*"]     PCI addresses and mdev UUIDs; without it: any

A device of the host is handed to a guest whole, DMA and all, so the administrator says yes to it,
never the request alone.
"""

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Final, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from migrd.core.facts import SpecDevice
from migrd.core.vfio_launch import VfioLaunchDevice
from migrd.errors import Violation
from migrd.qemu.command_line import OWN_ID

Wanted: TypeAlias = Sequence[SpecDevice | VfioLaunchDevice]
"""Devices of a request, or of the plan that was made for it."""
DEVICE_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,62}")
"""What QEMU takes for an id, and sends in the migration stream."""


class PassthroughRules(BaseModel):
    """`[passthrough]` of a profile."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    allowed: bool = False
    addresses: tuple[Annotated[str, Field(pattern=r"^[0-9a-fA-F:.*?-]{1,64}$")], ...] | None = (
        Field(default=None, strict=False)
    )

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        if self.addresses is not None and not self.allowed:
            raise ValueError("has addresses, and allows none of them; add allowed = true")
        return self

    def permits(self, address: str) -> bool:
        """Whether a request may bring this device."""
        patterns = ("*",) if self.addresses is None else self.addresses
        return self.allowed and any(fnmatchcase(address.lower(), p.lower()) for p in patterns)


def refused_devices(profile: str, rules: PassthroughRules, devices: Wanted) -> Iterator[Violation]:
    """What is wrong with the devices of a request, all at once."""
    if devices and not rules.allowed:
        text = (
            f"profile {profile} allows no passthrough devices; add `[passthrough]` with "
            "`allowed = true` to it, or take another profile"
        )
        yield Violation("devices", "passthrough_forbidden", text)
        return
    ids: set[str] = set()
    for number, device in enumerate(devices):
        field = f"devices[{number}]"
        if not rules.permits(device.address):
            allowed = ", ".join(rules.addresses or ()) or "none"
            text = (
                f"{device.address} is none of the devices that profile {profile} allows "
                f"({allowed}): take one of them or another profile, or have its "
                "`passthrough.addresses` extended"
            )
            yield Violation(f"{field}.address", "device_not_allowed", text)
        if not DEVICE_ID.fullmatch(device.id) or device.id.startswith(OWN_ID):
            text = f"{device.id!r} is no id for a device: letters, digits and . _ - behind a letter"
            yield Violation(f"{field}.id", "bad_device_id", text)
        if device.id in ids:
            text = f"{device.id} is the id of another device"
            yield Violation(f"{field}.id", "duplicate_device_id", text)
        ids.add(device.id)
