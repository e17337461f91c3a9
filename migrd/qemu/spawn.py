"""Starting one QEMU so that it outlives this daemon.

- A session of its own (no terminal, no signal meant for our process group reaches it), cwd `/`,
  stdin from /dev/null, stdout and stderr to the instance's log. No other descriptor of ours but
  those of its passthrough devices: they have the same numbers there as here, so none below 3.
- The limit of memory it may lock is raised for passthrough devices, and for those QEMUs only
  (migrd.qemu.memlock).
- An environment of almost nothing: what the daemon was given (tokens, NOTIFY_SOCKET, LISTEN_FDS) is
  no business of a guest's.
- umask 077: sockets and logs are for this user only.
- No shell, no preexec_fn: subprocess can then use vfork, and a large daemon starts QEMU as fast as
  a small one.

Under systemd a service's processes die with it unless the unit says otherwise. The unit needs
`KillMode=process` (a stop ends the daemon alone), `RuntimeDirectoryPreserve=yes` (the instance
directories stay) and `OOMPolicy=continue` (a QEMU killed for memory does not stop the daemon).

Everything here blocks: off the event loop only.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from migrd.errors import Conflict, VmmDied
from migrd.qemu import memlock
from migrd.qemu.instances import Instance, LaunchRecord, open_locked_log
from migrd.qemu.process import ProcessIdentity, hold_child

PASSED_ON: Final = ("PATH", "TMPDIR", "TZ")
"""What QEMU gets of our environment."""


@dataclass(frozen=True, slots=True)
class Inheritance:
    """What a QEMU gets of this process, besides the log."""

    environment: Mapping[str, str]
    fds: tuple[int, ...] = ()
    """All above 2."""
    locked_bytes: int = 0
    """So much memory it must be able to lock; 0: no more than this process."""


@dataclass(frozen=True, slots=True)
class Child:
    """A process just started; `pidfd` is the holder's to close."""

    identity: ProcessIdentity
    pidfd: int


def spawn(
    instance: Instance,
    record: LaunchRecord,
    inheritance: Inheritance,
    started: list[Child],
) -> None:
    """Make the directory, write the intent, start QEMU, note its identity.

    The child is put into `started` as soon as there is one, so that a caller who was cancelled
    meanwhile can still end it. Raises Conflict when the instance exists, VmmDied (with nothing
    started, and the directory gone) when it cannot be started.
    """
    try:
        instance.directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        instance.directory.mkdir(mode=0o700)
    except FileExistsError:
        text = f"{instance.vm} has an instance {instance.name} already: {instance.directory}"
        raise Conflict(text, code="instance_exists") from None
    except OSError as failure:
        raise _not_started(instance, failure, "see to `host.runtime_dir`") from failure
    try:
        log_fd = open_locked_log(instance)
        try:
            record.write(instance)
            _start(record.argv, inheritance, log_fd, started)
        finally:
            os.close(log_fd)  # QEMU's own copy keeps the lock
        record.with_identity(started[0].identity).write(instance)
    except OSError as failure:
        if started:
            raise  # the caller ends it
        with contextlib.suppress(OSError):
            instance.remove()
        cure = f"install QEMU, or mend `binary` of profile {record.spec.profile}"
        is_binary = failure.filename in (record.argv[0], None)
        raise _not_started(
            instance, failure, cure if is_binary else "see to `host.runtime_dir`"
        ) from failure


def _start(
    argv: Sequence[str], inheritance: Inheritance, log_fd: int, started: list[Child]
) -> None:
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    with memlock.inherited(inheritance.locked_bytes):
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            cwd="/",
            env={"LC_ALL": "C.UTF-8", **kept, **inheritance.environment},
            start_new_session=True,
            umask=0o077,
            pass_fds=inheritance.fds,
        )
    # From here on a pidfd stands for the child and WatchedProcess reaps it. With a return code,
    # Popen takes it for reaped and neither waits for it nor complains when it is collected.
    child.returncode = 0
    try:
        identity, pidfd = hold_child(child.pid)
    except OSError:
        os.kill(child.pid, signal.SIGKILL)  # not reaped yet: the pid is still its own
        os.waitpid(child.pid, 0)
        raise
    started.append(Child(identity, pidfd))


def _not_started(instance: Instance, failure: OSError, cure: str) -> VmmDied:
    what = f"{failure.filename}: {failure.strerror}" if failure.filename else str(failure)
    return VmmDied(
        f"QEMU of {instance.vm} could not be started: {what}; {cure}", code="vmm_not_started"
    )
