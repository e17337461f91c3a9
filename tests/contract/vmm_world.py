"""Two hosts' QEMUs for one body of a test: simulated ones, or real ones of a given version.

    World.source(...)        a Machine whose guest dirties memory, running
    World.destination(...)   a Machine that waits for a guest, held by `-S`
    World.kill(machine)      its process dies now
    World.link(address)      a link to a destination that can be frozen

The process of a simulated QEMU is a real one that only sleeps: its death is seen, and proven, as
that of any other.
"""

import abc
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Generic, TypeVar

from migrd.core.facts import Feature, TransferAddress
from migrd.demo.image import GuestImage
from migrd.engine.ports import Vmm
from migrd.processes.process import WatchedProcess
from migrd.qemu.attachment import Attachment
from migrd.qemu.machine import Machine
from tests.fakes.qmp_vm import FakeNetwork, FakeVm
from tests.lab.freezing_proxy import freezing_proxy
from tests.qemu.real import RealQemu, running_qemu, watch_child

V_co = TypeVar("V_co", bound=Vmm, covariant=True)

MIB = 1 << 20
GUEST_DIRTIES_BYTES_PER_S = 20 * MIB
LATER = frozenset(
    {
        Feature.SWITCHOVER_ACK,
        Feature.AVAIL_SWITCHOVER_BANDWIDTH,
        Feature.INCOMING_EXIT_ON_ERROR,
    }
)


async def nothing_is_left_in(source: Vmm) -> None:
    """Of a migration that did not happen, in a QEMU."""
    assert isinstance(source, Machine)
    await source.clean_outgoing()
    monitor = source.monitor
    states = await monitor.execute("query-migrate-capabilities")
    assert [row["capability"] for row in states if row["state"]] == []
    values = await monitor.execute("query-migrate-parameters")
    assert (values["tls-creds"], values["max-bandwidth"]) == ("", 128 * MIB)
    assert (values["max-cpu-throttle"], values["cpu-throttle-initial"]) == (99, 20)
    await source.clean_outgoing()  # and once more does no harm


@dataclass
class Link:
    """What a source connects to; `freeze` lets nothing through any more."""

    address: TransferAddress
    freeze: Callable[[], Awaitable[None]]


class World(abc.ABC, Generic[V_co]):
    """Everything it makes ends with the `async with` around it."""

    version: str
    """"7.2" or "10.0", of a QEMU; "direct"."""
    machine_type = "pc-i440fx-"
    """What its machine type begins with."""
    offers = frozenset({Feature.YANK, Feature.OOB, Feature.MULTIFD, Feature.TLS})

    def __init__(self) -> None:
        self._stack = contextlib.AsyncExitStack()

    @abc.abstractmethod
    async def source(self) -> V_co: ...

    @abc.abstractmethod
    async def destination(self) -> V_co: ...

    @abc.abstractmethod
    def kill(self, vmm: Vmm) -> None: ...

    @abc.abstractmethod
    async def link(self, address: TransferAddress) -> Link: ...

    @property
    def later_features(self) -> frozenset[Feature]:
        """What it has of what only later QEMUs offer."""
        return frozenset() if self.version == "7.2" else LATER

    async def nothing_is_left_behind(self, source: Vmm) -> None:
        """After clean_outgoing a VMM is as it was before the first migration of its life."""
        await nothing_is_left_in(source)

    async def close(self) -> None:
        await self._stack.aclose()


class FakeWorld(World[Machine]):
    def __init__(self, version: str, directory: Path) -> None:
        super().__init__()
        self.version = version
        self._directory = directory
        self.network = FakeNetwork()
        self.vms: dict[Machine, FakeVm] = {}
        self._processes: dict[Machine, WatchedProcess] = {}

    async def source(self) -> Machine:
        machine = await self._start(FakeVm(self.network, version=self.version))
        self.vms[machine].dirty_bytes_per_s = GUEST_DIRTIES_BYTES_PER_S
        await machine.run_guest()
        return machine

    async def destination(self) -> Machine:
        return await self._start(FakeVm(self.network, version=self.version, is_incoming=True))

    def kill(self, vmm: Vmm) -> None:
        assert isinstance(vmm, Machine)
        self._processes[vmm].kill()

    async def link(self, address: TransferAddress) -> Link:
        async def freeze() -> None:
            self.network.stalled = True

        return Link(address, freeze)

    async def _start(self, vm: FakeVm) -> Machine:
        return await self._stack.enter_async_context(self._running(vm))

    @contextlib.asynccontextmanager
    async def _running(self, vm: FakeVm) -> AsyncIterator[Machine]:
        number = len(self.vms)
        path, oob_path = (self._directory / f"{number}.{name}" for name in ("qmp", "oob"))
        command = [sys.executable, "-c", "import time; time.sleep(600)"]
        child = subprocess.Popen(command)  # noqa: ASYNC220 - as short as a fork
        process = await watch_child(child.pid)
        process.call_when_dead(vm.exit)
        async with vm.serving(path, oob_path):
            machine = Machine(Attachment(f"vm{number}", "1", path, oob_path, process))
            self.vms[machine], self._processes[machine] = vm, process
            vm.at_exit = process.kill
            machine.start()
            try:
                await machine.wait_connected(within_s=5)
                yield machine
            finally:
                await machine.close()
                process.kill()
                assert await process.wait_dead(within_s=5)
                process.close()
                child.poll()


class RealWorld(World[Machine]):
    def __init__(
        self,
        version: str,
        binary: Path,
        directory: Path,
        rom: Path,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`environment`: what the QEMUs have besides ours."""
        super().__init__()
        self._environment = environment
        self.version = version
        self._binary = binary
        self._directory = directory
        self._rom = ("-bios", str(rom))
        self._qemus: dict[Machine, RealQemu] = {}

    async def source(self) -> Machine:
        machine = await self._start()
        await machine.run_guest()
        return machine

    async def destination(self) -> Machine:
        return await self._start("-incoming", "defer")

    def kill(self, vmm: Vmm) -> None:
        assert isinstance(vmm, Machine)
        self._qemus[vmm].process.kill()

    async def link(self, address: TransferAddress) -> Link:
        target = (address.host, address.port)
        proxy = await self._stack.enter_async_context(freezing_proxy(("127.0.0.1", 0), target))
        assert isinstance(proxy.address, tuple)

        async def freeze() -> None:
            proxy.freeze()

        return Link(TransferAddress(*proxy.address), freeze)

    async def _start(self, *more: str) -> Machine:
        running = running_qemu(
            self._binary, self._directory, *self._rom, *more, environment=self._environment
        )
        qemu = await self._stack.enter_async_context(running)
        self._qemus[qemu.machine] = qemu
        return qemu.machine


def dirtying_guest(working_set_pages: int = 2048) -> GuestImage:
    pages_per_s = GUEST_DIRTIES_BYTES_PER_S // 4096
    return GuestImage(working_set_pages=working_set_pages, pages_per_s=pages_per_s, noise=True)
