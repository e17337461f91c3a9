"""What the kernel's messages say, and which of them are believed."""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrd.kernel import uevents
from migrd.kernel.uevents import Concern, Uevent, UeventSocket, concern, listen_to_kernel, parse
from tests.fakes.uevents import until

BDF = "0000:41:00.2"
UUID = "0d0d0d0d-1111-2222-3333-444444444444"
PATH = f"/devices/pci0000:40/0000:40:01.0/{BDF}"


def message(action: str, devpath: str, subsystem: str, *more: str) -> bytes:
    lines = [
        f"{action}@{devpath}",
        f"ACTION={action}",
        f"DEVPATH={devpath}",
        f"SUBSYSTEM={subsystem}",
        *more,
        "SEQNUM=4711",
    ]
    return "".join(f"{line}\0" for line in lines).encode()


@dataclass
class Heard:
    """A listener that remembers."""

    events: list[Uevent] = field(default_factory=list)
    losses: int = 0
    error: OSError | None = None

    def event(self, event: Uevent) -> None:
        self.events.append(event)

    def lost(self) -> None:
        self.losses += 1

    def broken(self, error: OSError) -> None:
        self.error = error


# The words ----------------------------------------------------------------------------------------


def test_a_message_of_the_kernel_is_understood() -> None:
    event = parse(message("bind", PATH, "pci", "DRIVER=vfio-pci", f"PCI_SLOT_NAME={BDF}"))
    assert event is not None
    assert (event.action, event.devpath, event.subsystem) == ("bind", PATH, "pci")
    assert event.name == BDF
    assert event.properties["DRIVER"] == "vfio-pci"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0",
        b"libudev\0\xfe\xed\xca\xfe" + bytes(40),
        b"add",
        b"add@relative\0ACTION=add\0DEVPATH=relative\0",
        b"add@/x\0",
        b"add@/x\0ACTION=remove\0DEVPATH=/x\0",
        b"add@/x\0ACTION=add\0DEVPATH=/y\0",
        b"\xff\xff@/x\0ACTION=add\0",
    ],
)
def test_what_is_malformed_is_ignored(raw: bytes) -> None:
    assert parse(raw) is None


@given(st.binary(max_size=300))
def test_no_bytes_at_all_raise(raw: bytes) -> None:
    for whole in (raw, b"add@/" + raw, message("add", PATH, "pci") + raw):
        event = parse(whole)
        assert event is None or concern(event) is None or event.subsystem


@pytest.mark.parametrize(
    ("action", "devpath", "subsystem", "about"),
    [
        ("add", PATH, "pci", Concern(BDF)),
        ("bind", PATH, "pci", Concern(BDF)),
        ("change", PATH, "pci", Concern(BDF)),
        ("unbind", PATH, "pci", Concern(BDF, has_ended=True)),
        ("remove", PATH, "pci", Concern(BDF, has_ended=True)),
        ("add", f"{PATH}/vfio-dev/vfio0", "vfio-dev", Concern(BDF)),
        ("remove", f"{PATH}/vfio-dev/vfio0", "vfio-dev", Concern(BDF, has_ended=True)),
        ("add", f"/devices/virtual/mtty/mtty/{UUID}", "mdev", Concern(UUID)),
        ("remove", f"/devices/virtual/mtty/mtty/{UUID}", "mdev", Concern(UUID, has_ended=True)),
        ("add", f"/devices/virtual/mtty/mtty/{UUID}/vfio-dev/vfio1", "vfio-dev", Concern(UUID)),
        ("add", "/devices/virtual/iommu/dmar0", "iommu", Concern(None)),
        ("add", "/devices/virtual/misc/iommu", "misc", Concern(None)),
        ("add", "/module/vfio_pci_core", "module", Concern(None)),
        ("add", "/module/mlx5_vfio_pci", "module", Concern(None)),
        ("remove", "/module/iommufd", "module", Concern(None)),
        ("add", "/module/e1000e", "module", None),
        ("add", "/bus/pci/drivers/vfio-pci", "drivers", None),
        ("add", f"{PATH}/net/eth0", "net", None),
        ("add", "/devices/pci0000:40/pci_bus/0000:41", "pci_bus", None),
        ("add", "/devices/odd", "pci", None),
        ("add", f"/devices/virtual/mtty/{BDF}", "mdev", None),
        ("add", "/vfio-dev/vfio0", "vfio-dev", None),
        ("change", "/devices/virtual/misc/loop-control", "misc", None),
        ("add", "/devices/virtual/block/loop0", "block", None),
    ],
)
def test_a_message_says_which_device_to_look_at(
    action: str, devpath: str, subsystem: str, about: Concern | None
) -> None:
    event = parse(message(action, devpath, subsystem))
    assert event is not None
    assert concern(event) == about


# The socket ---------------------------------------------------------------------------------------


@pytest.fixture
def sender() -> Iterator[Callable[[bytes], None]]:
    """Sends to the kernel's group as another process could that has CAP_NET_ADMIN."""
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, uevents.NETLINK_KOBJECT_UEVENT)
    with opened:
        yield lambda raw: void(opened.sendto(raw, (0, uevents.KERNEL_GROUP)))


def void(_: object) -> None:
    """For a lambda that is called for what it does."""


def a_device_to_ask() -> Path:
    """Any device of this machine whose `uevent` the kernel lets us write."""
    [first, *_] = sorted(Path("/sys/devices/virtual/mem").glob("*/uevent"))
    return first


def heard_of(subsystem: str, heard: Heard) -> list[Uevent]:
    """Other tests, and the machine itself, have events of their own."""
    return [event for event in heard.events if event.subsystem == subsystem]


async def test_the_real_kernels_messages_are_heard() -> None:
    heard = Heard()
    listening = listen_to_kernel(heard)
    try:
        asked = a_device_to_ask()
        await asyncio.to_thread(asked.write_text, "change")
        await until(lambda: heard_of("mem", heard))
    finally:
        listening.close()
    event = heard_of("mem", heard)[0]
    assert (event.action, f"/sys{event.devpath}") == ("change", str(asked.parent))
    assert heard.losses == 0


async def test_what_another_process_sends_is_dropped(sender: Callable[[bytes], None]) -> None:
    heard = Heard()
    listening = listen_to_kernel(heard)
    try:
        await asyncio.to_thread(sender, message("remove", PATH, "pci"))
        await asyncio.to_thread(a_device_to_ask().write_text, "change")  # comes after it
        await until(lambda: heard_of("mem", heard))
    finally:
        listening.close()
    assert heard_of("pci", heard) == []


async def test_messages_lost_in_a_storm_are_told_and_those_after_it_are_heard(
    sender: Callable[[bytes], None],
) -> None:
    heard = Heard()
    opened = socket.socket(
        socket.AF_NETLINK,
        socket.SOCK_RAW | socket.SOCK_NONBLOCK,
        uevents.NETLINK_KOBJECT_UEVENT,
    )
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    opened.bind((0, uevents.KERNEL_GROUP))

    def storm() -> None:
        for _ in range(100):
            with contextlib.suppress(OSError):  # the sender is told of the loss, too
                sender(message("change", PATH, "pci") + bytes(1000))

    storm()
    listening = UeventSocket(opened, heard)
    try:
        await until(lambda: heard.losses)
        await asyncio.to_thread(a_device_to_ask().write_text, "change")
        await until(lambda: heard_of("mem", heard))
    finally:
        listening.close()
    assert heard.error is None


async def test_a_socket_that_fails_is_closed_and_told_once() -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    here.setblocking(False)
    heard = Heard()
    broken = _Failing(here)
    listening = UeventSocket(broken, heard)
    there.send(b"x")
    await until(lambda: heard.error)
    assert heard.error is not None
    assert broken.fileno() == -1
    listening.close()
    there.close()


class _Failing(socket.socket):
    """A socket that the system has taken away."""

    def __init__(self, opened: socket.socket) -> None:
        super().__init__(fileno=opened.detach())

    def recvmsg(
        self, _size: int, _ancillary: int = 0, _flags: int = 0, /
    ) -> tuple[bytes, list[tuple[int, int, bytes]], int, Any]:
        raise OSError(errno.ENETDOWN, os.strerror(errno.ENETDOWN))


async def test_a_closed_source_is_closed_and_may_be_closed_again() -> None:
    heard = Heard()
    listening = listen_to_kernel(heard)
    listening.close()
    listening.close()
    await asyncio.to_thread(a_device_to_ask().write_text, "change")
    await asyncio.sleep(0)
    assert heard.events == []
