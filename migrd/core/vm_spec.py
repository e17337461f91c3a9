"""What a VM is defined as."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from migrd.core.tracking_request import TrackingPolicy


@dataclass(frozen=True)
class SpecDevice:
    """A passthrough device that a VM is given."""

    id: str
    """QEMU's id of it: the same on both hosts of a migration."""
    address: str
    """PCI address or mdev UUID on this host; on another host it may be another."""
    guest_bus: str | None = None
    guest_address: str | None = None
    """Its slot in the guest (`05.0`); None: QEMU takes the next free one."""


@dataclass(frozen=True)
class VmSpec:
    """What an administrator's launch profile is filled with; the same on both hosts, but for the
    addresses of passthrough devices."""

    name: str
    profile: str | None
    """Name of the launch profile; None for an adopted VM whose profile nobody has named."""
    parameters: Mapping[str, str | int | bool] = field(default_factory=dict)
    devices: tuple[SpecDevice, ...] = ()
    tracking_policy: TrackingPolicy | None = None
    """When to ask for dirty tracking; None: the default of the host."""
