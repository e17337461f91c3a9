"""A simulator of VFIO character devices and the iommufd they are bound to.

    VfioKernel.system   what the adapters call: open, close, read, write, ioctl
         │ paths            ├─ /dev/iommu, or wherever the test says  ──► fakes.iommufd
         └─ add(device) ──► └─ /dev/vfio/devices/vfioN                ──► fakes.vfio_device

The rules of the kernel that it keeps: one descriptor binds a device; before that it answers
nothing; an emulated mdev has no IOMMU and is attached to an IOAS only; what is attached to a page
table with dirty tracking must track; state survives the last close, a session does not.

Descriptors are memfds, so that they can be duplicated and be left open like real ones; a file is
released when its last descriptor is gone.
"""

import ctypes
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from migrd.abi import vfio as abi
from migrd.kernel.calls import Argument
from migrd.kernel.vfio_calls import SystemCalls
from tests.fakes.iommufd import Context, Device, Hwpt, Ioas, IommufdKernel, _identity
from tests.fakes.vfio_device import SimDevice, SimSession, oserror

IOMMU_PATH: Final = "/dev/iommu"
OPEN: Final = 0
"""In place of a request."""
Identity = tuple[int, int]


class Iommu(Enum):
    """What is behind a device."""

    TRACKS = True
    """One that can track dirty pages: mtty behind the mock IOMMU."""
    PLAIN = False
    """One that cannot: any IOMMU that QEMU emulates."""
    NONE = None
    """An emulated mdev: its driver pins pages itself."""


class Access:
    """What an emulated mdev is on its iommufd: it has an id, and nothing answers to it."""


@dataclass
class Node:
    """One /dev/vfio/devices/vfioN."""

    device: SimDevice
    iommu: Iommu
    path: str = ""
    bind_errno: int = 0
    """BIND fails with it."""
    failures: dict[int, int] | None = None
    """Request -> errno that it fails with."""
    owner: "Opened | None" = None


@dataclass
class Opened:
    """One open file of a node."""

    node: Node
    context: Context | None = None
    """Of the iommufd it is bound to."""
    dev_id: int = 0


class VfioKernel(IommufdKernel):
    """Both kinds of descriptors, and what lies between them."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: dict[str, Node] = {}
        self.open_errnos: dict[str, int] = {}
        """Path -> errno that opening it fails with."""
        self.sysfs_names: dict[str, str] = {}
        """Path -> the device that sysfs says it is; absent: sysfs does not say."""
        self.before_ioctl: Callable[[int], None] = lambda request: None
        """Called in the caller's thread: to hold it up there. OPEN: before it opens something."""
        self._files: dict[Identity, Opened] = {}
        self._sessions: dict[Identity, SimSession] = {}

    def add(self, device: SimDevice, iommu: Iommu = Iommu.NONE) -> str:
        """Returns its path."""
        path = f"/dev/vfio/devices/vfio{len(self.nodes)}"
        self.nodes[path] = Node(device, iommu, path)
        return path

    def device_of(self, fd: int) -> SimDevice:
        return self._files[_identity(fd)].node.device

    def new_ioas(self, iommufd: int) -> int:
        return self._contexts[_identity(iommufd)].add(Ioas())

    @property
    def system(self) -> SystemCalls:
        return SystemCalls(
            open=self.open_path,
            close=self.close_fd,
            read=lambda fd, count: self._session(fd).read(count),
            write=lambda fd, view: self._session(fd).write(bytes(view)),
            ioctl=self.ioctl,
            device_of=lambda fd: self.sysfs_names.get(self._files[_identity(fd)].node.path),
        )

    def open_path(self, path: str, flags: int) -> int:
        assert flags & os.O_CLOEXEC, "a child of the daemon would inherit it"
        self.before_ioctl(OPEN)
        if number := self.open_errnos.get(path):
            raise oserror(number)
        if path == IOMMU_PATH:
            return self.open()
        node = self.nodes.get(path)
        if node is None:
            raise oserror(errno.ENOENT)
        fd = os.memfd_create(os.path.basename(path))
        self._files[_identity(fd)] = Opened(node)
        return fd

    def close_fd(self, fd: int) -> None:
        """Like the real one it knows when it was told twice (EBADF)."""
        os.close(fd)
        self._release_closed()

    def left_open(self) -> list[str]:
        """Names of the descriptors of this kind that this process still has."""
        self._release_closed()
        links = _descriptors().values()
        names = {"iommufd", "device-data", *map(os.path.basename, self.nodes)}
        return [name for name, _ in links if name in names]

    def ioctl(self, fd: int, request: int, argument: Argument, /) -> int:
        self.before_ioctl(request)
        self._release_closed()
        identity = _identity(fd)
        if identity in self._sessions:
            if request != abi.VFIO_MIG_GET_PRECOPY_INFO:
                raise oserror(errno.ENOTTY)
            assert isinstance(argument, abi.vfio_precopy_info)
            self._sessions[identity].precopy_left(argument)
            return 0
        opened = self._files.get(identity)
        if opened is None:
            return super().ioctl(fd, request, argument)
        if number := (opened.node.failures or {}).get(request):
            raise oserror(number)
        self._vfio_ioctl(opened, request, argument)
        return 0

    # ---- a device

    def _vfio_ioctl(self, opened: Opened, request: int, argument: Argument) -> None:
        if request == abi.VFIO_DEVICE_BIND_IOMMUFD:
            assert isinstance(argument, abi.vfio_device_bind_iommufd)
            self._bind(opened, argument)
            return
        if opened.context is None:
            raise oserror(errno.EINVAL)
        device = opened.node.device
        match argument:
            case bytearray() if request == abi.VFIO_DEVICE_FEATURE:
                self._return_session(device.feature(argument), argument)
            case abi.vfio_device_attach_iommufd_pt():
                argument.pt_id = self._attach(opened, opened.context, argument.pt_id)
            case abi.vfio_device_detach_iommufd_pt():
                self._detach(opened, opened.context)
            case abi.vfio_device_info():
                argument.flags = device.device_flags
            case _ if request == abi.VFIO_DEVICE_RESET:
                device.reset()
            case _:
                raise oserror(errno.ENOTTY)

    def _bind(self, opened: Opened, argument: abi.vfio_device_bind_iommufd) -> None:
        context = self._contexts.get(_identity(argument.iommufd))
        node = opened.node
        if context is None or node.owner is not None:
            raise oserror(errno.EINVAL)
        if node.bind_errno:
            raise oserror(node.bind_errno)
        node.owner, opened.context = opened, context
        if node.iommu is Iommu.NONE:
            opened.dev_id = context.add(Access())
        else:
            opened.dev_id = context.add(Device(node.iommu.value, _nothing()))
        argument.out_devid = opened.dev_id

    def _attach(self, opened: Opened, context: Context, pt_id: int) -> int:
        device = context.objects[opened.dev_id]
        if isinstance(device, Access):
            context.get(pt_id, Ioas)
            return pt_id
        hwpt = self._attachable(context, pt_id, device.can_track)
        self._detach(opened, context)
        device.hwpt = hwpt
        if hwpt not in context.all(Hwpt):
            context.add(hwpt)
        return context.id_of(hwpt)

    def _detach(self, opened: Opened, context: Context) -> None:
        device = context.objects[opened.dev_id]
        if isinstance(device, Device):
            old, device.hwpt = device.hwpt, _nothing()
            if old in context.all(Hwpt):
                self._forget_automatic(context, old)

    # ---- descriptors

    def _return_session(self, session: SimSession | None, buffer: bytearray) -> None:
        if session is not None:
            fd = os.memfd_create("device-data")
            self._sessions[_identity(fd)] = session
            body = memoryview(buffer)[ctypes.sizeof(abi.vfio_device_feature) :]
            abi.vfio_device_feature_mig_state.from_buffer(body).data_fd = fd

    def _session(self, fd: int) -> SimSession:
        self._release_closed()
        return self._sessions[_identity(fd)]

    def _release_closed(self) -> None:
        alive = {identity for _, identity in _descriptors().values()}
        for identity in self._sessions.keys() - alive:
            del self._sessions[identity]
        for identity in self._files.keys() - alive:
            opened = self._files.pop(identity)
            if opened.context is not None:
                self._detach(opened, opened.context)
                del opened.context.objects[opened.dev_id]
                opened.node.owner = None
                opened.node.device.closed()


def _nothing() -> Hwpt:
    """In place of a page table, for a device that has none."""
    return Hwpt(Ioas(), can_track=False)


def _descriptors() -> dict[int, tuple[str, Identity]]:
    """The memfds of this process: number -> name, and which file it is."""
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
            status = os.fstat(int(entry))
        except OSError:  # the one that the listing itself was made with; or closed since
            continue
        if target.startswith("/memfd:"):
            name = target.removeprefix("/memfd:").removesuffix(" (deleted)")
            found[int(entry)] = (name, (status.st_dev, status.st_ino))
    return found
