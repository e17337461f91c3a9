"""What this kernel offers for passthrough, from procfs, sysfs and one open of /dev/iommu.

release             /proc/sys/kernel/osrelease
iommufd             /dev/iommu, opened and closed again: permission is also a matter of cgroups
                    and security modules, which stat() and access() know nothing of
vfio_cdev           /proc/devices has `vfio-dev` (CONFIG_VFIO_DEVICE_CDEV, since Linux 6.6); the
                    question has no answer before a VFIO driver is loaded
unsafe_interrupts   allow_unsafe_interrupts of iommufd, else of vfio_iommu_type1
"""

import errno
import os
from typing import Final

from migrd.core.devices import Capability, KernelFacts, Unknown
from migrd.kernel.sysfs import Directory, Roots, reason, shown

NOT_READ: Final = KernelFacts(
    release="",
    iommufd=Capability.unknown(Unknown.NOT_PROBED, "the host has not been read yet"),
    vfio_cdev=Capability.unknown(Unknown.NOT_PROBED, "the host has not been read yet"),
)

MAX_LIST_BYTES: Final = 65_536

_DENIED: Final = frozenset({errno.EACCES, errno.EPERM})
_ABSENT: Final = frozenset({errno.ENOENT, errno.ENODEV, errno.ENXIO})


def read_kernel(roots: Roots, trouble: list[str]) -> KernelFacts:
    """All of it; never raises."""
    return KernelFacts(
        release=_proc_text(roots, "sys/kernel/osrelease", trouble) or "",
        iommufd=_iommufd(roots),
        vfio_cdev=_vfio_cdev(roots, trouble),
        unsafe_interrupts=_unsafe_interrupts(roots, trouble),
    )


def read_command_line(roots: Roots, trouble: list[str]) -> str:
    """What the kernel was started with; empty if that cannot be read."""
    return _proc_text(roots, "cmdline", trouble) or ""


def _proc_text(roots: Roots, name: str, trouble: list[str]) -> str | None:
    opened = Directory.open(roots.proc, trouble)
    if opened is None:
        return None
    with opened as proc:
        return proc.text(name)


def _iommufd(roots: Roots) -> Capability:
    path = f"{roots.dev}/iommu"
    try:
        # O_NONBLOCK: should it be a fifo; opening an iommufd makes an empty context, and no more
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY))
    except OSError as error:
        if reason(error) in _DENIED:
            return Capability.unknown(Unknown.NO_PERMISSION, f"{path}: {error.strerror}")
        if error.errno in _ABSENT:
            return Capability.probed(
                False, f"{path}: {error.strerror} (CONFIG_IOMMUFD is off, or not loaded)"
            )
        return Capability.unknown(Unknown.PROBE_FAILED, f"{path}: {error.strerror}")
    return Capability.probed(True, f"{path} opens")


def _vfio_cdev(roots: Roots, trouble: list[str]) -> Capability:
    sys = Directory.open(roots.sys, trouble)
    if sys is None:
        return Capability.unknown(Unknown.NOT_READABLE, f"{roots.sys} is missing")
    with sys:
        if not sys.has("class/vfio-dev"):
            return Capability.unknown(Unknown.DRIVER_NOT_BOUND, "no VFIO driver is loaded")
    proc = Directory.open(roots.proc, trouble)
    if proc is not None:
        with proc:
            devices = proc.content("devices", MAX_LIST_BYTES)
        if devices is not None:
            names = {words[1] for line in devices.splitlines() if len(words := line.split()) == 2}
            can = "vfio-dev" in names
            return Capability.probed(can, f"/proc/devices has {'' if can else 'no '}vfio-dev")
    return Capability.unknown(Unknown.NOT_READABLE, f"{roots.proc}/devices is not readable")


def _unsafe_interrupts(roots: Roots, trouble: list[str]) -> bool | None:
    opened = Directory.open(roots.sys, trouble)
    if opened is None:
        return None
    with opened as sys:
        for module in ("iommufd", "vfio_iommu_type1"):
            said = sys.text(f"module/{module}/parameters/allow_unsafe_interrupts")
            if said in ("Y", "N"):
                return said == "Y"
            if said is not None:
                trouble.append(f"{module}: allow_unsafe_interrupts is {shown(said)}")
    return None
