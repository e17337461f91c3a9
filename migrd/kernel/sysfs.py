"""Reading sysfs and procfs: relative to an open directory, bounded, not raising for what is there.

    Directory ── text, number, link, names, child ──> a value, or None and a line of trouble

What is there belongs to the kernel, to drivers nobody here has met, and to containers that mount
something else in its place. So a file may be missing (None, and no trouble: most attributes exist
only where they apply), empty, longer than a page, not text, a directory, a fifo or a link; a link
may lead nowhere, in a circle or out of the tree. Each of these is told in `trouble` of the
Directory, in words for people, and reading goes on.

Rules
1. One open file per question, opened relative to its directory: a path of eight components is
   resolved once per device, not once per attribute.
2. A link is read, not followed, where its last component is the answer (driver, iommu_group …).
   Where it must be followed (a device below /sys/bus), the kernel is asked where the descriptor has
   come to (/proc/self/fd), and that must be below the root.
3. Directory entries are sorted: their order means nothing.
4. O_NONBLOCK, so that a fifo in place of a file cannot stop the thread. A real sysfs read may still
   wait for a lock of the kernel: `driver_override` takes that of its device, which a probe or a
   reset holds for seconds.
5. Only a shortage of our own (descriptors, memory) is raised, as OSError: it says nothing about
   what is there.
"""

import errno
import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

MAX_FILE_BYTES: Final = 4096
"""A sysfs attribute is at most a page."""
MAX_ENTRIES: Final = 65_536
MAX_NAME_CHARS: Final = 128
MAX_TROUBLE: Final = 100
"""Lines kept per list; one more says how many there were."""

_SHOWN_CHARS: Final = 80
_FILE: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY
_DIRECTORY: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_DIRECTORY
_MISSING: Final = frozenset({errno.ENOENT, errno.ENOTDIR})
_OUR_SHORTAGE: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


@dataclass(frozen=True)
class Roots:
    """Where the kernel shows itself; elsewhere in tests."""

    sys: str = "/sys"
    dev: str = "/dev"
    proc: str = "/proc"

    @classmethod
    def below(cls, directory: Path) -> "Roots":
        return cls(*(str(directory / name) for name in ("sys", "dev", "proc")))


def shown(name: str) -> str:
    """A name from outside, fit for a log line."""
    if name.isprintable() and len(name) <= _SHOWN_CHARS:
        return name
    return ascii(name)[:_SHOWN_CHARS]


def bounded(trouble: list[str]) -> tuple[str, ...]:
    """In a fixed order, not too many, and saying so."""
    if len(trouble) <= MAX_TROUBLE:
        return tuple(sorted(trouble))
    left_out = len(trouble) - MAX_TROUBLE
    return (*sorted(trouble)[:MAX_TROUBLE], f"... and {left_out} more of the kind")


@dataclass
class Directory:
    """An open directory of sysfs. Use as a context manager."""

    path: str
    """For messages only, and only the part that tells something."""
    fd: int
    trouble: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, path: str, trouble: list[str] | None = None) -> "Directory | None":
        """A directory by its path; None (and trouble, unless it is missing) if it cannot be had."""
        told = [] if trouble is None else trouble
        try:
            return cls(path, os.open(path, _DIRECTORY), told)
        except OSError as error:
            if reason(error) != errno.ENOENT:
                told.append(f"{path}: {error.strerror}")
            return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self.fd)

    def child(self, name: str, root: str, trouble: list[str]) -> "Directory | None":
        """The directory that `name` leads to, below `root`; it tells its trouble to `trouble`.

        None without trouble: there is no such entry (any more). A link that leads nowhere, in a
        circle or out of `root` is trouble.
        """
        try:
            fd = os.open(name, _DIRECTORY, dir_fd=self.fd)
        except OSError as error:
            if reason(error) != errno.ENOENT:
                trouble.append(f"{shown(name)}: {error.strerror}")
            elif self._is_there(name):
                trouble.append(f"{shown(name)}: a link that leads nowhere")
            return None
        path = _where(fd)
        if path is None or not path.startswith(root + "/"):
            os.close(fd)
            trouble.append(f"{shown(name)}: leads out of {root}, to {shown(path or 'nowhere')}")
            return None
        return Directory(path, fd, trouble)

    def names(self) -> list[str]:
        """What is in it, sorted; at most MAX_ENTRIES, the rest being trouble."""
        try:
            names = entries(self.fd)
        except OSError as error:
            reason(error)
            self.trouble.append(f"{self.path}: {error.strerror}")
            return []
        if len(names) > MAX_ENTRIES:
            del names[MAX_ENTRIES:]
            self.trouble.append(f"{self.path}: only the first {MAX_ENTRIES} entries were read")
        return sorted(names)

    def names_in(self, name: str) -> list[str]:
        """The entries of a directory below, sorted; none if it is missing."""
        try:
            fd = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=self.fd)
        except OSError as error:
            if reason(error) != errno.ENOENT:
                self.trouble.append(f"{shown(name)}: {error.strerror}")
            return []
        try:
            return sorted(entries(fd))
        except OSError as error:
            self._refuse(name, error)
            return []
        finally:
            os.close(fd)

    def content(self, name: str, limit_bytes: int = MAX_FILE_BYTES) -> str | None:
        """All of a file, as text; None if it is missing or cannot be read."""
        try:
            fd = os.open(name, _FILE, dir_fd=self.fd)
        except OSError as error:
            self._refuse(name, error)
            return None
        try:
            raw = _read(fd, limit_bytes + 1)
        except OSError as error:
            self._refuse(name, error)
            return None
        finally:
            os.close(fd)
        if len(raw) > limit_bytes:
            self._complain(name, f"is longer than {limit_bytes} bytes")
            return None
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self._complain(name, "is not text")
            return None

    def text(self, name: str) -> str | None:
        """The one line of a file, without its end; may be empty."""
        content = self.content(name)
        if content is None:
            return None
        line = content.strip()
        if not line.isprintable():
            self._complain(name, f"is not one line of text: {shown(line)}")
            return None
        return line

    def number(self, name: str, base: int, lowest: int = 0) -> int | None:
        """A number of at most 64 bits, not below `lowest`."""
        text = self.text(name)
        if text is None:
            return None
        try:
            # int() takes '1_0', ' 1' and other scripts' digits; the kernel writes none of them
            number = int(text, base) if text.isascii() and "_" not in text else None
        except ValueError:
            number = None
        if number is None or not lowest <= number < 1 << 64:
            self._complain(name, f"is not a number: {shown(text)}" if text else "is empty")
            return None
        return number

    def link(self, name: str) -> str | None:
        """The last component of where a link leads, without going there."""
        try:
            target = os.readlink(name, dir_fd=self.fd)
        except OSError as error:
            if error.errno == errno.EINVAL:
                self._complain(name, "is not a link")
                return None
            self._refuse(name, error)
            return None
        last = target.rpartition("/")[2]
        if last in ("", ".", "..") or len(last) > MAX_NAME_CHARS or not last.isprintable():
            self._complain(name, f"leads to {shown(target)}")
            return None
        return last

    def has(self, name: str) -> bool:
        return self._is_there(name)

    def _is_there(self, name: str) -> bool:
        try:
            os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except OSError:
            return False
        return True

    def _refuse(self, name: str, error: OSError) -> None:
        if reason(error) not in _MISSING:
            self._complain(name, str(error.strerror))

    def _complain(self, name: str, why: str) -> None:
        self.trouble.append(f"{name}: {why}")


def reason(error: OSError) -> int | None:
    """The errno of what sysfs answered; raises the error if it is a shortage of our own."""
    if error.errno in _OUR_SHORTAGE:
        raise error
    return error.errno


def entries(fd: int) -> list[str]:
    """Names in a directory in the order of the file system, one more than MAX_ENTRIES at most."""
    with os.scandir(fd) as found:
        return [entry.name for entry in itertools.islice(found, MAX_ENTRIES + 1)]


def _read(fd: int, limit_bytes: int) -> bytes:
    """Up to the end, or to the limit; procfs gives out long files in pieces."""
    raw = os.read(fd, limit_bytes)
    if not raw or len(raw) < MAX_FILE_BYTES >= limit_bytes - 1:
        return raw
    while len(raw) < limit_bytes and (more := os.read(fd, limit_bytes - len(raw))):
        raw += more
    return raw


def _where(fd: int) -> str | None:
    """The real path of an open directory; None when it is gone."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return None
