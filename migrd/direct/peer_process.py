"""The process at the other end of a unix socket: who it is, and the proof of its death.

    SO_PEERCRED   pid and uid, as of its connect(2)
    SO_PEERPIDFD  a pidfd of that very process (Linux 6.5); before it, pidfd_open by pid, and the
                  process must be older than its connection: a pid used again is a younger one

The pidfd is readable once the process has ended, all its threads included: the one proof of death.
"""

import asyncio
import errno
import os
import select
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from migrd.direct.packets import settle
from migrd.errors import NotAuthorized, VmmUnreachable

_UCRED: Final = struct.Struct("3i")
_SO_PEERPIDFD: Final = 77
_START_TIME: Final = 19
"""Field 22 of /proc/<pid>/stat (proc(5)), counted from behind the command's name."""


@dataclass(frozen=True)
class PeerProcess:
    """Owns `pidfd`."""

    pid: int
    uid: int
    pidfd: int

    @classmethod
    def of(cls, plain: socket.socket) -> Self:
        """Blocking (may read /proc). Raises VmmUnreachable: it ended already; NotAuthorized: it
        is in a pid namespace that this one does not see."""
        accepted_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        raw = plain.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, _ = _UCRED.unpack(raw)
        if pid <= 0:
            raise NotAuthorized(
                "pid: the process is not seen from migrd's pid namespace, so its death could not "
                "be proven; run migrd in that namespace or in one above it"
            )
        try:
            return cls(pid, uid, _pidfd(plain, pid, accepted_s))
        except OSError as failure:
            raise VmmUnreachable(f"process {pid} ended before it was known: {failure}") from failure

    @property
    def is_dead(self) -> bool:
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def is_same(self, other: "PeerProcess") -> bool:
        """Whether both are one process, which is alive: a pid is not given out twice meanwhile."""
        return self.pid == other.pid and not self.is_dead

    async def death(self) -> None:
        """Return once it is dead."""
        loop = asyncio.get_running_loop()
        dead: asyncio.Future[None] = loop.create_future()
        watch = os.dup(self.pidfd)  # several may wait, and a loop watches a descriptor once
        loop.add_reader(watch, settle, dead)
        try:
            await dead
        finally:
            loop.remove_reader(watch)
            os.close(watch)

    def close(self) -> None:
        os.close(self.pidfd)


def _pidfd(plain: socket.socket, pid: int, accepted_s: float) -> int:
    try:
        return plain.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as failure:
        if failure.errno != errno.ENOPROTOOPT:
            raise
    pidfd = os.pidfd_open(pid)
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        started_s = int(after_name[_START_TIME]) / os.sysconf("SC_CLK_TCK")
        if started_s > accepted_s:
            raise ProcessLookupError(f"pid {pid} is another process by now")
    except BaseException:
        os.close(pidfd)
        raise
    return pidfd
