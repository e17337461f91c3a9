"""Directories, fsync, and the journal: tried without leaving anything behind."""

import asyncio
import contextlib
import fcntl
import os
import pwd
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Final

from migrd.config import Settings
from migrd.doctor.finding import Check, Finding, fail, ok, warn
from migrd.engine.ports import Replay
from migrd.errors import JournalError
from migrd.journal.sqlite import open_journal

SLOW_FSYNC_S: Final = 0.1
LEAST_FREE_BYTES: Final = 256 << 20
MAX_COPIED_BYTES: Final = 1 << 30
_FORGETFUL: Final = frozenset({"tmpfs", "ramfs"})
_REMOTE: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "fuse.sshfs", "glusterfs"})
_NO_OLDER: Final = (
    "put no older copy back: it does not know what was granted since, and a guest could run twice"
)


def checks(settings: Settings) -> list[Check]:
    journal = settings.journal.path
    return [
        Check("state directory", blocking=partial(look_at_state, settings.host.state_dir)),
        Check("runtime directory", blocking=partial(look_at_runtime, settings.host.runtime_dir)),
        *(
            [Check("journal's directory", blocking=partial(look_at_state, journal.parent))]
            if journal.parent != settings.host.state_dir
            else []
        ),
        Check("journal", blocking=partial(look_at_journal, journal)),
    ]


def look_at_runtime(directory: Path) -> Finding:
    """Blocking."""
    return _unusable("runtime directory", directory) or ok("runtime directory", str(directory))


def look_at_state(directory: Path) -> Finding:
    """Blocking: does what is written there stay, and how long does that take?"""
    name = "state directory"
    unusable = _unusable(name, directory)
    if unusable is not None:
        return unusable
    there = _nearest(directory)
    kind = file_system_of(there)
    if kind in _REMOTE:
        message = f"{directory} is on {kind}: the journal's locking and fsync cannot be trusted"
        return fail(name, message, "name a directory on a local disk: host.state_dir")
    if kind in _FORGETFUL:
        message = f"{directory} is on {kind}: a reboot forgets who owns which guest"
        return warn(name, message, "name a directory on a disk: host.state_dir")
    free_bytes = shutil.disk_usage(there).free
    fsync_s = _fsync_s(there)
    said = f"{directory}: fsync {fsync_s * 1000:.1f} ms, {free_bytes >> 20} MiB free"
    if free_bytes < LEAST_FREE_BYTES:
        return warn(name, said, f"make room: df -h {there}")
    if fsync_s > SLOW_FSYNC_S:
        cure = "put host.state_dir on a faster disk: two fsyncs are part of every blackout"
        return warn(name, said, cure)
    return ok(name, said)


def _nearest(directory: Path) -> Path:
    """The directory, or what is there of the way to it."""
    return next(path for path in (directory, *directory.parents) if path.exists())


def _unusable(name: str, directory: Path) -> Finding | None:
    there = _nearest(directory)
    user = _user()
    if not there.is_dir():
        return fail(name, f"{there} is no directory", f"move it away: mv {there} {there}.old")
    if not os.access(there, os.W_OK | os.X_OK):
        message = f"{there} cannot be written by {user}"
        return fail(name, message, f"install -d -m 0750 -o {user} {directory}")
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
            file.flush()
    except OSError as failure:
        message = f"nothing can be written to {there}: {failure.strerror}"
        return fail(name, message, f"look at it: df -h {there}; mount | grep {there}")
    return None


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _fsync_s(directory: Path) -> float:
    """The median of three."""
    took = []
    with tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(3):
            file.write(b"x" * 4096)
            file.flush()
            begun_s = time.monotonic()
            os.fsync(file.fileno())
            took.append(time.monotonic() - begun_s)
    return sorted(took)[1]


def file_system_of(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The kind of file system, as the kernel names it (proc(5), mountinfo); "" when not found."""
    try:
        device = os.stat(path).st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        lines = mounts.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        before, _, after = line.partition(" - ")
        if before.split(" ")[2:3] == [wanted]:
            return after.split(" ")[0]
    return ""


def look_at_journal(path: Path) -> Finding:
    """Blocking. Opens and replays a copy: the real one is left to its owner."""
    if not path.exists():
        lock = path.with_name(path.name + ".lock")
        if lock.exists() and lock.stat().st_size:
            message = f"{path} is gone, but {lock.name} says that there was one"
            cure = (
                f"{_NO_OLDER}\nput {path}* back if they were only moved; else find out where each "
                f"guest of this host runs, move {path}* away, and start anew"
            )
            return fail("journal", message, cure)
        return ok("journal", f"{path} will be made at the first start")
    if _is_in_use(path):
        return ok("journal", f"{path} is in use: a daemon runs here")
    if path.stat().st_size > MAX_COPIED_BYTES:
        return ok("journal", f"{path} is too large to be tried on a copy; not looked at")
    with tempfile.TemporaryDirectory(prefix="migrd-doctor-") as scratch:
        copy = Path(scratch) / path.name
        for suffix in ("", "-wal", ".lock"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(f"{path}{suffix}", f"{copy}{suffix}")
        try:
            replay = asyncio.run(_replay(copy))
        except JournalError as error:
            message = error.message.replace(str(copy), str(path))
            return fail("journal", message, f"keep all of {path}*\n{_NO_OLDER}")
    moves = len(replay.outgoing) + len(replay.incoming)
    return ok("journal", f"{path}: {len(replay.vms)} VMs, {moves} migrations")


async def _replay(path: Path) -> Replay:
    async with open_journal(path) as journal:
        return await journal.replay()


def _is_in_use(path: Path) -> bool:
    try:
        with path.with_name(path.name + ".lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
