"""The daemons that the e2e tests start: migrd, with an observer in it and the sample device tamed.

    python -m tests.lab.guest.e2e_migrd     imports migrd, says `ready`, then for each line
                                            {"config": …, "log": …, "calls": …} on stdin
                                            forks a daemon, and says its pid

Importing migrd takes longer here than all that a test does, hence one import for all daemons. Each
is a process and a session of its own.

- `calls` gets a line for each dirty-tracking call that the daemon makes of the kernel: PEEK,
  CLEARING, SWITCHED. Taken from the interpreter's own audit events, so it does not matter which
  part of migrd makes it, or how.
- mtty says that it logs its own DMA, and its log is a stub that reports nothing. Neither migrd nor
  QEMU can know that. So a daemon is told here that there is no such log (ENOTTY, as the kernel says
  of most devices), and its QEMUs leave it alone by `-global` of their profile (e2e_fleet.py).
- QEMU is given ten times as long to answer: it is emulated within an emulation.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from typing import Any

PEEK, CLEARING, SWITCHED = "peek", "clearing read", "tracking switched"
SLOWNESS = 10


def observe(path: str) -> None:
    """Note every dirty-tracking call from now on."""
    from migrd.abi import iommufd

    notes = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    no_clear = iommufd.iommufd_hwpt_get_dirty_bitmap_flags.NO_CLEAR

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "fcntl.ioctl":
            return
        _, request, argument = arguments
        if request == iommufd.IOMMU_HWPT_GET_DIRTY_BITMAP:
            os.write(notes, f"{PEEK if argument.flags & no_clear else CLEARING}\n".encode())
        elif request == iommufd.IOMMU_HWPT_SET_DIRTY_TRACKING:
            os.write(notes, f"{SWITCHED}\n".encode())

    sys.addaudithook(note)


def without_dma_log() -> None:
    """To migrd, no device has a log of its own."""
    from migrd import daemon
    from migrd.abi import vfio
    from migrd.kernel.calls import Argument, system_ioctl
    from migrd.kernel.passthrough import KernelPassthrough
    from migrd.kernel.vfio_calls import LINUX

    log = {
        vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
        vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP,
        vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT,
    }

    def ioctl(fd: int, request: int, argument: Argument, /) -> int:
        if request == vfio.VFIO_DEVICE_FEATURE and isinstance(argument, bytearray):
            header = vfio.vfio_device_feature.from_buffer_copy(argument)
            if header.flags & vfio.VFIO_DEVICE_FEATURE_MASK in log:
                raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        return system_ioctl(fd, request, argument)

    system = replace(LINUX, ioctl=ioctl)
    vars(daemon)["KernelPassthrough"] = partial(KernelPassthrough, system=system)


def be_patient() -> None:
    from migrd import daemon
    from migrd.qemu.launch import START_DEADLINE_S, QemuLauncher
    from migrd.qemu.qmp import DEFAULT_DEADLINE_S

    vars(daemon)["QemuLauncher"] = partial(
        QemuLauncher,
        start_deadline_s=SLOWNESS * START_DEADLINE_S,
        call_deadline_s=SLOWNESS * DEFAULT_DEADLINE_S,
    )


def serve(config: str, log: str, calls: str) -> None:
    """Be a daemon, to its end."""
    from migrd.__main__ import main as migrd

    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, fd in enumerate((nothing, output, output)):
        os.dup2(fd, number)
    os.close(output)
    os.close(nothing)
    observe(calls)
    sys.argv = ["migrd", "serve", "--config", config]
    migrd()


def main() -> None:
    without_dma_log()
    be_patient()
    import migrd.__main__
    import migrd.daemon  # noqa: F401 - what the daemons share

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # they are waited for by pidfd
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            serve(**json.loads(line))
            return
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
