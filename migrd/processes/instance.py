"""The directory of one process that outlives this daemon: what the next daemon needs to know.

    <runtime_dir>/<below>/<vm>/<instance>/      mode 0700
        launch.json     what was launched, and which process it became
        stderr.log      its last words; locked while any process of this launch lives
        ...             what its adapter adds

Written in this order, so that a daemon killed at any line leaves something the next one can read:

    mkdir ► stderr.log, locked ► launch.json ► fork, exec ► launch.json with the process's identity
            (flock(2))           (intent)

The lock belongs to the open file that the process inherits as its stderr, from the instant of the
fork on. The kernel drops it when the last process that has it open ends, however it ends. So

    lock taken by us     nothing of this launch lives: proof of death, also where no pid was noted
    lock held            something lives: the process, or a child of it

and a process is taken for dead only when its identity is proven dead *and* the lock is free.
Nothing is fsynced: what power failure takes, it takes together with the process.
"""

import contextlib
import fcntl
import glob
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from migrd.core.facts import SpecDevice, VmSpec
from migrd.core.tracking_request import TrackingPolicy
from migrd.processes.process import Life, ProcessIdentity, look_up

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a VM and an instance may be called: both are names of directories."""
LAST_WORDS_BYTES: Final = 4096
RECORD_BYTES_LIMIT: Final = 1 << 20
RECORD_VERSION: Final = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Instance:
    """One process's directory; it need not exist. Adapters add what else lies in it."""

    below: ClassVar[str]
    """Where an adapter's directories lie, so that none takes another's for its own."""

    runtime_dir: Path
    vm: str
    name: str

    @property
    def directory(self) -> Path:
        return self.runtime_dir / self.below / self.vm / self.name

    @property
    def record_path(self) -> Path:
        return self.directory / "launch.json"

    @property
    def stderr_path(self) -> Path:
        return self.directory / "stderr.log"

    def make(self) -> None:
        """Make the directory. Blocking. Raises FileExistsError, OSError."""
        self.directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory.mkdir(mode=0o700)

    def remove(self) -> None:
        """Remove the directory with all that is in it, and the VM's if it was the last. Blocking.

        Only for what is proven dead. Raises OSError.
        """
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.directory)
        with contextlib.suppress(OSError):  # another instance of the VM is there
            self.directory.parent.rmdir()

    def last_words(self) -> str:
        """The end of stderr.log, in whole lines where it was cut. Bounded; "" when there is none.

        At most one page from the page cache, so it may be called on the event loop.
        """
        try:
            fd = os.open(self.stderr_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return ""
        try:
            start = max(0, os.fstat(fd).st_size - LAST_WORDS_BYTES)
            text = os.pread(fd, LAST_WORDS_BYTES, start).decode(errors="replace")
        except OSError:
            return ""
        finally:
            os.close(fd)
        if start:
            text = text.partition("\n")[2] or text
        return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text).strip()

    @classmethod
    def all_below(
        cls, runtime_dir: Path, is_known: Callable[[tuple[str, str]], bool]
    ) -> Iterator[Self]:
        """Those that are there and not known (VM, instance) yet. Blocking.

        `is_known` is asked of each once it was seen, and of none before: what is being launched is
        known before its directory is made."""
        # Not Path.glob: a directory that is removed while it looks is an error to it.
        for found in sorted(glob.glob(f"{glob.escape(str(runtime_dir))}/{cls.below}/*/*")):
            directory = Path(found)
            vm, name = directory.parent.name, directory.name
            if is_known((vm, name)):
                continue
            if NAME.fullmatch(vm) and NAME.fullmatch(name) and directory.is_dir():
                yield cls(runtime_dir, vm, name)
            else:
                log.warning("%s: not made by migrd; left alone", directory)


@dataclass(frozen=True, kw_only=True)
class LaunchRecord:
    """What launch.json says; adapters add fields of their own (`_more`, `_more_of`)."""

    spec: VmSpec
    instance: str
    incoming: bool
    argv: tuple[str, ...]
    digest: str
    requested_wall_s: float
    identity: ProcessIdentity | None = None
    """None: written before the start, and never completed."""

    def with_identity(self, identity: ProcessIdentity) -> Self:
        return replace(self, identity=identity)

    def _more(self) -> Mapping[str, object]:
        return {}

    @classmethod
    def _more_of(cls, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Arguments of the constructor. Raises ValueError, KeyError, TypeError."""
        return {}

    def write(self, instance: Instance) -> None:
        """Replace the record as a whole. Blocking. Raises OSError."""
        fields = {
            "version": RECORD_VERSION,
            "vm": self.spec.name,
            "profile": self.spec.profile,
            "parameters": dict(self.spec.parameters),
            "wanted_devices": [asdict(device) for device in self.spec.devices],
            "tracking_policy": self.spec.tracking_policy,
            "instance": self.instance,
            "incoming": self.incoming,
            "argv": list(self.argv),
            "digest": self.digest,
            "requested_wall_s": self.requested_wall_s,
            **self._more(),
            "process": None if self.identity is None else self.identity.as_json(),
        }
        aside = instance.record_path.with_suffix(".new")
        aside.write_text(json.dumps(fields, indent=1) + "\n")
        aside.replace(instance.record_path)

    @classmethod
    def read(cls, instance: Instance) -> Self | None:
        """None when there is no record, or none that can be understood. Blocking."""
        try:
            with instance.record_path.open("rb") as file:
                fields = json.loads(file.read(RECORD_BYTES_LIMIT))
            if fields["version"] != RECORD_VERSION or fields["vm"] != instance.vm:
                return None
            return cls(
                spec=_spec(instance.vm, fields),
                instance=str(fields["instance"]),
                incoming=bool(fields["incoming"]),
                argv=tuple(map(str, fields["argv"])),
                digest=str(fields["digest"]),
                requested_wall_s=float(fields["requested_wall_s"]),
                identity=ProcessIdentity.of_json(fields["process"]),
                **cls._more_of(fields),
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None


def _spec(vm: str, fields: Mapping[str, Any]) -> VmSpec:
    """Raises ValueError, KeyError, TypeError."""
    policy = fields.get("tracking_policy")
    return VmSpec(
        name=vm,
        profile=fields["profile"],
        parameters=dict(fields["parameters"]),
        devices=tuple(SpecDevice(**row) for row in fields.get("wanted_devices", ())),
        tracking_policy=None if policy is None else TrackingPolicy(policy),
    )


def open_locked_log(instance: Instance) -> int:
    """Make stderr.log and lock it; the descriptor is the caller's. Blocking. Raises OSError."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(instance.stderr_path, flags, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def lock_says(instance: Instance) -> Life:
    """Whether anything of this launch lives, by the lock on stderr.log. Blocking."""
    try:
        fd = os.open(instance.stderr_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        # the log comes before all else: an empty directory never had a process
        return Life.DEAD if _is_empty(instance.directory) else Life.UNKNOWN
    except OSError:
        return Life.UNKNOWN
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return Life.ALIVE
    except OSError:
        return Life.UNKNOWN
    finally:
        os.close(fd)
    return Life.DEAD


def _is_empty(directory: Path) -> bool:
    try:
        return not any(directory.iterdir())
    except OSError:
        return False


def proven(instance: Instance, identity: ProcessIdentity | None) -> tuple[Life, int | None]:
    """What is proven of the process that an instance's record names, by its identity and its lock;
    and a pidfd of it (the caller's to close) if ALIVE. Blocking."""
    lock = lock_says(instance)
    life, pidfd = (Life.UNKNOWN, None) if identity is None else look_up(identity)
    if life is Life.ALIVE:
        return life, pidfd
    if lock is Life.DEAD:
        return Life.DEAD, None
    return (Life.UNKNOWN if lock is Life.ALIVE else life), None
