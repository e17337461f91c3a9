"""One host's profiles and directories for the launcher's tests, on a real QEMU."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migrd.core.facts import VmSpec
from migrd.demo.image import GuestImage
from migrd.engine.ports import Vmm
from migrd.engine.threads import in_thread
from migrd.qemu.launch import QemuLauncher
from migrd.qemu.machine import Machine
from migrd.qemu.profile_files import load_profiles
from tests.lab.leaks import processes_naming, sockets_below

LAB = Path(__file__).parents[2] / "config" / "profiles" / "lab.toml"
START_S = 15.0


@dataclass
class Host:
    """Directories of one host; `daemon` is a launcher on them, as a daemon would have."""

    root: Path
    binary: Path

    def __post_init__(self) -> None:
        for directory in (self.profiles, self.firmware, self.adopt):
            directory.mkdir(parents=True)
        GuestImage(heartbeat_interval_s=0.01).write_rom(self.firmware / "guest.rom")
        self.add_profile("lab")

    profiles = property(lambda self: self.root / "p")
    firmware = property(lambda self: self.root / "fw")
    adopt = property(lambda self: self.root / "a")
    run = property(lambda self: self.root / "r")

    def add_profile(self, name: str, *changes: tuple[str, str], more: str = "") -> None:
        """lab.toml for this host, changed, and with more tables."""
        text = LAB.read_text().replace("/var/lib/migrd/firmware", str(self.firmware))
        text = text.replace("/usr/bin/qemu-system-x86_64", str(self.binary))
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (self.profiles / f"{name}.toml").write_text(f"{text}\n{more}")

    def add_script(self, text: str) -> Path:
        """A program to stand as `binary`."""
        path = self.root / "script"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    def spec(self, name: str = "vm", profile: str = "lab") -> VmSpec:
        return VmSpec(name, profile, {"firmware": "guest.rom"})

    @contextlib.asynccontextmanager
    async def daemon(self, **options: Any) -> AsyncIterator[QemuLauncher]:
        """A launcher, closed at the end; what it launched goes on."""
        profiles = await in_thread(load_profiles, self.profiles)
        launcher = QemuLauncher(profiles, self.run, self.adopt, **options)
        try:
            yield launcher
        finally:
            await launcher.close()

    def directory(self, vmm: Vmm) -> Path:
        return Path(self.run) / "vms" / vmm.vm / vmm.instance

    def record(self, vmm: Vmm) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads((self.directory(vmm) / "launch.json").read_text())
        return fields

    def heartbeats(self, vmm: Vmm) -> int:
        with contextlib.suppress(FileNotFoundError):
            return (self.directory(vmm) / "serial.log").read_bytes().count(b"\nH ")
        return 0

    @contextlib.contextmanager
    def by_hand(self, name: str, *, has_oob: bool = True) -> Iterator[subprocess.Popen[bytes]]:
        """A QEMU that somebody else launches, with its sockets where migrd looks for them."""
        sockets = [self.adopt / f"{name}.qmp"]
        sockets += [self.adopt / f"{name}.oob.qmp"] if has_oob else []
        argv = [str(self.binary), "-S", "-nodefaults", "-display", "none", "-accel", "tcg"]
        for path in sockets:
            argv += ["-qmp", f"unix:{path},server=on,wait=off"]
        with subprocess.Popen(argv) as child:
            try:
                yield child
            finally:
                child.kill()

    def end_all(self) -> None:
        """Kill whatever has this host's own directory in its command line."""
        for found in processes_naming(self.root):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(found.partition(":")[0]), signal.SIGKILL)


@contextlib.contextmanager
def host_of(root: Path, binary: Path) -> Iterator[Host]:
    """A host whose QEMUs are gone at the end."""
    host = Host(root, binary)
    yield host
    host.end_all()
    deadline_s = time.monotonic() + 10
    while (processes_naming(root) or sockets_below(root)) and time.monotonic() < deadline_s:
        time.sleep(0.005)


def machine_of(vmm: Vmm) -> Machine:
    assert isinstance(vmm, Machine)
    return vmm


async def until(holds: Callable[[], bool], what: str, within_s: float = START_S) -> None:
    """Wait for a condition; AssertionError when it stays false."""
    deadline_s = time.monotonic() + within_s
    for _ in range(1_000_000):
        if await in_thread(holds):
            return
        assert time.monotonic() < deadline_s, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.005)
