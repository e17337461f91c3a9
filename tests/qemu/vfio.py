"""Passthrough devices for real QEMUs that have no such hardware: the profile that preloads the
stand-in (tests/lab/vfio_shim), and the descriptors to pass."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from migrd.core.vfio_launch import GivenBy, VfioLaunch, VfioLaunchDevice
from migrd.engine.ports import PassedDevices, PluggedFds
from tests.lab import vfio_shim
from tests.qemu.hosts import Host

ALLOWED = "[passthrough]\nallowed = true"
EVENTS: Mapping[str, str] = {"migration-events": "on"}
FIRST, SECOND = "0000:41:00.1", "0000:41:00.2"


def add_vfio_profile(
    host: Host,
    name: str,
    shim: Path,
    *,
    allowed: str = ALLOWED,
    changes: Sequence[tuple[str, str]] = (),
    **knobs: str | int,
) -> Path:
    """A profile whose QEMUs have the stand-in, and the file that it keeps its log in."""
    log = host.root / f"{name}.log"
    variables = vfio_shim.environment(shim, log=str(log), **knobs)
    lines = [f'{key} = "{value}"' for key, value in variables.items()]
    host.add_profile(name, *changes, more="\n".join([allowed, "[environment]", *lines, ""]))
    return log


def device(
    id_: str = "hostdev0", address: str = FIRST, iommufd: str | None = "iommufd0"
) -> VfioLaunchDevice:
    return VfioLaunchDevice(id_, address, iommufd, GivenBy.FD, properties=EVENTS)


@contextlib.contextmanager
def passed(*devices: VfioLaunchDevice) -> Iterator[PassedDevices]:
    """One descriptor for each device and each iommufd object; closed at the end."""
    iommufds = tuple(dict.fromkeys(d.iommufd for d in devices if d.iommufd is not None))
    with contextlib.ExitStack() as stack:
        fds = {d.address: _opened(vfio_shim.open_device(), stack) for d in devices}
        opened = [_opened(vfio_shim.open_iommufd(), stack) for _ in iommufds]
        yield PassedDevices(VfioLaunch(iommufds, True, devices), opened, fds)


@contextlib.contextmanager
def plugged(*, new_iommufd: bool = True) -> Iterator[PluggedFds]:
    """Descriptors for one device that is plugged; closed at the end."""
    with contextlib.ExitStack() as stack:
        fd = _opened(vfio_shim.open_device(), stack)
        iommufd = _opened(vfio_shim.open_iommufd(), stack) if new_iommufd else None
        yield PluggedFds(fd, iommufd)


def _opened(fd: int, stack: contextlib.ExitStack) -> int:
    stack.callback(os.close, fd)
    return fd


@dataclass(frozen=True)
class Open:
    """What a process has open, of what was passed to it."""

    devices: int
    iommufds: int


def open_in(pid: int | None) -> Open:
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(os.readlink(entry))
    return Open(
        devices=sum("fake-vfio-device" in link for link in links),
        iommufds=sum("fake-iommufd" in link for link in links),
    )


def checksums(log: Path, word: str) -> list[str]:
    """What the devices of a log have `sent` or `received`, each with its checksum."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [line.partition(f" {word} ")[2] for line in lines if f" {word} " in line]
