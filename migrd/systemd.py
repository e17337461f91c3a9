"""What systemd is told, and what it hands over. Without systemd everything here does nothing.

    sd_notify(3)    datagrams to $NOTIFY_SOCKET: READY, RELOADING, STOPPING, STATUS, WATCHDOG
    sd_watchdog_enabled(3)   $WATCHDOG_USEC: say WATCHDOG=1 at least so often, or be killed
    sd_listen_fds(3)         $LISTEN_FDS sockets from descriptor 3 on, for this $LISTEN_PID

Rules
1. A message is sent without waiting, and a failure to send it is no failure of ours: systemd acts
   on what it does not hear.
2. The watchdog is fed from the event loop at half the time, so a loop that hangs is not fed for;
   and not after a look back at a loop that hung for that long either.
3. The variables are taken out of the environment: QEMU is not to speak to systemd in our name.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Final

log = logging.getLogger(__name__)

FIRST_FD: Final = 3
MAX_FDS: Final = 64
MAX_STATUS_CHARS: Final = 500


class Notifier:
    """Tells systemd how the daemon is doing."""

    def __init__(self, environ: MutableMapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        self._address = _address(environ.pop("NOTIFY_SOCKET", ""))
        self.watchdog_s = _watchdog_s(environ)
        """Time between two feedings at most, in seconds; None when there is no watchdog."""
        for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
            environ.pop(name, None)

    @property
    def is_heard(self) -> bool:
        """Whether there is a systemd to tell."""
        return self._address is not None

    def ready(self, status: str = "") -> bool:
        """Start-up (or a reload) is over."""
        return self._send("READY=1", *_status(status))

    def reloading(self) -> bool:
        """A reload begins; `ready` ends it."""
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        return self._send("RELOADING=1", f"MONOTONIC_USEC={now_us}")

    def stopping(self, status: str = "") -> bool:
        """The daemon is going down on purpose."""
        return self._send("STOPPING=1", *_status(status))

    def status(self, text: str) -> bool:
        """One line for people, in `systemctl status`."""
        return self._send(*_status(text))

    def feed(self) -> bool:
        """The watchdog hears that we live."""
        return self._send("WATCHDOG=1")

    async def feed_watchdog(self, worst_lag_s: Callable[[], float] | None = None) -> None:
        """Feed it for ever, while the loop is healthy; returns at once when there is none.

        `worst_lag_s` tells the loop's worst lag since it was last asked, in seconds.
        """
        if self.watchdog_s is None or not self.is_heard:
            return
        interval_s = self.watchdog_s / 2
        while True:
            lag_s = 0.0 if worst_lag_s is None else worst_lag_s()
            if lag_s < interval_s:
                self.feed()
            else:
                log.warning("the event loop hung for %.1f s: the watchdog is not fed", lag_s)
            await asyncio.sleep(interval_s)

    def _send(self, *assignments: str) -> bool:
        """Whether the message was handed to the kernel; never raises, never waits."""
        if self._address is None or not assignments:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as plain:
                plain.setblocking(False)
                plain.sendto("\n".join(assignments).encode(), self._address)
        except OSError as failure:
            log.debug("systemd was not told %s: %s", assignments[0], failure)
            return False
        return True


def _address(text: str) -> str | None:
    """The socket's address: a path, or an abstract name (`@name`); others are not ours."""
    if text.startswith("@"):
        return "\0" + text[1:]
    return text if text.startswith("/") else None


def _status(text: str) -> tuple[str, ...]:
    # a line feed would begin another assignment
    line = " ".join(text.split())[:MAX_STATUS_CHARS]
    return (f"STATUS={line}",) if line else ()


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        microseconds = int(environ["WATCHDOG_USEC"])
    except (KeyError, ValueError):
        return None
    return microseconds / 1e6 if microseconds > 0 else None


@dataclass(frozen=True)
class Inherited:
    """One listening socket that systemd opened for us."""

    name: str
    """FileDescriptorName= of the socket unit; "" when it has none."""
    socket: socket.socket


def listen_fds(environ: MutableMapping[str, str] | None = None) -> tuple[Inherited, ...]:
    """The sockets that systemd hands over, once: the variables are gone afterwards.

    The caller owns them. None when the variables are for another process, or make no sense.
    """
    environ = os.environ if environ is None else environ
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isascii() or not count.isdecimal():
        return ()
    found: list[Inherited] = []
    for offset in range(min(int(count), MAX_FDS)):
        fd = FIRST_FD + offset
        try:
            os.set_inheritable(fd, False)
            plain = socket.socket(fileno=fd)
        except OSError as failure:
            log.warning("descriptor %d from systemd is no socket: %s", fd, failure)
            continue
        plain.setblocking(False)
        found.append(Inherited(names[offset] if offset < len(names) else "", plain))
    return tuple(found)
