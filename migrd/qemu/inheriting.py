"""Passthrough devices on their way into a new QEMU: descriptors that it inherits.

A descriptor has the same number in the child as here, and the command line names it by that number.
So QEMU is given duplicates, made for the one start and closed when it is over:
- above 2, which are the child's own standard streams;
- closed on exec in every other program that happens to be started meanwhile;
- not the caller's, who may close his at any time, and whose number may then be somebody else's.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from migrd.core.vfio_launch import GivenBy, VfioLaunch, arguments
from migrd.engine.ports import PassedDevices
from migrd.errors import Invalid, Violation, VmmDied, VmmRefused
from migrd.processes import memlock
from migrd.qemu.passthrough import KnownDevices, needed_features, own_names
from migrd.qemu.probe import Probed

LOWEST_FD: Final = 3


@dataclass(frozen=True)
class Inherited:
    """What one QEMU inherits for its devices."""

    launch: VfioLaunch = field(default_factory=VfioLaunch)
    iommufds: tuple[int, ...] = ()
    device_fds: Mapping[str, int] = field(default_factory=dict)

    @property
    def fds(self) -> tuple[int, ...]:
        return (*self.iommufds, *self.device_fds.values())

    @property
    def known_devices(self) -> KnownDevices:
        return KnownDevices(self.launch, own_names(self.launch, self.device_fds))

    def arguments(self) -> list[str]:
        """Raises Invalid."""
        if not self.launch.devices:
            return []
        return arguments(self.launch, self.iommufds, self.device_fds)

    def locked_bytes(self, memory_bytes: int) -> int:
        """How much memory QEMU may have to lock for them."""
        if not self.launch.devices:
            return 0
        return memlock.needed_bytes(memory_bytes, len(self.launch.iommufds))


@contextlib.contextmanager
def inheritable(devices: PassedDevices | None) -> Iterator[Inherited]:
    """Duplicates, as long as the block lasts. Raises Invalid for descriptors that do not fit the
    devices, VmmDied (nothing was started) when one cannot be duplicated."""
    if devices is None:
        yield Inherited()
        return
    _refuse_unfit(devices)
    with contextlib.ExitStack() as stack:
        iommufds = tuple(_duplicate(fd, stack) for fd in devices.iommufds)
        device_fds = {a: _duplicate(fd, stack) for a, fd in devices.device_fds.items()}
        yield Inherited(devices.launch, iommufds, device_fds)


def _refuse_unfit(devices: PassedDevices) -> None:
    launch = devices.launch
    wanted = {device.address for device in launch.devices if device.given_by is GivenBy.FD}
    iommufds = len(launch.iommufds) if launch.iommufds_by_fd else 0
    given = len(devices.iommufds)
    problems = [f"{address}: no descriptor" for address in sorted(wanted - {*devices.device_fds})]
    problems += [
        f"{address}: a descriptor for which there is no device"
        for address in sorted({*devices.device_fds} - wanted)
    ]
    if iommufds != given:
        problems.append(f"{given} descriptors for {iommufds} iommufd objects")
    if problems:
        text = "; ".join(problems)
        raise Invalid(text, [Violation("devices", "bad_descriptors", p) for p in problems])


def _duplicate(fd: int, stack: contextlib.ExitStack) -> int:
    try:
        copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, LOWEST_FD)
    except (OSError, ValueError) as failure:
        text = f"descriptor {fd} of a passthrough device cannot be passed on: {failure}"
        raise VmmDied(text, code="vmm_not_started") from failure
    stack.callback(os.close, copy)
    return copy


def refuse_lacking(launch: VfioLaunch, probed: Probed) -> None:
    """Raises VmmRefused when the QEMU does not offer what these devices need."""
    needed = needed_features(launch.devices, new_iommufds=launch.iommufds_by_fd)
    lacking = sorted(feature.value for feature in needed - probed.vfio_features)
    if lacking:
        text = f"QEMU {probed.version} does not offer what the passthrough devices need"
        text += f": {', '.join(lacking)}; name a newer one (10.0) as `binary` of the profile"
        raise VmmRefused(text, code="passthrough_unsupported")
