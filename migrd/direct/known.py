"""A process that the launcher holds: how it is held, and how a start that did not work is ended."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from migrd.core.facts import VmSpec
from migrd.direct.handoff import HandedOver
from migrd.direct.instances import Found, Instance, LaunchRecord
from migrd.direct.vmm import DirectVmm
from migrd.engine.threads import in_thread
from migrd.errors import MigrdError, VmmDied, VmmError, VmmTimedOut, VmmUnreachable
from migrd.processes.instance import lock_says
from migrd.processes.process import Life, ProcessIdentity, WatchedProcess, identify

FIRST_CONNECT_S: Final = 2.0
"""How long `find` waits for those it has found: a client tries again at least once a second."""
LOOK_S: Final = 0.05
END_DEADLINE_S: Final = 10.0
EXIT_FOLLOWS_S: Final = 0.25
_REST_LOOKS: Final = 100
_REST_PAUSE_S: Final = 0.01

log = logging.getLogger(__name__)


@dataclass
class Known:
    """A process that the launcher holds."""

    vmm: DirectVmm
    process: WatchedProcess
    spec: VmSpec
    at: Instance
    is_adopted: bool
    has_output: bool = False

    async def close(self) -> None:
        """End our transfers and stop watching; the process goes on."""
        await self.vmm.close()
        self.process.close()


async def end_failed(known: Known, cause: BaseException) -> VmmError:
    """End a process whose start did not work (no guest has ever run in it that anybody knows
    of), and return what to tell. Its files are removed once it is proven dead, and only then.
    """
    process, at = known.process, known.at
    await known.vmm.close()
    grace_s = EXIT_FOLLOWS_S if isinstance(cause, VmmUnreachable) else 0.0
    if not await process.wait_dead(within_s=grace_s):
        with contextlib.suppress(VmmError):
            process.kill()
    why = cause.message if isinstance(cause, MigrdError) else str(cause) or "it was given up"
    is_over = await process.wait_dead(within_s=END_DEADLINE_S)
    if not is_over or not await in_thread(_nothing_left, at):
        process.close()
        text = f"{at.vm} did not start ({why}), and it is not proven that nothing is left of it"
        log.error("%s: pid %s, %s", text, process.pid, at.directory)
        return VmmTimedOut(text)
    words = at.last_words()
    with contextlib.suppress(OSError):
        await in_thread(at.remove)
    text = f"the process of {at.vm} did not start ({process.ending}): {words or why}"
    return VmmDied(text, code="vmm_start_failed")


async def first_connect(known: Known) -> None:
    with contextlib.suppress(MigrdError):
        await known.vmm.guest.connected(within_s=FIRST_CONNECT_S)


def adopted_record(vm: str, name: str, identity: ProcessIdentity) -> LaunchRecord:
    return LaunchRecord(
        spec=VmSpec(vm, None),
        instance=name,
        incoming=False,
        argv=(),
        digest="",
        requested_wall_s=time.time(),
        identity=identity,
        is_adopted=True,
    )


def note_adopted(at: Instance, record: LaunchRecord) -> None:
    """Blocking. Raises OSError."""
    with contextlib.suppress(FileExistsError):
        at.make()
    record.write(at)


def _nothing_left(at: Instance) -> bool:
    """Whether nothing of this launch lives, by the lock. Blocking, for a second."""
    for _ in range(_REST_LOOKS):
        if lock_says(at) is Life.DEAD:
            return True
        time.sleep(_REST_PAUSE_S)
    return False


async def noted(found: Found, stranger: Callable[[Instance], HandedOver | None]) -> Found:
    """One whose process was never noted (the daemon was killed just then) says who it is.

    `stranger` gives the hand-over that names this instance, if there is one by now."""
    record, at = found.record, found.instance
    if found.life is not Life.UNKNOWN or record is None or record.identity is not None:
        return found
    client, give_up_at_s = stranger(at), time.monotonic() + FIRST_CONNECT_S
    while client is None and time.monotonic() < give_up_at_s:
        await asyncio.sleep(LOOK_S)
        client = stranger(at)
    identity = None if client is None else await in_thread(identify, client.pid)
    if client is None or identity is None or not client.is_connected:
        return found
    with client.held():
        pidfd = os.dup(client.pidfd)
    record = record.with_identity(identity)
    with contextlib.suppress(OSError):
        await in_thread(record.write, at)
    return Found(at, record, Life.ALIVE, pidfd)
