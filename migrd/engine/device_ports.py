"""What the engine needs of the host's devices, as Protocols (see `engine.ports` for the rules).

DeviceInventory   what is there: sysfs, kept fresh by uevents    migrd.kernel.inventory
Passthrough       asks devices, opens them for one VM            migrd.kernel.passthrough
OpenDevices       the descriptors of one VM: handed to its QEMU, kept for peeking
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from migrd.core.devices import Device, Inventory


class DeviceInventory(Protocol):
    """What passthrough hardware this host has."""

    @property
    def current(self) -> Inventory:
        """The last snapshot, at once; it is replaced as a whole."""

    async def rescan(self) -> Inventory:
        """Read sysfs anew: the truth. Never raises for what sysfs holds: it stands in `trouble`."""

    async def watch(self, changed: Callable[[Inventory], None]) -> None:
        """Keep `current` fresh until cancelled: on each uevent, and by a periodic rescan, since
        uevents may be lost. `changed` is called on the event loop with each new generation."""

    def note_probed(self, device: Device) -> Inventory:
        """Put what the kernel answered about a device (Passthrough.probe) into the snapshot; it
        stays until the device goes or its driver changes, and its instance learns from it."""


@dataclass(frozen=True)
class HwptRef:
    """A page table of a VM: ids count anew in each iommufd, so an id alone names nothing."""

    iommufd: int
    """Index into OpenDevices.iommufds."""
    hwpt_id: int


@dataclass(frozen=True)
class DirtyPeek:
    """One look at a device's dirty bits that changed nothing."""

    hwpt: HwptRef
    iova: int
    length_bytes: int
    page_size_bytes: int
    dirty_pages: int
    took_s: float


class OpenDevices(Protocol):
    """The open descriptors of one VM's devices, and migrd's own reference to its iommufds.

    They keep the guest's memory pinned, so they must be closed as soon as the VMM has exited: that
    is `close_at_exit`. Whoever opened them owns them until then.
    """

    @property
    def iommufds(self) -> Sequence[int]:
        """One descriptor of /dev/iommu for each iommufd object of the plan, in its order."""

    @property
    def device_fds(self) -> Mapping[str, int]:
        """Address -> descriptor of its VFIO character device, not yet bound."""

    async def hand_over(self) -> None:
        """The VMM has its own copies of the device descriptors: close ours (the iommufds stay).
        Idempotent."""

    async def find_hwpts(self) -> Sequence[HwptRef]:
        """The page tables with dirty tracking that the VMM has made, on all iommufds."""

    async def peek(
        self, hwpt: HwptRef, iova: int, length_bytes: int, page_size_bytes: int
    ) -> DirtyPeek | None:
        """Read dirty bits of a mapped range with NO_CLEAR; None when the range has holes.
        Raises KernelError."""

    async def is_mapped(self, hwpt: HwptRef, iova: int, length_bytes: int) -> bool:
        """Is the range mapped without holes, at this moment? Reads no page table entry. Raises
        KernelError."""

    def let_go_of(self, address: str) -> None:
        """The VMM has this device no longer: it may be asked, or opened for another VM. Nothing
        happens for one that is not among them."""

    async def close_at_exit(self, pidfd: int) -> None:
        """Close everything when the process of `pidfd` has exited; until then, or cancelled, wait.
        The pidfd stays the caller's, who may close it meanwhile."""

    async def close(self) -> None:
        """Let go of everything. Idempotent; the VM's devices and memory are then its own alone.
        Not at once: letting go of the last reference frees and unpins the guest's memory."""


class Passthrough(Protocol):
    """Asks and opens devices."""

    async def probe(self, device: Device) -> Device:
        """The device with what the kernel answers about it: it is opened, bound to an iommufd of
        its own, asked, and let go. Nothing is attached. What could not be asked is unknown with
        the reason, unless it was known before; never raises for one device's answers. A device
        that is open for a VM is not touched: binding it would make the VMM's own bind fail."""

    async def open(self, devices: Sequence[Device], iommufds: int) -> OpenDevices:
        """Open them all, or none. Raises KernelError naming the device and the cure; KernelBusy
        when one is open for another VM already."""
