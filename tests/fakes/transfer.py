"""One migration as the source QEMU's migration thread carries it out.

    setup -> active: pass, sync, pass ... -> STOP, pre-switchover -> (continue) device -> completed
                     |                                                        |
                     +-- start-postcopy: STOP, pre-switchover, device, postcopy-active -> completed
    broken or cancelled before it is over: failed/cancelled, and the source resumes by itself

A pass sends what remains; once that fits (downtime limit) x (bandwidth) the dirty pages are synced,
and if they fit too, the guest is stopped. `completed` needs the destination's acknowledgement.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from migrd.core.facts import QemuStatus, RunState
from migrd.errors import VmmRefused
from tests.fakes.virtual_time import now_s

if TYPE_CHECKING:
    from tests.fakes.qemu_process import FakeQemu

TICK_S = 0.05
LOOK_S = 0.1
STEP_S = 0.0005
NOTICE_S = 0.05
"""A source notices a dead peer at its next write."""
PAGE_BYTES = 4096


class Broken(Exception):
    """The stream is no more."""


class Cancelled(Exception):
    """migrate_cancel was carried out."""


class Transfer:
    """The migration thread of one source."""

    def __init__(self, source: FakeQemu, port: int) -> None:
        self.source = source
        self.port = port
        self.destination: FakeQemu | None = None
        self.is_over = False
        self.is_postcopy = False
        self.postcopy_wanted = False
        self._ran = source.is_running
        self._broken: str | None = None
        self._cancelling = False
        self._continued = False
        self._resume_port: int | None = None
        self._woken = asyncio.Event()
        self._stopped_at_s = 0.0
        self._synced_at_s = now_s()
        self.task: asyncio.Task[None] | None = None

    # Commands -----------------------------------------------------------------------------------

    def start(self) -> None:
        self.source.wire.transfers.append(self)
        self.task = asyncio.create_task(self._run(), name=f"migration-{self.source.name}")

    def wake(self) -> None:
        self._woken.set()

    def break_(self, reason: str) -> None:
        """The connection is gone, and this end knows."""
        if not self.is_over:
            self._broken = self._broken or reason
            self.wake()

    def cancel(self) -> None:
        """QMP migrate_cancel. Raises VmmRefused in postcopy."""
        if self.is_postcopy:
            raise VmmRefused("Postcopy migration in progress, cannot cancel.")
        if not self.is_over and not self._cancelling:
            self._cancelling = True
            self.source.set_status(QemuStatus.CANCELLING)
            self.wake()

    def continue_(self) -> None:
        """QMP migrate-continue. Raises VmmRefused at any other status."""
        if self.source.status is not QemuStatus.PRE_SWITCHOVER:
            raise VmmRefused("Migration not in expected state: pre-switchover")
        self._continued = True
        self.wake()

    def start_postcopy(self) -> None:
        """QMP migrate-start-postcopy. Raises VmmRefused."""
        settings = self.source.limits.settings
        if settings is None or not settings.postcopy:
            raise VmmRefused("Enable postcopy with migrate_set_capability before the start")
        if self.is_over or self.source.status is QemuStatus.NONE:
            raise VmmRefused("Start postcopy is only valid with a migration in progress")
        self.postcopy_wanted = True
        self.wake()

    def resume(self, port: int) -> None:
        """QMP migrate with resume. Raises VmmRefused unless paused."""
        if self.source.status is not QemuStatus.POSTCOPY_PAUSED:
            raise VmmRefused("Cannot resume if there is no paused migration")
        self._resume_port = port
        self.wake()

    def end_died(self, qemu: FakeQemu) -> None:
        """One of the two processes has ended."""
        if qemu is self.source:
            self._source_died()
        else:
            self.break_("Unable to write to socket: Broken pipe")

    def lose_what_was_sent(self) -> None:
        """Break a postcopy whose last pages are sent and did not arrive: nothing resumes that."""
        assert self.is_postcopy
        self.is_over = True
        if self.task is not None:
            self.task.cancel()
        if self.destination is not None:
            self.destination.set_status(QemuStatus.POSTCOPY_PAUSED)
        self.source.set_status(QemuStatus.FAILED)

    def _source_died(self) -> None:
        """The other end sees the connection close, if the network says so."""
        was_over, self.is_over = self.is_over, True
        if self.task is not None:
            self.task.cancel()
        there = self.destination
        if was_over or there is None or there.is_dead or self.source.wire.frozen:
            return
        if self.is_postcopy:
            there.set_status(QemuStatus.POSTCOPY_PAUSED)
        else:
            there.stream_ended("load of migration failed: Input/output error")

    # The thread ---------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            await self._carry_out()
        except Broken as exc:
            await self._give_up(QemuStatus.FAILED, str(exc))
        except Cancelled:
            await self._give_up(QemuStatus.CANCELLED, "")
        finally:
            self.is_over = True
            self.source.unblock()
            self.source.wire.transfers.remove(self)

    async def _carry_out(self) -> None:
        source = self.source
        source.set_status(QemuStatus.SETUP)
        await self._pause(STEP_S)
        await self._connect()
        source.set_status(QemuStatus.ACTIVE)
        source.numbers.remaining_bytes = source.load.memory_bytes
        self._pass()
        await self._precopy()
        self._stop_guest()
        if source.limits.settings is not None:
            await self._wait_before_switchover()
        source.set_status(QemuStatus.DEVICE)
        if self.postcopy_wanted:
            await self._postcopy()
        else:
            await self._complete()

    async def _wait_before_switchover(self) -> None:
        """The guest stands still; that the other end is gone is not noticed here."""
        self.source.set_status(QemuStatus.PRE_SWITCHOVER)
        while not self._continued:
            await self._woken.wait()
            self._woken.clear()
            if self._cancelling:
                raise Cancelled
        if self._broken is not None:
            await asyncio.sleep(NOTICE_S)  # found out by writing

    async def _connect(self) -> None:
        await self._until(lambda: not self.source.wire.frozen)
        there = self.source.wire.listener(self.port)
        if there is None or there.status is not QemuStatus.SETUP:
            raise Broken(f"Failed to connect to '127.0.0.1:{self.port}': Connection refused")
        self.source.wire.close(self.port)
        self.destination = there
        there.transfer = self
        there.set_status(QemuStatus.ACTIVE)

    async def _precopy(self) -> None:
        """Passes until the rest fits, or postcopy is wanted."""
        numbers = self.source.numbers
        while not self.postcopy_wanted:
            if numbers.remaining_bytes <= self._threshold_bytes:
                self._sync()
                if numbers.remaining_bytes <= self._threshold_bytes:
                    return
            await self._send(self._tick_bytes)

    @property
    def _bandwidth(self) -> float:
        wire, limit = self.source.wire, self.source.limits.max_bandwidth_bytes_per_s
        return min(wire.bandwidth_bytes_per_s, limit or wire.bandwidth_bytes_per_s)

    @property
    def _threshold_bytes(self) -> int:
        limits = self.source.limits
        bandwidth = limits.switchover_bandwidth_bytes_per_s or self._bandwidth
        return int(bandwidth * limits.downtime_limit_s)

    @property
    def _tick_bytes(self) -> int:
        left = max(1, self.source.numbers.remaining_bytes - self._threshold_bytes)
        return min(left, int(self._bandwidth * TICK_S))

    def _sync(self) -> None:
        """Fetch what the guest has dirtied since the last sync."""
        source, since_s = self.source, now_s() - self._synced_at_s
        self._synced_at_s = now_s()
        rate = source.load.dirty_bytes_per_s * (1 - source.limits.throttle_percent / 100)
        dirtied = 0.0
        if source.is_running or (self._stopped_at_s and self._ran):
            dirtied = min(source.load.working_set_bytes, rate * since_s)
        numbers = source.numbers
        numbers.remaining_bytes = min(
            source.load.memory_bytes, numbers.remaining_bytes + int(dirtied)
        )
        if since_s > 0:
            numbers.dirty_pages_per_s = dirtied / since_s / PAGE_BYTES
        self._pass()

    def _pass(self) -> None:
        self.source.numbers.dirty_sync_count += 1
        self.source.tell("MIGRATION_PASS")

    def _stop_guest(self) -> None:
        self._stopped_at_s = now_s()
        self._ran = self.source.is_running
        self.source.stop(RunState.FINISH_MIGRATE)
        self._sync()

    async def _complete(self) -> None:
        """Device phase of a precopy: the rest, the acknowledgement, completed."""
        source, there = self.source, self._there()
        await self._send_device(source.numbers.remaining_bytes)
        version = source.copy
        await self._pause(STEP_S)
        there = self._there()
        assert version is not None
        there.numbers.transferred_bytes = source.numbers.transferred_bytes
        there.arrive(version, None)
        there.set_status(QemuStatus.COMPLETED)
        await self._until(lambda: not source.wire.frozen and not source.wire.swallows_ack)
        source.numbers.downtime_s = now_s() - self._stopped_at_s
        source.run_state = RunState.POSTMIGRATE
        self.is_over = True
        source.set_status(QemuStatus.COMPLETED)

    async def _postcopy(self) -> None:
        """The guest moves first; from the moment it is there nothing brings it back."""
        source, there = self.source, self._there()
        if source.make.postcopy_status_first:
            source.set_status(QemuStatus.POSTCOPY_ACTIVE)
        await self._send_device(0)
        there = self._there()
        assert source.copy is not None
        self.is_postcopy = True
        left, source.copy = source.copy, None  # no `cont` here until all of it is over there
        there.arrive(left, source)
        there.set_status(QemuStatus.POSTCOPY_ACTIVE)
        source.set_status(QemuStatus.POSTCOPY_ACTIVE)
        source.numbers.downtime_s = now_s() - self._stopped_at_s
        while source.numbers.remaining_bytes > 0:
            try:
                await self._send(int(self._bandwidth * TICK_S))
            except Broken:
                await self._paused()
        there.missing_from, source.copy = None, left
        there.set_status(QemuStatus.COMPLETED)
        source.run_state = RunState.POSTMIGRATE
        self.is_over = True
        source.set_status(QemuStatus.COMPLETED)

    async def _paused(self) -> None:
        """postcopy-paused on both sides (the other notices only if the network tells it)."""
        source, there = self.source, self.destination
        assert there is not None
        while True:
            self._broken, self._resume_port = None, None
            source.set_status(QemuStatus.POSTCOPY_PAUSED)
            if not source.wire.frozen:
                there.set_status(QemuStatus.POSTCOPY_PAUSED)
            while self._resume_port is None:
                await self._woken.wait()
                self._woken.clear()
            source.set_status(QemuStatus.POSTCOPY_RECOVER_SETUP)
            await asyncio.sleep(STEP_S)
            is_there = source.wire.listener(self._resume_port) is there
            if is_there and not source.wire.frozen and not there.is_dead:
                break
        source.wire.close(self._resume_port)
        there.set_status(QemuStatus.POSTCOPY_RECOVER)
        source.set_status(QemuStatus.POSTCOPY_RECOVER)
        await asyncio.sleep(STEP_S)
        self._broken = None
        there.set_status(QemuStatus.POSTCOPY_ACTIVE)
        source.set_status(QemuStatus.POSTCOPY_ACTIVE)

    async def _give_up(self, status: QemuStatus, reason: str) -> None:
        """Failed or cancelled: the source goes on by itself, and nobody is asked."""
        source, there = self.source, self.destination
        self.is_over = True
        source.unblock()
        source.numbers.error = reason or None
        if there is not None and not source.wire.frozen:
            there.stream_ended(reason or "load of migration failed: Input/output error")
        source.set_status(status)
        if source.run_state is RunState.FINISH_MIGRATE:
            if self._ran:
                source.run()
            else:
                source.run_state = RunState.PAUSED

    # Waiting and sending --------------------------------------------------------------------------

    def _there(self) -> FakeQemu:
        there = self.destination
        if there is None or there.is_dead:
            raise Broken("Unable to write to socket: Broken pipe")
        return there

    def _look(self) -> None:
        """Raise what has come to pass."""
        if self._broken is not None:
            raise Broken(self._broken)
        settings = self.source.limits.settings
        is_stuck = settings is not None and settings.multifd_channels and self.source.wire.frozen
        if self._cancelling and not is_stuck:
            raise Cancelled

    async def _pause(self, seconds: float) -> None:
        """Let time pass; woken early by what may end the stream. Raises Broken, Cancelled."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        self._woken.clear()
        self._look()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._pause(LOOK_S)

    async def _send(self, bytes_: int) -> None:
        """So many bytes at the bandwidth there is."""
        numbers = self.source.numbers
        await self._until(lambda: not self.source.wire.frozen)
        bytes_ = min(bytes_, numbers.remaining_bytes)
        await self._pause(max(bytes_, 1) / self._bandwidth)
        self._there()
        numbers.remaining_bytes -= bytes_
        numbers.transferred_bytes += bytes_
        numbers.bandwidth_bytes_per_s = self._bandwidth
        if self.destination is not None:
            self.destination.numbers.transferred_bytes = numbers.transferred_bytes

    async def _send_device(self, rest_bytes: int) -> None:
        """The rest with the guest stopped: a stalled write here holds the monitor's lock."""
        source = self.source
        source.block()
        try:
            await self._pause(source.load.device_s)
            await self._until(lambda: not source.wire.frozen)
            cost_s = (rest_bytes + source.load.device_bytes) / self._bandwidth
            await self._pause(cost_s)
            await self._until(lambda: not source.wire.frozen)
            self._there()
            source.numbers.remaining_bytes -= rest_bytes
            source.numbers.transferred_bytes += rest_bytes + source.load.device_bytes
        finally:
            source.unblock()
