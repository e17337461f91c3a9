"""What stands behind a fake QEMU's monitors: a VM and its migration, by the real one's rules.

    migrate ─► setup ─► active (passes) ─► STOP ─► [pre-switchover] ─► device ─► completed
                 │          │                            │               │
                 └──────────┴── migrate_cancel ──────────┴───────────────┴─► cancelling ─► cancelled
                                yank, dead peer, nobody there ───────────────────────────► failed

Rules kept (seen on QEMU 7.2 and 10.0): `migrate` to nobody is accepted and fails later; a source
resumes by itself when its migration fails or is cancelled; a stalled link blocks the main loop in
`device`, and keeps `cancelling` from ending under multifd; a destination takes one incoming
migration in its life and leaves it `failed`, or dies of it; numbers vanish with the failure; a
`yank` in the very moment of the switchover can hang a QEMU with multifd for good. Passthrough
devices have rules of their own (tests/fakes/qmp_devices.py).
"""

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakes.qmp_devices import DEVICE_BYTES, FakeDevices
from tests.fakes.qmp_server import FakeQmp, Refusal, Reply

STEP_S = 0.002
DEADLOCK_S = 0.02
"""A `yank` so soon after a change of status can hang a QEMU with multifd: here it always does."""
SCHEMAS = Path(__file__).parent.parent / "qemu" / "schemas"
DEFAULTS: Mapping[str, Any] = {
    "max-bandwidth": 128 << 20, "downtime-limit": 300, "multifd-channels": 2, "tls-creds": "",
    "tls-hostname": "", "tls-authz": "", "cpu-throttle-initial": 20, "cpu-throttle-increment": 10,
    "max-cpu-throttle": 99, "throttle-trigger-threshold": 50, "max-postcopy-bandwidth": 0,
    "avail-switchover-bandwidth": 0,
}  # fmt: skip
UNDER_WAY = {"setup", "active", "pre-switchover", "device", "cancelling", "postcopy-active"}


@dataclass
class FakeNetwork:
    """Ports with a QEMU behind each; stalled: what is sent stays on the way."""

    listening: dict[int, "FakeVm"] = field(default_factory=dict)
    stalled: bool = False
    ports: Any = field(default_factory=lambda: itertools.count(40001))


@dataclass
class FakeVm:
    """One QEMU process. `qmp` is what clients talk to."""

    network: FakeNetwork
    version: str = "10.0"
    is_incoming: bool = False
    total_bytes: int = 64 << 20
    working_set_bytes: int = 8 << 20
    """What the guest ever touches: the rest is zeros, and costs nothing to send."""
    dirty_bytes_per_s: int = 0
    devices: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    """Ids of devices that are not passed through."""
    blocked_reasons: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.qmp = FakeQmp(self.command)
        self.run_state = "inmigrate" if self.is_incoming else "prelaunch"
        self.status = "none"
        self.error = ""
        self.capabilities: dict[str, bool] = {}
        self.parameters = dict(DEFAULTS)
        self.objects: dict[str, Mapping[str, Any]] = {}
        self.port: int | None = None
        self.exits_on_error = True
        self.exited = asyncio.Event()
        self.at_exit: Callable[[], None] = lambda: None
        self.passes = 0
        self.remaining_bytes = self.sent_bytes = 0
        self.peer: FakeVm | None = None
        self._was_running = False
        self._moved_at_s = 0.0
        self._resume_switchover = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.vfio = FakeDevices(self)
        self._schema: list[Any] = json.loads((SCHEMAS / f"{self.version}.json").read_text())

    async def command(self, name: str, arguments: Mapping[str, Any]) -> Reply:
        method = name.replace("-", "_")
        verb = getattr(self, "_" + method, None) or getattr(self.vfio, method, None)
        if verb is None or name in {"start", "switch_over", "tell", "close", "uses", "property_of"}:
            raise Refusal(f"The command {name} has not been found", "CommandNotFound")
        return await verb(**{key.replace("-", "_"): value for key, value in arguments.items()})

    def exit(self) -> None:
        """The process is gone, and its peer notices."""
        if self.exited.is_set():
            return
        self.exited.set()
        self.at_exit()
        self.network.listening.pop(self.port or 0, None)
        self.vfio.close()
        if self._task is not None:
            self._task.cancel()
        for monitor in self.qmp.monitors:
            monitor.hang_up()

    # Facts

    async def _query_status(self) -> Reply:
        return {"status": self.run_state, "running": self.run_state == "running"}

    async def _query_migrate(self) -> Reply:
        answer: dict[str, Any] = {"status": self.status} if self.status != "none" else {}
        if reasons := [*self.blocked_reasons, *self.vfio.blocked_reasons]:
            answer["blocked-reasons"] = reasons
        if self.port is not None:
            address = {"type": "inet", "host": "127.0.0.1", "port": str(self.port)}
            answer["socket-address"] = [address]
        if self.error:
            answer["error-desc"] = self.error
        if self.status in UNDER_WAY | {"completed"} and self.passes and not self.is_incoming:
            answer |= {"expected-downtime": 300, "setup-time": 2, "total-time": 100}
            answer["ram"] = {
                "total": self.total_bytes, "remaining": self.remaining_bytes, "page-size": 4096,
                "transferred": self.sent_bytes, "dirty-sync-count": self.passes, "mbps": 800.5,
                "dirty-pages-rate": self.dirty_bytes_per_s // 4096, "multifd-bytes": 0,
                "postcopy-requests": 0,
            }  # fmt: skip
            if self.vfio.plugged:
                answer["vfio"] = {"transferred": DEVICE_BYTES}
        return answer

    async def _query_qmp_schema(self) -> Reply:
        return self._schema

    async def _query_memory_size_summary(self) -> Reply:
        return {"base-memory": self.total_bytes, "plugged-memory": 0}

    async def _qom_list(self, path: str) -> Reply:
        devices = (*self.devices, *self.vfio.plugged) if path == "/machine/peripheral" else ()
        rows = [{"name": name, "type": "child<vfio-pci>"} for name in devices]
        if path == "/machine/peripheral":
            rows += [{"name": name, "type": "child<virtio-net-pci>"} for name in self.others]
        if path == "/objects":
            rows = [{"name": name, "type": "child<object>"} for name in self.objects]
        return [{"name": "type", "type": "string"}, *rows]

    async def _qom_get(self, path: str, property: str) -> Reply:
        if property != "type":
            found = self.vfio.property_of(path.rpartition("/")[2], property)
            if found is None:
                raise Refusal(f"Property '{path}.{property}' not found")
            return found
        return f"pc-i440fx-{self.version}-machine"

    async def _query_migrate_capabilities(self) -> Reply:
        return [{"capability": name, "state": on} for name, on in self.capabilities.items()]

    async def _query_migrate_parameters(self) -> Reply:
        return self.parameters

    # Settings

    async def _migrate_set_capabilities(self, capabilities: list[dict[str, Any]]) -> Reply:
        if self.status in UNDER_WAY:
            raise Refusal("There's a migration process in progress")
        states = {row["capability"]: row["state"] for row in capabilities}
        after = self.capabilities | states
        if after.get("postcopy-ram") and after.get("multifd"):
            raise Refusal("Postcopy is not yet compatible with multifd")
        self.capabilities = after
        return {}

    async def _migrate_set_parameters(self, **values: Any) -> Reply:
        named = {name.replace("_", "-"): value for name, value in values.items()}
        for name in named:
            if name not in self.parameters:
                raise Refusal(f"Parameter '{name}' is unexpected")
        self.parameters |= named
        return {}

    async def _object_add(self, **arguments: Any) -> Reply:
        if arguments["id"] in self.objects:
            raise Refusal(f"attempt to add duplicate property '{arguments['id']}' to object")
        if arguments["qom_type"] == "iommufd":
            self.vfio.take_iommufd(arguments)
        self.objects[arguments["id"]] = arguments
        return {}

    async def _object_del(self, id: str) -> Reply:
        if self.vfio.uses(id):
            raise Refusal(f"object '{id}' is in use, can not be deleted")
        if self.objects.pop(id, None) is None:
            raise Refusal(f"object '{id}' not found")
        return {}

    # The guest and the process

    async def _cont(self) -> Reply:
        if self.status in UNDER_WAY and self.is_incoming:
            raise Refusal("Migration is not finalized yet")
        await self._run()
        return {}

    async def _stop(self) -> Reply:
        if self.run_state == "running":
            self.run_state = "paused"
            await self.qmp.emit("STOP")
        return {}

    async def _quit(self) -> Reply:
        asyncio.get_running_loop().call_later(STEP_S, self.exit)
        return {}

    async def _run(self) -> None:
        if self.run_state != "running":
            self.run_state = "running"
            await self.qmp.emit("RESUME")
            await self.vfio.tell("running-p2p", "running")

    # A migration away

    @property
    def is_migrating(self) -> bool:
        return self.status in UNDER_WAY and (not self.is_incoming or self.status != "setup")

    async def _migrate(self, uri: str, resume: bool = False) -> Reply:
        if self.status in UNDER_WAY:
            raise Refusal("There's a migration process in progress")
        if reasons := [*self.blocked_reasons, *self.vfio.blocked_reasons]:
            raise Refusal(f"State blocked by {reasons[0]}")
        self.error, self.passes, self.sent_bytes = "", 0, 0
        self._was_running = self.run_state == "running"
        self._resume_switchover.clear()
        await self._become("setup")
        self._task = asyncio.create_task(self._transfer(int(uri.rpartition(":")[2])))
        return {}

    async def _transfer(self, port: int) -> None:
        await asyncio.sleep(STEP_S)
        peer = self.peer = self.network.listening.pop(port, None)
        if peer is None:
            await self._fail(f"Failed to connect to '127.0.0.1:{port}': Connection refused")
            return
        peer.peer = self
        if bool(self.parameters["tls-creds"]) != bool(peer.parameters["tls-creds"]):
            await self._fail("ram_save_setup failed: Input/output error")
            return
        await peer._become("active")
        await peer.vfio.tell("resuming")
        await self.vfio.tell("pre-copy")
        await self._next_pass(dirtied_bytes=self.working_set_bytes)
        await self._become("active")
        await self._copy_until_it_fits(peer)
        await self._switch_over(peer)

    async def _copy_until_it_fits(self, peer: "FakeVm") -> None:
        dirtied_bytes = 0.0
        while True:
            await asyncio.sleep(STEP_S)
            if peer.exited.is_set():
                await self._fail("Unable to read from socket: Connection reset by peer")
                raise asyncio.CancelledError
            pace = self.parameters["max-bandwidth"] or 4 << 30
            sent = 0 if self.network.stalled else min(self.remaining_bytes, int(pace * STEP_S))
            self.remaining_bytes -= sent
            self.sent_bytes += sent
            if self.run_state == "running":
                throttle = self.parameters["max-cpu-throttle"] / 100
                is_throttled = self.capabilities.get("auto-converge", False) and self.passes > 1
                share = 1 - throttle if is_throttled else 1.0
                dirtied_bytes += self.dirty_bytes_per_s * share * STEP_S
            if self.remaining_bytes == 0:
                await self._next_pass(dirtied_bytes=min(int(dirtied_bytes), self.working_set_bytes))
                dirtied_bytes = 0.0
                if self.remaining_bytes <= pace * self.parameters["downtime-limit"] / 1000:
                    return

    async def _next_pass(self, *, dirtied_bytes: int) -> None:
        self.passes += 1
        self.remaining_bytes = dirtied_bytes
        await self.qmp.emit("MIGRATION_PASS", {"pass": self.passes})

    async def _switch_over(self, peer: "FakeVm") -> None:
        await self.vfio.stop_for_the_switchover()
        if self.run_state == "running":
            self.run_state = "finish-migrate"
            await self.qmp.emit("STOP")
        self.run_state = "finish-migrate"
        if self.capabilities.get("pause-before-switchover"):
            await self._become("pre-switchover")
            await self._resume_switchover.wait()
        await self._become("device")
        if self.vfio.was_reset is not None:
            await self._fail(self.vfio.was_reset)
            return
        if self.network.stalled:
            self.qmp.block()  # the main loop writes to a socket that takes nothing
            while self.network.stalled:  # noqa: ASYNC110 - simulated time
                await asyncio.sleep(STEP_S)
            self.qmp.unblock()
        if peer.exited.is_set():
            await self._fail("Unable to write to socket: Broken pipe")
            return
        self.sent_bytes += self.remaining_bytes
        await self._next_pass(dirtied_bytes=0)
        await peer._become("completed")
        peer.run_state = "paused"
        await self._become("completed")
        self.run_state = "postmigrate"
        await self.vfio.tell("stop")

    async def _migrate_continue(self, state: str) -> Reply:
        if self.status != state:
            raise Refusal(f"Migration not in expected state: {self.status}")
        self._resume_switchover.set()
        return {}

    async def _migrate_cancel(self) -> Reply:
        if self.status not in UNDER_WAY:
            return {}
        await self._become("cancelling")
        if self.network.stalled and self.capabilities.get("multifd"):
            return {}  # its channels' threads hang in their sockets: nobody finishes this
        asyncio.get_running_loop().call_soon(self._finish_cancel)
        return {}

    def _finish_cancel(self) -> None:
        self._cancelled = asyncio.create_task(self._end("cancelled", "Channel error"))

    async def _yank(self, instances: list[dict[str, Any]]) -> Reply:
        if self.status not in UNDER_WAY:
            raise Refusal("Instance not found", "DeviceNotFound")
        if self.is_incoming:
            if self.peer is not None:  # else nobody is connected yet
                await self.peer._fail("Unable to write to socket: Connection reset by peer")
            return {}
        moved_s = asyncio.get_running_loop().time() - self._moved_at_s
        if self.capabilities.get("multifd") and self.status == "device" and moved_s < DEADLOCK_S:
            self.qmp.block()  # its threads wait for each other: nothing ends this
            await self._become("failed")
            self._was_running = False
            if self._task is not None:
                self._task.cancel()
            return {}
        await self._fail("Channel error: Input/output error")
        self.qmp.unblock()
        return {}

    async def _fail(self, error: str) -> None:
        await self._end("cancelled" if self.status == "cancelling" else "failed", error)

    async def _end(self, status: str, error: str) -> None:
        """The migration is over; the guest goes on here, by QEMU's own will."""
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        self.error = error
        await self._become(status)
        self.run_state = "prelaunch" if self.run_state == "finish-migrate" else self.run_state
        if self._was_running:
            await self._run()
        if self.peer is not None:
            await self.peer._lose_stream()

    async def _migrate_incoming(self, uri: str, exit_on_error: bool = True) -> Reply:
        if not self.is_incoming:
            raise Refusal("'-incoming' was not specified on the command line")
        if self.port is not None:
            raise Refusal("The incoming migration has already been started")
        self.exits_on_error = exit_on_error
        self.port = next(self.network.ports)
        assert self.port is not None
        self.network.listening[self.port] = self
        await self._become("setup")
        return {}

    async def _lose_stream(self) -> None:
        if self.status == "completed" or self.exited.is_set():
            return
        await self._become("failed")
        self.error = "Failed to read from the stream"
        if self.exits_on_error:
            self.exit()

    async def _become(self, status: str) -> None:
        self.status = status
        self._moved_at_s = asyncio.get_running_loop().time()
        if self.capabilities.get("events"):
            await self.qmp.emit("MIGRATION", {"status": status})

    @contextlib.asynccontextmanager
    async def serving(self, *paths: Path) -> AsyncIterator["FakeVm"]:
        async with self.qmp.serving(*paths):
            yield self
            self.vfio.close()
            for task in (self._task, getattr(self, "_cancelled", None)):
                if task is not None:
                    task.cancel()
                    await asyncio.wait([task])
