"""A running QEMU, as the engine's Vmm: facts, verbs, and the feed of a migration.

    in-band monitor   everything that may wait its turn; reconnects by itself
    second monitor    the out-of-band lane (`yank`, `migrate-pause`, `migrate-recover`): nothing
                      else is ever sent there, so it answers while the first is blocked. A QEMU
                      that has one monitor only (adopted) gets them out of band on that one.
    process           the pid held by a pidfd: the only proof of death there is

What the errors prove is told in `migrd.qemu.wire`. In addition each call that could not be answered
looks whether the process has just died, and then raises VmmDied, the one certain bad answer.

Traps (seen on real QEMU): `cont` on a source in `postmigrate` is accepted, so the engine's journal
has to forbid it. `migrate` to nobody is accepted and fails a moment later. A destination takes one
`migrate-incoming` in its life. A stalled link in status `device` blocks everything in band. The
in-band `stop` of a postcopy destination can hang while a vCPU waits for a page. A `yank` in the
very moment of the switchover can deadlock a QEMU with multifd (7.2 and 10.0 under load, 1 in 5: its
migration thread waits for ever for channels that have ended, and holds the big lock; the guest
never runs again). What stalls stands still, so `free_stalled` waits for it to have done so.

A source whose destination has cut the connection may stay `active` (10.0, 1 in 10): its sender is
blocked on a socket without a reader, and sees nothing. Its owner hears of the refusal and cancels.

Postcopy (seen on QEMU 10.0): a connection that breaks while a source completes its postcopy makes
it `failed`, not paused; it then starts the guest again that already runs at the destination. It
starts no guest that it found stopped, so we stop it ourselves before `migrate-start-postcopy`. It
begins to complete when what is left fits the downtime limit: with a limit of zero the rest travels
while a break can still be mended.

Longer than other modules because the port that it fulfils is.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Final, TypeVar

from migrd.core.facts import (
    Feature,
    RunState,
    TransferAddress,
    TransferSample,
    TransferSettings,
    VmFacts,
)
from migrd.core.rate_reading import MeasuredRate, RateMode, RateOffer
from migrd.core.vfio_launch import VfioLaunchDevice
from migrd.engine.ports import PluggedFds, PortRange, TlsIdentity
from migrd.errors import VmmDied, VmmError, VmmTimedOut, VmmUnreachable
from migrd.qemu import dirty_rate, migration, samples, stream_socket
from migrd.qemu.attachment import Attachment
from migrd.qemu.calls import CallObserver
from migrd.qemu.device_facts import ask_devices
from migrd.qemu.feed import QemuFeed
from migrd.qemu.monitor import Monitor
from migrd.qemu.offer import Offer
from migrd.qemu.passthrough import KnownDevices
from migrd.qemu.plug import Lane
from migrd.qemu.plugging import Plugging
from migrd.qemu.preparation import listening_port, prepare, prepare_to_listen, take_back
from migrd.qemu.probe import Probed
from migrd.qemu.qmp import DEFAULT_DEADLINE_S
from migrd.qemu.schema import QmpSchema
from migrd.qemu.seen import Seen
from migrd.qemu.wire import Arguments, CommandRefused, QmpEvent, json_object

RUN_STATE_DEADLINE_S: Final = 10.0
"""`cont`, `stop` and `migrate-continue` move device states: as long as the slowest device takes."""
DEATH_FOLLOWS_S: Final = 0.25
"""The socket of a dying QEMU closes a little before its process can be seen dead, and may be read
to its end a little after."""
QUIT_GRACE_S: Final = 3.0
KILL_GRACE_S: Final = 5.0
RECONNECT_WAIT_S: Final = 1.0
UNANSWERED_LIMIT: Final = 3
"""So many commands without an answer mean that the monitor is blocked."""
SETTLED_S: Final = 0.3
"""Nothing has moved for so long: a `yank` finds no thread in between (none hung in 50 tries)."""
YANK_MIGRATION: Final[Arguments] = {"instances": [{"type": "migration"}]}

T = TypeVar("T")

log = logging.getLogger(__name__)


class Machine:
    """Fulfils `migrd.engine.ports.Vmm` for one QEMU process. `start` it, and `close` it.

    Owns nothing of the attachment: whoever made it closes its process watch, and removes files.
    """

    def __init__(
        self,
        attachment: Attachment,
        *,
        call_deadline_s: float = DEFAULT_DEADLINE_S,
        observe: CallObserver | None = None,
        expected: Probed | None = None,
        devices: KnownDevices | None = None,
    ) -> None:
        """`expected`: what its binary has been found to offer; `devices`: what it was given."""
        self._vm = attachment.vm
        self._instance = attachment.instance
        self._process = attachment.process
        self._call_deadline_s = call_deadline_s
        self.monitor = Monitor(attachment.qmp_path, observe=observe, on_event=self._take_event)
        oob_path = attachment.oob_path
        self.oob = Monitor(oob_path, observe=observe) if oob_path is not None else None
        self._offer = Offer(self.monitor, expected)
        self._feeds: set[QemuFeed] = set()
        self._has_one_stream = False
        """What was prepared last; not known after a restart of this daemon."""
        self.is_new = False
        """Started by this daemon, and nobody has told it anything yet; its launcher says so."""
        self._seen = Seen()
        self.devices = devices if devices is not None else KnownDevices()
        lane = Lane(self._ask, self._send_fd, self.monitor.subscribe)
        self._plugging = Plugging(lane, self._process, self.devices, self._seen)

    # Life

    def start(self) -> None:
        """Begin to connect both monitors."""
        self.monitor.start()
        if self.oob is not None:
            self.oob.start()

    async def close(self) -> None:
        """Disconnect. The process goes on."""
        await self.monitor.close()
        if self.oob is not None:
            await self.oob.close()

    async def wait_connected(self, *, within_s: float) -> None:
        """Return once the in-band monitor is connected. Raises VmmUnreachable, VmmDied."""
        try:
            await self.monitor.wait_connected(within_s=within_s)
        except VmmUnreachable as failure:
            await self._raise_if_dead(failure)
            raise

    @property
    def vm(self) -> str:
        return self._vm

    @property
    def instance(self) -> str:
        return self._instance

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def is_dead(self) -> bool:
        return self._process.is_dead

    @property
    def is_reachable(self) -> bool:
        return self.monitor.is_connected

    # Facts

    async def facts(self) -> VmFacts:
        schema, kind, status, migrate, memory, kvm, *peripherals = await asyncio.gather(
            self.schema(),
            self._offer.machine_type(self._ask),
            self._ask("query-status"),
            self._ask("query-migrate"),
            self._ask("query-memory-size-summary"),
            self._ask_kvm(),
            self._ask("qom-list", {"path": "/machine/peripheral"}),
            self._ask("qom-list", {"path": "/machine/peripheral-anon"}),
        )
        memory_bytes = samples.read_memory_bytes(memory)
        is_sound = Feature.TCG_KEEPS_DIRTY_PAGES in schema.features
        ids, reasons = samples.read_passthrough(*peripherals), samples.read_blocked_reasons(migrate)
        self._seen.note_reset(samples.read_reset(migrate, self.devices.names))
        devices = await ask_devices(self._ask, ids, self.devices, self._seen, reasons)
        return VmFacts(
            vm=self._vm,
            run_state=RunState.of(json_object(status).get("status")),
            qemu_status=samples.read_status(migrate),
            qemu_version=samples.read_version(self.monitor.greeting),
            machine_type=kind,
            memory_bytes=memory_bytes,
            features=self._usable(schema.features),
            passthrough_devices=ids,
            devices=devices,
            blocked_reasons=reasons,
            may_lose_dirty_pages=samples.loses_dirty_pages(kvm, memory_bytes, is_sound=is_sound),
            pid=self.pid,
        )

    async def run_state(self) -> RunState:
        return RunState.of(json_object(await self._ask("query-status")).get("status"))

    async def schema(self) -> QmpSchema:
        """What this QEMU offers; see `migrd.qemu.offer`."""
        return await self._offer.schema(self._ask, deadline_s=2 * self._call_deadline_s)

    async def sample(self) -> TransferSample:
        migrate, status = await self._ask_all(("query-migrate", None), ("query-status", None))
        seen = self._seen
        sample = samples.read_sample(
            migrate,
            status,
            at_s=time.monotonic(),
            stopped_at_s=seen.stopped_at_s,
            resumed_at_s=seen.resumed_at_s,
            device_states=seen.device_states,
            own_names=self.devices.names,
        )
        seen.note_reset(sample.reset_devices)
        return sample

    @contextlib.asynccontextmanager
    async def feed(self) -> AsyncIterator[QemuFeed]:
        feed = QemuFeed(self._sample_unless_blocked, self._wait_dead)
        self._feeds.add(feed)
        task = asyncio.create_task(feed.run(), name=f"feed {self._vm}")
        try:
            yield feed
        finally:
            self._feeds.discard(feed)
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled() and (bug := task.exception()) is not None:
                log.error("the feed of %s had stopped by a bug", self._vm, exc_info=bug)

    # A migration away

    async def prepare_outgoing(self, settings: TransferSettings, tls: TlsIdentity | None) -> None:
        await prepare(self._ask, await self.schema(), settings, tls, is_outgoing=True)
        self._has_one_stream = settings.multifd_channels == 0 and not settings.postcopy

    async def start_outgoing(self, address: TransferAddress) -> None:
        uri = migration.tcp_uri(address)
        if self._has_one_stream:
            uri = await stream_socket.uri_of_stream(address, self._send_fd)
        self._seen.begin_migration()
        try:
            await self._ask("migrate", {"uri": uri}, deadline_s=2 * self._call_deadline_s)
        except CommandRefused:
            if uri == stream_socket.URI:  # not taken: else the destination waits on it
                with contextlib.suppress(VmmError):
                    await self._ask("closefd", {"fdname": stream_socket.NAME})
            raise

    async def clean_outgoing(self) -> None:
        await take_back(self._ask, await self.schema())

    async def prepare_incoming(
        self,
        settings: TransferSettings,
        tls: TlsIdentity | None,
        listen_host: str,
        ports: PortRange | None = None,
    ) -> TransferAddress:
        schema = await self.schema()
        is_new, self.is_new = self.is_new, False  # also when it goes wrong
        port = await prepare_to_listen(
            self._ask, schema, settings, tls, listen_host, ports, is_new=is_new
        )
        return TransferAddress(listen_host, port)

    async def set_limits(
        self,
        *,
        max_bandwidth_bytes_per_s: int | None = None,
        downtime_limit_s: float | None = None,
        switchover_bandwidth_bytes_per_s: int | None = None,
    ) -> None:
        chosen: dict[str, object] = {}
        if max_bandwidth_bytes_per_s is not None:
            chosen["max-bandwidth"] = max_bandwidth_bytes_per_s
        if downtime_limit_s is not None:
            chosen["downtime-limit"] = migration.milliseconds(downtime_limit_s)
        schema = await self.schema()
        if (
            switchover_bandwidth_bytes_per_s is not None
            and Feature.AVAIL_SWITCHOVER_BANDWIDTH in schema.features
        ):
            chosen["avail-switchover-bandwidth"] = switchover_bandwidth_bytes_per_s
        if chosen:
            await self._ask("migrate-set-parameters", chosen)

    async def set_throttle(self, percent: int) -> None:
        await self._ask("migrate-set-parameters", migration.throttle_parameters(percent))

    async def start_postcopy(self) -> None:
        await self._ask("migrate-set-parameters", {"downtime-limit": 0})
        await self._ask("stop", deadline_s=RUN_STATE_DEADLINE_S)
        await self._ask("migrate-start-postcopy")

    async def continue_switchover(self) -> None:
        await self._ask("migrate-continue", {"state": "pre-switchover"})

    async def cancel_transfer(self) -> None:
        await self._ask("migrate_cancel")

    async def free_stalled(self) -> None:
        await asyncio.sleep(self._seen.moved_at_s + SETTLED_S - time.monotonic())  # 0 when long ago
        try:
            await self._ask_oob("yank", YANK_MIGRATION)
        except CommandRefused as refusal:
            if refusal.error_class != "DeviceNotFound":
                raise
            log.debug("%s: no migration connection to free", self._vm)

    async def pause_postcopy(self) -> None:
        await self._ask_oob("migrate-pause")

    async def listen_for_recovery(
        self, listen_host: str, ports: PortRange | None = None
    ) -> TransferAddress:
        uri = migration.listen_uri(listen_host, ports)
        await self._ask_oob("migrate-recover", {"uri": uri})
        return TransferAddress(listen_host, await listening_port(self._ask))

    async def resume_postcopy(self, address: TransferAddress) -> None:
        arguments = {"uri": migration.tcp_uri(address), "resume": True}
        await self._ask("migrate", arguments, deadline_s=2 * self._call_deadline_s)

    # The guest and the process

    async def run_guest(self) -> None:
        await self._ask("cont", deadline_s=RUN_STATE_DEADLINE_S)

    async def pause_guest(self) -> None:
        await self._ask("stop", deadline_s=RUN_STATE_DEADLINE_S)

    async def plug_device(self, device: VfioLaunchDevice, fds: PluggedFds) -> None:
        await self._plugging.plug(device, fds)

    async def unplug_device(self, id: str, *, within_s: float) -> None:
        await self._plugging.unplug(id, within_s=within_s)

    async def rate_offer(self) -> RateOffer:
        return dirty_rate.offer(await self.schema())

    async def measure_rate(
        self, window_s: float, mode: RateMode, *, pages_per_gib: int
    ) -> MeasuredRate:
        schema = await self.schema()
        return await dirty_rate.measure(self._ask, schema, window_s, mode, pages_per_gib)

    async def quit(self) -> None:
        if self.monitor.is_connected:
            with contextlib.suppress(VmmError):
                await self._ask("quit")
                await self._process.wait_dead(within_s=QUIT_GRACE_S)
        if self._process.is_dead:
            return
        self._process.kill()
        if not await self._process.wait_dead(within_s=KILL_GRACE_S):
            raise VmmTimedOut(f"QEMU of {self._vm} was not seen to exit (pid {self.pid})")

    # Inside

    async def _ask(
        self, command: str, arguments: Arguments | None = None, *, deadline_s: float | None = None
    ) -> Any:
        limit_s = self._call_deadline_s if deadline_s is None else deadline_s
        return await self._heard(self.monitor.execute(command, arguments, deadline_s=limit_s))

    async def _ask_kvm(self) -> Any:
        try:
            return await self._ask("query-kvm")
        except CommandRefused:
            return {"enabled": False}  # built without KVM

    async def _ask_all(self, *questions: tuple[str, Arguments | None]) -> list[Any]:
        limit_s = self._call_deadline_s
        return await self._heard(self.monitor.execute_all(*questions, deadline_s=limit_s))

    async def _ask_oob(self, command: str, arguments: Arguments | None = None) -> Any:
        has_lane = self.oob is not None and self.oob.is_connected and self.oob.has_oob
        lane = self.oob if self.oob is not None and has_lane else self.monitor
        limit_s = self._call_deadline_s
        return await self._heard(lane.execute_oob(command, arguments, deadline_s=limit_s))

    async def _send_fd(self, name: str, fd: int) -> None:
        await self._heard(self.monitor.send_fd(name, fd, deadline_s=self._call_deadline_s))

    async def _heard(self, answer: Awaitable[T]) -> T:
        """Raises VmmDied instead where that is why no answer came."""
        try:
            return await answer
        except (VmmUnreachable, VmmTimedOut) as failure:
            await self._raise_if_dead(failure)
            raise

    async def _sample_unless_blocked(self) -> TransferSample:
        """For the feed: waits for the connection, and does not pile questions on a blocked one."""
        await self.wait_connected(within_s=RECONNECT_WAIT_S)
        if self.monitor.unanswered >= UNANSWERED_LIMIT:
            text = f"{self._vm}: {self.monitor.unanswered} commands are unanswered: blocked"
            raise VmmTimedOut(text)
        return await self.sample()

    def _usable(self, offered: frozenset[Feature]) -> frozenset[Feature]:
        """Without an out-of-band lane `yank` cannot be used when it is needed."""
        lanes = [self.monitor] if self.oob is None else [self.monitor, self.oob]
        has_lane = any(lane.has_oob for lane in lanes)
        return offered if has_lane else offered - {Feature.OOB, Feature.YANK}

    def _take_event(self, event: QmpEvent) -> None:
        self._seen.take(event)
        self._plugging.take(event)
        for feed in self._feeds:
            feed.take_event(event)

    async def _raise_if_dead(self, failure: VmmError) -> None:
        may_be_dying = isinstance(failure, VmmUnreachable)
        within_s = DEATH_FOLLOWS_S if may_be_dying else 0.0
        if self._process.is_dead or await self._process.wait_dead(within_s=within_s):
            raise await self._death() from failure

    async def _wait_dead(self) -> None:
        while not await self._process.wait_dead(within_s=60.0):
            pass
        raise await self._death()

    async def _death(self) -> VmmDied:
        """How it died, once all is read that it had said."""
        await self.monitor.wait_disconnected(within_s=DEATH_FOLLOWS_S)
        if self._seen.shut_itself_down:
            return VmmDied(
                f"the guest of {self._vm} shut itself down, and its QEMU ended (pid {self.pid})",
                code="guest_shut_down",
            )
        return VmmDied(f"QEMU of {self._vm} is dead (pid {self.pid})")
