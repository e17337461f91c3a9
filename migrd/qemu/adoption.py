"""VMs that others launched: a monitor socket in `adopt_dir`, by name.

    <adopt_dir>/<vm>.qmp          in-band monitor: the VM is adopted as soon as somebody listens
    <adopt_dir>/<vm>.oob.qmp      second monitor, if there is one

The launcher (or a person) puts the sockets, or links to them, there. They come and go while the
daemon runs: each look finds the new ones. A socket nobody listens on is a left-over and no VM.

An adopted QEMU is never killed and nothing of it is removed: it may be asked to quit, no more. Its
process is known only where the socket itself tells it (migrd.qemu.process); else its death cannot
be proven, and it is unreachable for good.

Trap: asking a socket who listens takes a place in its queue of one until its QEMU looks. So each
socket is asked once in its life (its inode and time of change), and not at every look.
"""

import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from migrd.errors import VmmUnreachable
from migrd.processes.instance import NAME as VM_NAME
from migrd.processes.process import Life, ProcessIdentity, look_up
from migrd.qemu.attachment import identify_listener

IN_BAND: Final = ".qmp"
OOB: Final = ".oob.qmp"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adopted:
    """A QEMU of others', newly found. Owns `pidfd`."""

    vm: str
    instance: str
    qmp_path: Path
    oob_path: Path | None
    identity: ProcessIdentity | None
    life: Life
    pidfd: int | None


@dataclass
class AdoptDirectory:
    """Looks at one directory again and again. All calls block, one at a time."""

    path: Path
    _seen: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """VM -> socket that was adopted."""
    _told: set[str] = field(default_factory=set)

    def look(self) -> list[Adopted]:
        """The QEMUs that have come since the last look."""
        found = []
        present = dict(self._sockets())
        for vm in set(self._seen) - set(present):
            del self._seen[vm]
        for vm, mark in present.items():
            if self._seen.get(vm) == mark:
                continue
            adopted = self._adopt(vm, mark)
            if adopted is not None:
                self._seen[vm] = mark
                found.append(adopted)
        return found

    def forget(self, vm: str) -> None:
        """Look at this name afresh next time."""
        self._seen.pop(vm, None)

    def _sockets(self) -> Iterator[tuple[str, tuple[int, int, int]]]:
        try:
            paths = sorted(self.path.iterdir())
        except OSError as failure:
            self._tell(f"{self.path}: cannot be read: {failure.strerror}; no VM is adopted")
            return
        for path in paths:
            if not path.name.endswith(IN_BAND) or path.name.endswith(OOB):
                continue
            vm = path.name.removesuffix(IN_BAND)
            if not VM_NAME.fullmatch(vm):
                self._tell(f"{path}: {vm!r} is no name for a VM: letters, digits and . _ - inside")
                continue
            try:
                about = path.stat()
            except OSError:
                continue  # gone, or a link to what is gone
            if stat.S_ISSOCK(about.st_mode):
                yield vm, (about.st_dev, about.st_ino, about.st_ctime_ns)

    def _adopt(self, vm: str, mark: tuple[int, int, int]) -> Adopted | None:
        qmp_path, oob_path = self.path / f"{vm}{IN_BAND}", self.path / f"{vm}{OOB}"
        try:
            identity = identify_listener(qmp_path)
        except VmmUnreachable as failure:
            self._tell(f"{failure.message}; not adopted")
            return None
        life, pidfd = (Life.UNKNOWN, None) if identity is None else look_up(identity)
        if identity is None:
            instance = f"adopted-{mark[1]:x}-{mark[2]:x}"
            self._tell(f"{qmp_path}: its process is not known, so its death cannot be proven")
        else:
            instance = f"adopted-{identity.pid}-{identity.start_ticks}"
        has_oob = os.path.exists(oob_path)
        return Adopted(vm, instance, qmp_path, oob_path if has_oob else None, identity, life, pidfd)

    def _tell(self, text: str) -> None:
        """Once per text: the directory is looked at again and again."""
        if text not in self._told and len(self._told) < 1000:
            self._told.add(text)
            log.warning("%s", text)
