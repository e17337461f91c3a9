"""Which process is which: over restarts of this daemon, and however often a pid is used again.

A pid alone is no name: it is given to somebody else as soon as its process is reaped. Here a
process is named by pid + start time + boot + pid namespace, and held by a pidfd:

                    other boot, no such pid, other start time
    identity ──────────────────────────────────────────────────► DEAD     (proof)
        │   ──── not readable, other pid namespace ────────────► UNKNOWN  (never taken for dead)
        └─ pidfd opened, then the start time compared ─────────► ALIVE ── pidfd readable ──► DEAD

Rules
1. First the pidfd, then the comparison: what the pidfd holds cannot be exchanged between the two.
2. A pidfd is readable when the whole process has exited, threads included (pidfd_open(2)): that is
   the proof of death. It holds for a zombie too: its memory is gone, and it never runs again.
3. Signals go through the pidfd (pidfd_send_signal(2)), and only to what migrd itself launched.
4. Our own child is reaped (waitid on the pidfd) as soon as it is seen dead, without a thread; a
   child of an earlier daemon was left to init, and its exit code is not known.
"""

import asyncio
import errno
import os
import select
import signal
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Self

from migrd.errors import VmmRefused

_STATE, _START_TIME = 0, 19
"""Fields 3 and 22 of /proc/<pid>/stat (proc(5)), counted from behind the command's name."""


class Life(Enum):
    """What is proven of a process."""

    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """Names one process for ever, unlike its pid."""

    pid: int
    start_ticks: int
    """When it started, in clock ticks since boot."""
    boot_id: str
    pid_namespace: int
    """Inode of the namespace that `pid` is counted in."""

    @classmethod
    def of_json(cls, fields: object) -> Self | None:
        """From what `as_json` gave; None when it is not that."""
        if not isinstance(fields, dict):
            return None
        numbers = [fields.get(key) for key in ("pid", "start_ticks", "pid_namespace")]
        boot = fields.get("boot_id")
        if not all(type(n) is int and n >= 0 for n in numbers) or not isinstance(boot, str):
            return None
        return cls(**{key: fields[key] for key in cls.__slots__}) if numbers[0] else None

    def as_json(self) -> Mapping[str, object]:
        return asdict(self)


@cache
def boot_id() -> str:
    """This boot's id, from the kernel; another after each boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@cache
def _own_pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def identify(pid: int) -> ProcessIdentity | None:
    """Name the process that has this pid now; None when there is none, or it cannot be read.

    Blocking (reads /proc): off the event loop only, as all functions here but WatchedProcess.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    try:
        start_ticks = _start_ticks(pid)
        if start_ticks is None or _has_exited(pidfd):  # exited: the pid may be somebody else's
            return None
        return ProcessIdentity(pid, start_ticks, boot_id(), _own_pid_namespace())
    finally:
        os.close(pidfd)


def hold_child(pid: int) -> tuple[ProcessIdentity, int]:
    """Name our own child, which nobody has reaped yet, and a pidfd of it (the caller's to close).

    Works for one that has exited already. Blocking. Raises OSError.
    """
    pidfd = os.pidfd_open(pid)
    start_ticks = _start_ticks(pid)
    if start_ticks is None:
        os.close(pidfd)
        raise OSError(errno.EACCES, "its /proc entry cannot be read", f"/proc/{pid}/stat")
    return ProcessIdentity(pid, start_ticks, boot_id(), _own_pid_namespace()), pidfd


def look_up(identity: ProcessIdentity) -> tuple[Life, int | None]:
    """What is proven of this process now, and a pidfd of it (the caller's to close) if ALIVE."""
    if identity.boot_id != boot_id():
        return Life.DEAD, None
    if identity.pid_namespace != _own_pid_namespace():
        return Life.UNKNOWN, None
    try:
        pidfd = os.pidfd_open(identity.pid)
    except OSError as failure:
        # EINVAL, newer kernels ENOENT: the number is a mere thread's now
        is_gone = failure.errno in (errno.ESRCH, errno.EINVAL, errno.ENOENT)
        return (Life.DEAD if is_gone else Life.UNKNOWN), None
    life = _compare(identity, pidfd)
    if life is Life.ALIVE:
        return life, pidfd
    os.close(pidfd)
    return life, None


def _compare(identity: ProcessIdentity, pidfd: int) -> Life:
    start_ticks = _start_ticks(identity.pid)
    if _has_exited(pidfd):
        return Life.DEAD
    if start_ticks is None:
        return Life.UNKNOWN  # e.g. /proc mounted with hidepid
    return Life.ALIVE if start_ticks == identity.start_ticks else Life.DEAD


def _start_ticks(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        # the command's name stands in brackets, and may itself contain blanks and brackets
        return int(text.rpartition(")")[2].split()[_START_TIME])
    except (OSError, ValueError, IndexError):
        return None


def _has_exited(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def kill_once(identity: ProcessIdentity) -> None:
    """SIGKILL to exactly this process, if it still lives. Blocking."""
    life, pidfd = look_up(identity)
    if pidfd is None:
        return
    try:
        if life is Life.ALIVE:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except OSError:
        pass  # it has exited, or is not ours to signal: looking again will tell
    finally:
        os.close(pidfd)


def look_up_life(identity: ProcessIdentity) -> Life:
    """`look_up` without a pidfd."""
    life, pidfd = look_up(identity)
    if pidfd is not None:
        os.close(pidfd)
    return life


class WatchedProcess:
    """One process, watched by the event loop until it dies. Made on the loop; `close` ends it.

    ours, alive       pidfd    `kill` works, the exit code is known if it is our child
    adopted, alive    pidfd    `kill` is refused
    unknown           -        never said to be dead
    dead              -        for the rest of this daemon's life
    """

    def __init__(
        self,
        identity: ProcessIdentity | None,
        life: Life,
        pidfd: int | None,
        *,
        is_ours: bool,
    ) -> None:
        """As `look_up` answered; owns `pidfd` from here on."""
        self.identity = identity
        self.is_ours = is_ours
        self.exit_code: int | None = None
        """As subprocess has it: negative for a signal. None: alive, or not known."""
        self._life = life
        self._pidfd = pidfd
        self._loop = asyncio.get_running_loop()
        self._dead = asyncio.Event()
        self._callbacks: list[Callable[[], None]] = []
        if pidfd is not None:
            self._loop.add_reader(pidfd, self._look)
        if life is Life.DEAD:
            self._dead.set()

    @property
    def pid(self) -> int | None:
        """Also after its death, to name it; never to signal it."""
        return self.identity.pid if self.identity is not None else None

    @property
    def is_dead(self) -> bool:
        """Proven dead; asks the kernel, so it is true from the moment of the exit."""
        self._look()
        return self._life is Life.DEAD

    @property
    def ending(self) -> str:
        """How it ended, for people."""
        if self.exit_code is None:
            return "exit code not known"
        if self.exit_code >= 0:
            return f"exit code {self.exit_code}"
        try:
            return f"killed by {signal.Signals(-self.exit_code).name}"
        except ValueError:
            return f"killed by signal {-self.exit_code}"

    async def wait_dead(self, *, within_s: float) -> bool:
        """True as soon as it is proven dead; False when it was not within `within_s`."""
        try:
            async with asyncio.timeout(within_s):
                await self._dead.wait()
        except TimeoutError:
            pass
        return self.is_dead

    def call_when_dead(self, callback: Callable[[], None]) -> None:
        """Call once, soon after it is proven dead; at once where it is already."""
        if self._life is Life.DEAD:
            self._loop.call_soon(callback)
        else:
            self._callbacks.append(callback)

    def kill(self) -> None:
        """SIGKILL, to this process and no other. Returns at once; nothing happens to a dead one.

        Raises VmmRefused for one that migrd did not launch, or that cannot be signalled.
        """
        if self.is_dead:
            return
        if not self.is_ours:
            raise VmmRefused(f"pid {self.pid} was launched by others: never killed from here")
        if self._pidfd is None:
            raise VmmRefused(f"pid {self.pid}: not proven to be ours, so not killed")
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has exited just now: the pidfd will say so
        except OSError as failure:
            raise VmmRefused(f"pid {self.pid} cannot be killed: {failure}") from failure

    def close(self) -> None:
        """Stop watching; the process is left as it is."""
        self._release()
        self._callbacks.clear()

    def _look(self) -> None:
        if self._pidfd is None or not _has_exited(self._pidfd):
            return
        self.exit_code = _reap(self._pidfd)
        self._life = Life.DEAD
        self._release()
        self._dead.set()
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            self._loop.call_soon(callback)

    def _release(self) -> None:
        pidfd, self._pidfd = self._pidfd, None
        if pidfd is not None:
            self._loop.remove_reader(pidfd)
            os.close(pidfd)


def _reap(pidfd: int) -> int | None:
    """Exit code of our own child, which is no zombie afterwards; None for anybody else's."""
    try:
        status: Any = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except OSError:  # ECHILD: not our child, or reaped already
        return None
    if status is None:
        return None
    code = int(status.si_status)
    return code if status.si_code == os.CLD_EXITED else -code
