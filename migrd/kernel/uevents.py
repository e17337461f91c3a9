"""The kernel's own messages about devices, from a NETLINK_KOBJECT_UEVENT socket.

    kernel ──group 1──> socket ──add_reader──> Listener.event(Uevent)
                                               Listener.lost()       some were dropped: look anew
                                               Listener.broken(why)  there will be no more

A message is `action@devpath`, then `KEY=value` strings, each ended by a zero byte. It carries no
sysfs content worth keeping: it says where to look (`concern`), and sysfs is read.

Why no pyudev, which the design suggested (tried: 0.24.5). Beside libudev's own socket, this one
- sees an overflow for what it is. The kernel drops messages when the buffer is full, and says so
  once (ENOBUFS at the next read); reading on is the cure. pyudev's poll takes the POLLERR of it for
  a broken descriptor and raises from then on at every call (its issue 194, open);
- takes a quarter of the processor time per message: no call through ctypes for each property;
- needs no libudev.so.1 on the host;
- is no longer than an adapter around pyudev would be, and typed.
What libudev has more, filters in the kernel and udevd's properties, is of no use here: group 1 is
sent before udevd has seen the event, and also where there is no udevd.

Trust: whoever may (CAP_NET_ADMIN) can send to this group too, but the kernel alone has port 0; all
else is dropped. The worst that a forged message could do is to have a device read once more.

Networks: the kernel sends these messages to the network namespaces of the initial user namespace.
Elsewhere the socket opens and stays silent, one more reason for the periodic rescan.
"""

import asyncio
import contextlib
import errno
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from migrd.kernel.host_devices import BDF, UUID

NETLINK_KOBJECT_UEVENT: Final = 15
KERNEL_GROUP: Final = 1
BUFFER_BYTES: Final = 1 << 20
MAX_MESSAGE_BYTES: Final = 8192
"""The kernel's own limit is 2048 of variables, and a path (UEVENT_BUFFER_SIZE)."""
READ_AT_ONCE: Final = 64
"""Messages per turn of the event loop: a storm must not keep it from everything else."""

_SO_RCVBUFFORCE: Final = 33  # asm-generic/socket.h; the socket module does not name it
_HEAD: Final = re.compile(r"([a-z]{1,16})@(/.*)", re.DOTALL)
_MODULES: Final = re.compile(r"iommufd|vfio|mdev|vfio_.*|.*_vfio_.*|.*_iommu|iommu_.*")
_UNBOUND: Final = frozenset({"unbind", "remove"})


@dataclass(frozen=True)
class Uevent:
    """One message of the kernel."""

    action: str
    devpath: str
    """Below /sys, beginning with a slash."""
    subsystem: str
    properties: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.devpath.rpartition("/")[2]


@dataclass(frozen=True)
class Concern:
    """What a uevent is about."""

    address: str | None
    """Of the one device; None: of the host as a whole."""
    has_ended: bool = False
    """The device's driver is gone from it, or the device itself."""


class Listener(Protocol):
    """Who is told; all on the event loop."""

    def event(self, event: Uevent) -> None: ...

    def lost(self) -> None:
        """Messages were dropped: what is known may be out of date."""

    def broken(self, error: OSError) -> None:
        """No more will come."""


class Listening(Protocol):
    """An open source of uevents."""

    def close(self) -> None:
        """Stop; idempotent."""


Listen = Callable[[Listener], Listening]


def parse(message: bytes) -> Uevent | None:
    """A message of the kernel; None if it is not one."""
    head, *rest = message.decode("utf-8", "replace").split("\0")
    said = _HEAD.fullmatch(head)
    if said is None:
        return None
    pairs = (line.partition("=") for line in rest if "=" in line)
    properties = {key: value for key, _, value in pairs}
    if properties.get("ACTION") != said[1] or properties.get("DEVPATH") != said[2]:
        return None
    return Uevent(said[1], said[2], properties.get("SUBSYSTEM", ""), properties)


def concern(event: Uevent) -> Concern | None:
    """Which device to read again because of it; None if it says nothing about passthrough."""
    name, parts = event.name, event.devpath.split("/")
    match event.subsystem:
        case "pci" if BDF.fullmatch(name):
            return Concern(name, event.action in _UNBOUND)
        case "mdev" if UUID.fullmatch(name):
            return Concern(name, event.action in _UNBOUND)
        case "vfio-dev" if len(parts) > 3:  # .../<device>/vfio-dev/vfioN
            if BDF.fullmatch(parts[-3]) or UUID.fullmatch(parts[-3]):
                return Concern(parts[-3], event.action == "remove")
        case "iommu":
            return Concern(None)
        case "misc" if name in ("iommu", "vfio"):
            return Concern(None)
        case "module" if _MODULES.fullmatch(name):
            return Concern(None)
        case _:
            pass
    return None


def listen_to_kernel(listener: Listener) -> Listening:
    """Begin to listen on the running loop. Raises OSError when that is not permitted."""
    opened = socket.socket(
        socket.AF_NETLINK,
        socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
        NETLINK_KOBJECT_UEVENT,
    )
    try:
        _enlarge(opened)
        opened.bind((0, KERNEL_GROUP))
    except OSError:
        opened.close()
        raise
    return UeventSocket(opened, listener)


class UeventSocket:
    """A bound socket, read on the running event loop; takes it over."""

    def __init__(self, opened: socket.socket, listener: Listener) -> None:
        self._socket = opened
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(opened.fileno(), self._read)

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()

    def _read(self) -> None:
        for _ in range(READ_AT_ONCE):
            if self._socket.fileno() < 0:  # a listener has closed it
                return
            try:
                message, _, flags, sender = self._socket.recvmsg(MAX_MESSAGE_BYTES)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    self.close()
                    self._listener.broken(error)
                    return
                self._listener.lost()
                continue
            if sender[0] != 0:
                continue
            if flags & socket.MSG_TRUNC:
                self._listener.lost()
            elif (event := parse(message)) is not None:
                self._listener.event(event)


def _enlarge(opened: socket.socket) -> None:
    """A thousand VFs made at once send some thousand messages; the usual buffer holds a few 100."""
    for option in (_SO_RCVBUFFORCE, socket.SO_RCVBUF):  # the first needs CAP_NET_ADMIN
        with contextlib.suppress(OSError):
            opened.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
            return
