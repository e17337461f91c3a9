"""The connection that a migration is sent on."""

from __future__ import annotations

import os
import socket

import pytest

from migrd.core.facts import TransferAddress
from migrd.errors import VmmRefused, VmmTimedOut
from migrd.qemu.stream_socket import NAME, URI, uri_of_stream


class Handed:
    """Stands for QEMU: keeps a duplicate of what it is handed."""

    def __init__(self) -> None:
        self.name = ""
        self.stream: socket.socket | None = None

    async def __call__(self, name: str, fd: int) -> None:
        self.name, self.stream = name, socket.socket(fileno=os.dup(fd))


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
async def test_what_is_written_to_the_stream_is_sent_at_once(
    family: socket.AddressFamily, host: str
) -> None:
    handed = Handed()
    with socket.create_server((host, 0), family=family) as listener:
        port = listener.getsockname()[1]
        assert await uri_of_stream(TransferAddress(host, port), handed) == URI
        assert handed.name == NAME
        assert handed.stream is not None
        accepted, _ = listener.accept()
        with accepted, handed.stream as stream:
            assert stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            stream.sendall(b"memory")
            assert accepted.recv(16) == b"memory"


async def test_where_nobody_listens_qemu_is_given_the_address_to_say_so_itself() -> None:
    handed = Handed()
    assert await uri_of_stream(TransferAddress("127.0.0.1", 1), handed) == "tcp:127.0.0.1:1"
    assert handed.stream is None


async def test_a_name_is_left_to_qemu() -> None:
    assert await uri_of_stream(TransferAddress("host-b", 9), Handed()) == "tcp:host-b:9"


async def test_a_bad_address_is_refused_before_anything_is_connected() -> None:
    with pytest.raises(VmmRefused, match="not a host name"):
        await uri_of_stream(TransferAddress("exec:reboot ", 9), Handed())


async def test_a_connection_that_qemu_did_not_take_is_closed() -> None:
    async def refuse(name: str, fd: int) -> None:
        raise VmmTimedOut("no answer")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(VmmTimedOut):
            await uri_of_stream(TransferAddress("127.0.0.1", port), refuse)
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.recv(16) == b""
