"""Which process is behind a monitor that others made, and what a Vmm knows of its QEMU.

Adopted processes: SO_PEERCRED of a monitor names who called listen(2) on it. That is QEMU itself
where it made the socket, but libvirt or systemd where they made it and passed it on; so the pid
counts only when the command line of that process names the socket. Otherwise the process stays
unknown, which costs the proof of its death and nothing else.
"""

import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from migrd.processes.process import Life, ProcessIdentity, WatchedProcess, identify, look_up_life
from migrd.qemu.sockets import open_socket
from migrd.qemu.wire import MonitorBusy

_UCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid
_SO_ACCEPTCON = 0x10000
"""Flag of a listening socket in /proc/net/unix (include/linux/net.h: __SO_ACCEPTCON)."""


def listener_pid(path: Path) -> int | None:
    """Pid of the process that listens on a unix socket; None when it is not visible from here.

    Connects and leaves again, which takes a place in the listener's short queue until it looks:
    don't repeat it. Raises VmmUnreachable when nobody listens, MonitorBusy when the queue is full.
    """
    with open_socket(path) as plain:
        ucred = plain.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid = int(_UCRED.unpack(ucred)[0])
    return pid if pid > 0 else None


def identify_listener(path: Path) -> ProcessIdentity | None:
    """The QEMU behind a monitor made by others; None when it cannot be told (see above).

    Raises VmmUnreachable when nobody listens.
    """
    try:
        pid = listener_pid(path)
    except MonitorBusy:  # others fill its queue, perhaps ourselves before a restart
        pid = _holder_pid(path)
    identity = identify(pid) if pid is not None else None
    if identity is None or not _names_socket(identity.pid, path):
        return None
    return identity if look_up_life(identity) is Life.ALIVE else None


def _holder_pid(path: Path) -> int | None:
    """Pid of the one process that names this socket and has it open; looks at all processes."""
    holders = []
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(path)}
    for entry in Path("/proc").iterdir():
        if sockets and entry.name.isdigit() and _names_socket(int(entry.name), path):
            try:
                links = {os.readlink(fd) for fd in (entry / "fd").iterdir()}
            except OSError:
                continue  # it has ended, or is not ours to look into
            if links & sockets:
                holders.append(int(entry.name))
    return holders[0] if len(holders) == 1 else None


def _listening_inodes(path: Path) -> set[str]:
    """Of the sockets that listen under this path, or where it leads to (/proc/net/unix)."""
    names = {os.fspath(path), os.path.realpath(path)}
    found = set()
    with open("/proc/net/unix", errors="replace") as table:
        for line in table:
            words = line.rstrip("\n").split(None, 7)
            if len(words) == 8 and words[7] in names and int(words[3], 16) & _SO_ACCEPTCON:
                found.add(words[6])
    return found


def _names_socket(pid: int, path: Path) -> bool:
    """Whether the command line of the process has the socket's name in it."""
    names = {os.fsencode(path.name), os.fsencode(Path(os.path.realpath(path)).name)}
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return any(name in command for name in names)


@dataclass(frozen=True, slots=True)
class Attachment:
    """One QEMU, as its Vmm needs to know it."""

    vm: str
    instance: str
    qmp_path: Path
    oob_path: Path | None
    """None for an adopted VM with one monitor only: then nothing answers while that is blocked."""
    process: WatchedProcess
