"""A listening SOCK_SEQPACKET socket, with the right owner and mode before anyone connects.

The file is bound, given its group and mode, and only then listened on. One that a dead daemon left
is replaced; one that somebody listens on is an error. Both are decided under a lock on the
directory, so two daemons that start together cannot take each other's. Blocking.
"""

import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from migrd.errors import ConfigError

_BACKLOG: Final = 128


def listen(path: Path, *, mode: int, gid: int | None) -> socket.socket:
    """Non-blocking. Raises ConfigError."""
    plain = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        with _locked(path.parent) as directory:
            short = f"/proc/self/fd/{directory}/{path.name}"  # a path may be longer than sun_path
            _replace_dead(path, short)
            plain.bind(short)
            try:
                if gid is not None:
                    os.chown(short, -1, gid)
                os.chmod(short, mode)
                plain.listen(_BACKLOG)
            except BaseException:
                os.unlink(short)
                raise
    except OSError as failure:
        plain.close()
        raise ConfigError(
            f"direct.socket: cannot listen on {path}: {failure.strerror}; see to it that its "
            "directory is there and can be written"
        ) from failure
    except BaseException:
        plain.close()
        raise
    return plain


def unlink_own(path: Path, inode: int) -> None:
    """Remove the socket file, unless another daemon has put its own there since."""
    with suppress(OSError), _locked(path.parent):
        if os.stat(path).st_ino == inode:
            os.unlink(path)


@contextmanager
def _locked(directory: Path) -> Iterator[int]:
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield opened
    finally:
        os.close(opened)


def _replace_dead(path: Path, short: str) -> None:
    try:
        found = os.lstat(short)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(
            f"direct.socket: {path} is there and no socket; remove it, or name another"
        )
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    with probe:
        try:
            probe.connect(short)
        except ConnectionRefusedError:
            os.unlink(short)
            return
        except OSError:  # its queue is full, or another kind of socket: somebody listens
            pass
    raise ConfigError(f"direct.socket: somebody listens on {path} already; is migrd running?")
