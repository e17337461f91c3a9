"""The connection that a migration is sent on, made here and handed to QEMU.

    connect ── TCP_NODELAY ── getfd ──► migrate fd:migrd-stream

QEMU leaves Nagle's algorithm on (7.2 and 10.0, seen). The last of the device state does not fill a
segment, so the source's kernel holds it back until what went before is acknowledged, and the
destination's kernel, which has nothing to send, puts that off for 40 ms: with the guest stopped.
The messages of a TLS handshake meet the same.

Only where there is one stream: more channels, and the recovery of a postcopy, need an address. Only
to an address, not a name: looking that up can take long. And where no connection comes about, QEMU
is given the address after all: it then says in its own words, and in its own way, what is wrong.

A destination takes one connection in its life. A daemon that is killed between this one and
`migrate`, within a millisecond or two, has used it up: the next daemon's try then fails, and the
migration is rolled back, where it could have gone on had nothing been connected yet.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from typing import Final

from migrd.core.facts import TransferAddress
from migrd.qemu import migration

NAME: Final = "migrd-stream"
URI: Final = f"fd:{NAME}"
CONNECT_S: Final = 1.0


async def uri_of_stream(
    address: TransferAddress, send_fd: Callable[[str, int], Awaitable[None]]
) -> str:
    """What to tell `migrate`: URI once QEMU has the connection, else the address itself.

    Raises VmmRefused (`bad_address`), and what `send_fd` raises: the connection is closed then.
    """
    uri = migration.tcp_uri(address)
    stream = await _connected(address)
    if stream is None:
        return uri
    with stream:
        await send_fd(NAME, stream.fileno())
    return URI


async def _connected(address: TransferAddress) -> socket.socket | None:
    try:
        version = ipaddress.ip_address(address.host).version
    except ValueError:
        return None
    stream = socket.socket(socket.AF_INET6 if version == 6 else socket.AF_INET)
    try:
        stream.setblocking(False)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with asyncio.timeout(CONNECT_S):
            where = (address.host, address.port)
            await asyncio.get_running_loop().sock_connect(stream, where)
    except OSError:  # TimeoutError is one
        stream.close()
        return None
    except BaseException:
        stream.close()
        raise
    return stream
