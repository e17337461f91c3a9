"""A QEMU started by hand, with the lab guest in it: what the tests compare migrd with.

Nothing of migrd's own QEMU code is used here, so a mistake in it cannot hide itself:

    BareQemu --subprocess--> qemu-system-x86_64 -accel tcg -bios <rom>
       |  `qmp("query-status")`   one JSON line each way, events put aside
       |  `serial`                every byte of COM1 with the time it arrived
       +- leaving the `async with` kills the process and waits for it

A destination is `BareQemu(..., incoming=True)`: started with `-incoming defer -S`, so that
only an explicit `cont` runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from migrd.demo.image import GuestImage
from migrd.demo.proof import SerialTap

_START_S = 60.0  # of emulation within emulation
_CALL_S = 60.0


class QmpError(Exception):
    """QEMU refused a command; the text is its own."""


async def until(holds: Callable[[], Awaitable[bool]], what: str, *, within_s: float = 20.0) -> None:
    """Wait for a condition, asking again and again; AssertionError if it stays false."""
    try:
        async with asyncio.timeout(within_s):
            while not await holds():  # noqa: ASYNC110 - QEMU has no event for all of them
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"not within {within_s} s: {what}") from None


class BareQemu:
    """One QEMU process; use as an async context manager."""

    def __init__(
        self,
        binary: Path,
        directory: Path,
        image: GuestImage,
        *,
        name: str = "qemu",
        memory_mib: int = 64,
        machine: str = "pc-i440fx-7.2",
        incoming: bool = False,
        arguments: tuple[str, ...] = (),
        inherited: tuple[int, ...] = (),
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.image = image
        self.name = name
        self.memory_bytes = memory_mib << 20
        self.qmp_path = directory / f"{name}.qmp"
        self.serial = SerialTap(name)
        self.events: list[dict[str, Any]] = []
        self._directory = directory
        self._inherited = inherited  # descriptors that `arguments` name
        self._stderr_path = directory / f"{name}.stderr"
        self._serial_path = directory / f"{name}.serial"
        self._rom = directory / f"{name}.rom"
        self._command = [
            str(binary),
            *("-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"),
            *("-machine", machine, "-m", str(memory_mib), "-bios", str(self._rom), "-S"),
            *("-qmp", f"unix:{self.qmp_path},server=on,wait=off"),
            *("-chardev", f"socket,id=com1,path={self._serial_path},server=on,wait=off"),
            *("-serial", "chardev:com1"),
            *(("-incoming", "defer") if incoming else ()),
            *arguments,
        ]
        self._child: asyncio.subprocess.Process | None = None
        self._stream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._listening: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        assert self._child is not None, "not started"
        return self._child.pid

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.image.write_rom, self._rom)
        with self._stderr_path.open("wb") as stderr:
            self._child = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                pass_fds=self._inherited,
            )
        try:
            await until(self._sockets_exist, f"{self.name} opens its sockets", within_s=_START_S)
            async with asyncio.timeout(_START_S):
                self._stream = await asyncio.open_unix_connection(str(self.qmp_path))
                await self._stream[0].readline()  # the greeting
                await self.qmp("qmp_capabilities")
                await self._listen()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.kill()
        if self._listening is not None:
            await asyncio.wait([self._listening], timeout=_CALL_S)  # ends with the socket
            self._listening.cancel()
        if self._stream is not None:
            self._stream[1].close()

    async def kill(self) -> None:
        """SIGKILL, and wait until the process is gone. Nothing to do if it is."""
        child = self._child
        if child is None:
            return
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it ended on its own just now
                child.kill()
        async with asyncio.timeout(_CALL_S):
            await child.wait()

    async def qmp(self, command: str, **arguments: Any) -> Any:
        """Run one QMP command and return its result (`_` in a name stands for `-`)."""
        assert self._stream is not None, "not connected"
        reader, writer = self._stream
        names = {name.replace("_", "-"): value for name, value in arguments.items()}
        writer.write(json.dumps({"execute": command, "arguments": names}).encode() + b"\n")
        async with asyncio.timeout(_CALL_S):
            while True:
                line = await reader.readline()
                if not line:
                    raise QmpError(f"{self.name} closed its monitor: {self.stderr()}")
                answer = json.loads(line)
                if "error" in answer:
                    raise QmpError(f"{command}: {answer['error'].get('desc')}")
                if "return" in answer:
                    return answer["return"]
                self.events.append(answer)

    def stderr(self) -> str:
        return self._stderr_path.read_text(errors="replace")

    async def heartbeats_at_least(self, count: int, *, within_s: float = 20.0) -> None:
        """Wait until this process has printed `count` whole heartbeats."""

        async def printed() -> bool:
            return self.serial.text().count(b"\nH ") >= count

        await until(printed, f"{self.name} prints {count} heartbeats", within_s=within_s)

    async def save_memory(self, address: int, size: int, path: Path) -> None:
        """`pmemsave`: the shape that migrd.demo.proof reads memory by."""
        await self.qmp("pmemsave", val=address, size=size, filename=str(path))

    async def _sockets_exist(self) -> bool:
        if self._child is not None and self._child.returncode is not None:
            raise AssertionError(f"{self.name} did not start: {self.stderr()}")
        return self.qmp_path.exists() and self._serial_path.exists()

    async def _listen(self) -> None:
        reader, writer = await asyncio.open_unix_connection(str(self._serial_path))

        async def listen() -> None:
            try:
                await self.serial.read_stream(reader)
            finally:
                writer.close()

        self._listening = asyncio.create_task(listen(), name=f"serial of {self.name}")


async def migrate(
    source: BareQemu,
    destination: BareQemu,
    *,
    multifd_channels: int = 0,
    downtime_limit_ms: int = 300,
) -> None:
    """Move the guest, both sides on this machine, and run it on the destination.

    The order that never runs it twice: the destination is held, and told to go on only
    after both sides were seen `completed`.
    """
    wanted = {"events": True, "return-path": True, "multifd": multifd_channels > 0}
    capabilities = [{"capability": name, "state": state} for name, state in wanted.items()]
    for side in (source, destination):
        await side.qmp("migrate-set-capabilities", capabilities=capabilities)
        await side.qmp("migrate-set-parameters", max_bandwidth=0, downtime_limit=downtime_limit_ms)
        if multifd_channels:
            await side.qmp("migrate-set-parameters", multifd_channels=multifd_channels)
    uri = f"unix:{source.qmp_path.parent}/{destination.name}.migration"
    await destination.qmp("migrate-incoming", uri=uri)
    await source.qmp("migrate", uri=uri)
    for side in (source, destination):
        await until(partial(_has_completed, side), f"{side.name}: migration completes")
    await destination.qmp("cont")


async def _has_completed(side: BareQemu) -> bool:
    status = await side.qmp("query-migrate")
    if status.get("status") in ("failed", "cancelled"):
        raise AssertionError(f"{side.name}: {status}")
    return bool(status.get("status") == "completed")
