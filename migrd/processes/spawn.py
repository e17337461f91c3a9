"""Starting one process of a VM so that it outlives this daemon.

- A session of its own (no terminal, no signal meant for our process group reaches it), cwd `/`,
  stdin from /dev/null, stdout and stderr to the instance's logs. No other descriptor of ours but
  those of its passthrough devices: they have the same numbers there as here, so none below 3.
- The limit of memory it may lock is raised for passthrough devices, and for those processes only
  (migrd.processes.memlock).
- An environment of almost nothing: what the daemon was given (tokens, NOTIFY_SOCKET, LISTEN_FDS) is
  no business of a guest's.
- umask 077: sockets and logs are for this user only.
- No shell, no preexec_fn: subprocess can then use vfork, and a large daemon starts a process as
  fast as a small one (unless it is to run as another user).

Under systemd a service's processes die with it unless the unit says otherwise. The unit needs
`KillMode=process` (a stop ends the daemon alone), `RuntimeDirectoryPreserve=yes` (the instance
directories stay) and `OOMPolicy=continue` (a VMM killed for memory does not stop the daemon).

Everything here blocks: off the event loop only.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from migrd.errors import Conflict, VmmDied
from migrd.processes import memlock
from migrd.processes.instance import Instance, LaunchRecord, open_locked_log
from migrd.processes.process import ProcessIdentity, hold_child

PASSED_ON: Final = ("PATH", "TMPDIR", "TZ")
"""What it gets of our environment."""


@dataclass(frozen=True, slots=True)
class RunAs:
    """Another user for the process. Only root can start one."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Inheritance:
    """What it gets of this process, besides the log."""

    environment: Mapping[str, str]
    fds: tuple[int, ...] = ()
    """All above 2."""
    locked_bytes: int = 0
    """So much memory it must be able to lock; 0: no more than this process."""
    output_name: str | None = None
    """A file of the instance's directory for what it prints; None: the log."""
    run_as: RunAs | None = None


@dataclass(frozen=True, slots=True)
class Wording:
    """How a failure is told: whose process it is, and what helps where the program is at fault."""

    what: str
    cure: str


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
    wording: Wording,
) -> None:
    """Make the directory, write the intent, start the process, note its identity.

    The child is put into `started` as soon as there is one, so that a caller who was cancelled
    meanwhile can still end it. Raises Conflict when the instance exists, VmmDied (with nothing
    started, and the directory gone) when it cannot be started.
    """
    try:
        instance.make()
    except FileExistsError:
        text = f"{instance.vm} has an instance {instance.name} already: {instance.directory}"
        raise Conflict(text, code="instance_exists") from None
    except OSError as failure:
        raise _not_started(instance, failure, wording.what) from failure
    try:
        log_fd = open_locked_log(instance)
        try:
            record.write(instance)
            with _output(instance, inheritance, log_fd) as output_fd:
                _start(record.argv, inheritance, (output_fd, log_fd), started)
        finally:
            os.close(log_fd)  # the child's own copy keeps the lock
        record.with_identity(started[0].identity).write(instance)
    except (OSError, subprocess.SubprocessError) as failure:
        if started:
            raise  # the caller ends it
        with contextlib.suppress(OSError):
            instance.remove()
        is_program = getattr(failure, "filename", None) in (record.argv[0], None)
        raise _not_started(
            instance, failure, wording.what, wording.cure if is_program else None
        ) from failure


@contextlib.contextmanager
def _output(instance: Instance, inheritance: Inheritance, log_fd: int) -> Iterator[int]:
    if inheritance.output_name is None:
        yield log_fd
        return
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    fd = os.open(instance.directory / inheritance.output_name, flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _start(
    argv: Sequence[str], inheritance: Inheritance, fds: tuple[int, int], started: list[Child]
) -> None:
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    run_as = inheritance.run_as
    with memlock.inherited(inheritance.locked_bytes):
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=fds[0],
            stderr=fds[1],
            cwd="/",
            env={"LC_ALL": "C.UTF-8", **kept, **inheritance.environment},
            start_new_session=True,
            umask=0o077,
            pass_fds=inheritance.fds,
            user=None if run_as is None else run_as.uid,
            group=None if run_as is None else run_as.gid,
            extra_groups=None if run_as is None else run_as.groups,
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


def _not_started(
    instance: Instance, failure: Exception, what: str, cure: str | None = None
) -> VmmDied:
    name, reason = getattr(failure, "filename", None), getattr(failure, "strerror", None)
    why = f"{name}: {reason}" if name else str(failure)
    cure = cure or "see to `host.runtime_dir`"
    text = f"{what} of {instance.vm} could not be started: {why}; {cure}"
    return VmmDied(text, code="vmm_not_started")
