"""Connections are taken one by one, and none is lost."""

from __future__ import annotations

import asyncio
import socket

from migrd.direct.accepting import accepted


async def test_a_connection_that_came_just_before_a_cancellation_is_there_for_the_next() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        task = asyncio.create_task(accepted(listening))
        await asyncio.sleep(0)
        with socket.create_connection(listening.getsockname()):
            for _ in range(2):  # the loop has seen it then, and the task has not had its turn
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            async with asyncio.timeout(5):
                plain, _ = await accepted(listening)
            assert plain.gettimeout() == 0.0
            plain.close()


async def test_connections_that_come_while_nobody_looks_are_all_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        others = [socket.create_connection(listening.getsockname()) for _ in range(5)]
        for _ in others:
            plain, _ = await accepted(listening)
            plain.close()
        for other in others:
            other.close()
