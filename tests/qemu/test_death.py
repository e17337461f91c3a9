"""How a QEMU died: what it had said before counts, in whatever order the news of it arrive."""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator

import pytest

from migrd.engine.ports import TransferFeed
from migrd.errors import VmmDied
from migrd.processes.process import Life, WatchedProcess
from migrd.qemu.attachment import Attachment
from migrd.qemu.machine import Machine
from tests.qemu.conftest import Served
from tests.qemu.test_qmp import until


class Doomed:
    """A process of our own, and the watch over it."""

    def __init__(self) -> None:
        self.child = subprocess.Popen(["sleep", "600"])
        pidfd = os.pidfd_open(self.child.pid)
        self.watch = WatchedProcess(None, Life.ALIVE, pidfd, is_ours=True)

    def die(self) -> None:
        """Returns when it is dead, with the loop held up meanwhile."""
        self.child.kill()
        os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT)
        assert self.watch.is_dead

    def close(self) -> None:
        self.watch.close()
        self.child.kill()
        self.child.wait(5)


@pytest.fixture
async def doomed() -> AsyncIterator[Doomed]:
    process = Doomed()
    yield process
    process.close()


async def death(feed: TransferFeed) -> VmmDied:
    """What the feed ends with."""
    try:
        async with asyncio.timeout(5):
            while True:
                await feed.newer(within_s=5)
    except VmmDied as died:
        return died


@pytest.mark.parametrize("has_said", [True, False])
async def test_the_last_words_of_a_qemu_seen_dead_at_once_are_read(
    served: Served, doomed: Doomed, has_said: bool
) -> None:
    """Whoever looks at the process sees its death before the loop has read its socket again."""
    machine = Machine(Attachment("guest", "1", served.path, None, doomed.watch))
    machine.start()
    await machine.wait_connected(within_s=5)
    async with machine.feed() as feed:
        await until(lambda: "query-migrate" in served.qemu.received)  # the feed is at work
        if has_said:
            await served.qemu.emit("SHUTDOWN", {"guest": True, "reason": "guest-reset"})
        doomed.die()
        served.qemu.monitors[0].hang_up()
        died = await death(feed)
    assert died.code == ("guest_shut_down" if has_said else "vmm_died")
    await machine.close()
