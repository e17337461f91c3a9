"""The next connection of a listening socket, which is lost in no cancellation.

`loop.sock_accept` accepts in a callback: a task that is cancelled before it has its turn drops the
connection, open, and the other side waits for an answer until the garbage is collected.
"""

import asyncio
import socket
from typing import Any

from migrd.direct.packets import settle


async def accepted(listening: socket.socket) -> tuple[socket.socket, Any]:
    """The connection, non-blocking, and its other end's address. Raises OSError."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            plain, address = listening.accept()
        except BlockingIOError:
            ready: asyncio.Future[None] = loop.create_future()
            loop.add_reader(listening, settle, ready)
            try:
                await ready
            finally:
                loop.remove_reader(listening)
        else:
            plain.setblocking(False)
            return plain, address
