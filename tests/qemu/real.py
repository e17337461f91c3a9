"""Real QEMUs for the adapter's tests: two monitors, held by a pidfd, dead when the block ends."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from migrd.engine.threads import in_thread
from migrd.processes.process import WatchedProcess, identify, look_up
from migrd.qemu.attachment import Attachment
from migrd.qemu.machine import Machine

START_S = 20.0


@dataclass(frozen=True)
class RealQemu:
    """A QEMU with its machine connected."""

    machine: Machine
    process: WatchedProcess
    directory: Path
    attachment: Attachment

    @property
    def stderr(self) -> str:
        return (self.directory / "stderr").read_text()


def arguments(binary: Path, directory: Path, *more: str) -> list[str]:
    """A guestless QEMU by default: a PC that finds nothing to boot."""
    monitors = [directory / "qmp", directory / "oob"]
    sockets = [part for path in monitors for part in ("-qmp", f"unix:{path},server=on,wait=off")]
    fixed = ["-S", "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]
    return [str(binary), *fixed, "-machine", "pc", "-m", "64", *sockets, *more]


@contextlib.asynccontextmanager
async def running_qemu(
    binary: Path,
    parent: Path,
    *more: str,
    call_deadline_s: float = 5.0,
    has_oob: bool = True,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> AsyncIterator[RealQemu]:
    """Start one, connect a Machine to it, and kill it at the end."""
    directory = Path(tempfile.mkdtemp(dir=parent))
    with (directory / "stderr").open("wb") as stderr:
        command = arguments(binary, directory, *more)
        child = subprocess.Popen(  # noqa: ASYNC220 - as short as a fork
            command, stderr=stderr, stdin=subprocess.DEVNULL, env={**os.environ, **environment}
        )
    process = await watch_child(child.pid)
    oob_path = directory / "oob" if has_oob else None
    attachment = Attachment(child_name(binary), "1", directory / "qmp", oob_path, process)
    machine = Machine(attachment, call_deadline_s=call_deadline_s)
    machine.start()
    try:
        await machine.wait_connected(within_s=START_S)
        if machine.oob is not None:
            await machine.oob.wait_connected(within_s=START_S)
        yield RealQemu(machine, process, directory, attachment)
    finally:
        await machine.close()
        process.kill()
        assert await process.wait_dead(within_s=10), "QEMU did not die"
        process.close()
        child.poll()  # reaped by its watch; Popen only has to be told
        _remove_sockets(directory)


async def watch_child(pid: int) -> WatchedProcess:
    """Watch a child of ours that was just started."""
    identity = await in_thread(identify, pid)
    assert identity is not None, "it has exited already"
    return WatchedProcess(identity, *await in_thread(look_up, identity), is_ours=True)


def _remove_sockets(directory: Path) -> None:
    """A killed QEMU leaves its sockets."""
    for path in directory.glob("*"):
        if path.is_socket():
            path.unlink()


def child_name(binary: Path) -> str:
    return f"vm-{abs(hash(binary)) % 1000}"
