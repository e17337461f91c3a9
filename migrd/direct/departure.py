"""A guest that leaves: rounds of harvest and send while it runs, then the switchover.

    connect ─► tracking on, all pages pending ─► send ─► harvest ─► fits? ─no─► send ─► ...
                                                             │yes
          FAILED / CANCELLED ◄── anything goes wrong ──  pause the guest      PRE_SWITCHOVER
          (the guest runs on, or again)                      │ continue
                                                         devices stop, last harvest, last pages,
                                                         state, FINISH ─► LOADED ─► departed
                                                                                    COMPLETED
Statuses are QEMU's words, so that the engine has one machine for both.

Rules
1. It fits when what is pending, at the measured bandwidth, and what the devices have to send take
   no longer than the downtime limit. That is looked at after each harvest, and while a round is
   sent: a round is broken off as soon as what is left of it fits.
2. Until `departed` is said, nothing that goes wrong leaves the guest stopped: it is resumed here,
   its devices first, before anything else is tidied up. Once it is said, only the engine resumes.
3. A process that lies about being paused is found out: all sources are looked at once more behind
   the last pages. What was written then makes the transfer fail.
4. Bandwidth is what went over the wire by the time that took, over the last round that was worth
   measuring. The limit of it holds in precopy only: nobody gains by a guest that stands still.
5. Everything here belongs to one task. `stop` ends it from outside, once, and waits for the end.

A source whose log was lost has its tracking restarted and its memory sent anew; one that cannot be
restarted ends the transfer.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from typing import Final

import structlog

from migrd.core.facts import QemuStatus, RunState, TransferSample
from migrd.core.memory_map import PAGE_BYTES
from migrd.direct.devices import SourceDevices
from migrd.direct.figures import Figures, Limits, Road
from migrd.direct.guest import RECONNECT_S, Guest
from migrd.direct.handoff import HandedOver
from migrd.direct.manifest import Manifest
from migrd.direct.messages import ClientState
from migrd.direct.parts import KernelParts
from migrd.direct.sender import Sender
from migrd.engine.harvest import Harvest
from migrd.engine.threads import in_thread
from migrd.errors import MigrdError, VmmError, VmmRefused

TICK_S: Final = 0.1
LEAST_ROUND_S: Final = 0.02
"""Rounds that find nothing to send are no reason to spin."""
PAUSE_S: Final = 5.0
RESUME_TRIES: Final = 3
GONE: Final = frozenset({QemuStatus.FAILED, QemuStatus.CANCELLED})
"""The numbers of a transfer that did not happen are nobody's."""
ENDED: Final = GONE | {QemuStatus.COMPLETED}

log = structlog.get_logger(__name__)


class Departure:
    """One transfer away. Make it on the event loop, `start` it; `stop` it if it has not ended."""

    def __init__(
        self, guest: Guest, road: Road, parts: KernelParts, tell: Callable[[], None]
    ) -> None:
        """`tell` is called when the sample has changed."""
        self.status = QemuStatus.SETUP
        self.error: str | None = None
        settings = road.settings
        self.limits = Limits(settings.downtime_limit_s, settings.max_bandwidth_bytes_per_s)
        self._guest, self._road, self._parts, self._tell = guest, road, parts, tell
        self._seen = Figures(time.monotonic())
        self._continued = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._stop_as: tuple[QemuStatus, str | None] | None = None
        self._was_running = False
        self._is_paused = False
        """By us, or perhaps: a pause that was not answered counts."""
        self._is_left_off = False
        self._is_given_away = False
        """`departed` was said, or perhaps said: it is not for us any more to resume the guest."""
        self._is_giving_up = False
        self._sender: Sender | None = None
        self._harvest: Harvest | None = None
        self._devices: SourceDevices | None = None
        self._log = log.bind(vm=guest.about.vm, migration_id=settings.migration_id)

    # From outside -----------------------------------------------------------------------------

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"departure-{self._guest.about.vm}")

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    async def stop(self, status: QemuStatus, error: str | None, *, resumes: bool = True) -> None:
        """End it, unless it has ended, as `status`; returns when that is done. `resumes`: a guest
        that we have paused runs on."""
        task = self._task
        if task is None or self.has_ended:
            return
        self._is_given_away |= not resumes
        if self._stop_as is None:
            self._stop_as = status, error
            if status is QemuStatus.CANCELLED:
                self._enter(QemuStatus.CANCELLING)
            if not self._is_giving_up:  # the guest's way back is not broken off
                task.cancel()
        await asyncio.wait([task])
        if not self.has_ended:  # it was cancelled before its first step
            self._enter(status)

    async def leave_off(self) -> None:
        """The daemon ends: hang up without a word, so that the next one may begin anew."""
        self._is_left_off = True
        await self.stop(QemuStatus.FAILED, "migrd ends")

    def continue_switchover(self) -> None:
        """Raises VmmRefused when it is not the time for it."""
        if self.status is QemuStatus.PRE_SWITCHOVER:
            self._continued.set()
        elif self.status not in (QemuStatus.DEVICE, QemuStatus.COMPLETED):
            raise VmmRefused(f"the transfer is {self.status.value}: nothing waits to be continued")

    def change_limits(self, limits: Limits) -> None:
        self.limits = limits
        self._limit_bandwidth()
        self._break_round_if_it_fits()

    def note_death(self) -> None:
        """The process is proven dead. What is being sent is broken off between two records, so that
        the destination can be told."""
        if self._sender is not None:
            self._sender.break_round()

    def throttled(self, percent: int) -> None:
        self._seen.throttle_percent = percent

    def sample(self, run_state: RunState) -> TransferSample:
        """As it stands now."""
        sample = TransferSample(
            time.monotonic(),
            self.status,
            run_state,
            error=self.error,
            stopped_at_s=self._seen.stopped_at_s,
            resumed_at_s=self._seen.resumed_at_s,
        )
        if self._sender is None or self._harvest is None or self.status in GONE:
            return sample
        states = None if self._devices is None else self._devices.states
        memory_bytes = self._harvest.memory.bytes
        return self._seen.in_numbers(
            sample, self._sender.progress, self.limits, memory_bytes, states
        )

    # The one task -----------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            client = await self._guest.connected(within_s=RECONNECT_S)
            with client.held():
                await self._move(client)
        except asyncio.CancelledError:
            status, error = self._stop_as or (QemuStatus.FAILED, "the transfer was ended")
            await self._give_up(status, error)
        except (MigrdError, OSError, ValueError) as failure:
            await self._give_up(QemuStatus.FAILED, _sentence(failure))
        except Exception as failure:  # a defect of ours must not leave a guest standing
            self._log.error("the transfer broke", exc_info=failure)
            await self._give_up(QemuStatus.FAILED, f"{type(failure).__name__}: {failure}")

    async def _move(self, client: HandedOver) -> None:
        self._was_running = client.state is ClientState.RUNNING
        await self._set_out(client)
        ticking = asyncio.create_task(self._tick(), name="departure-figures")
        try:
            await self._copy()
            client = await self._pause(client)
            self._enter(QemuStatus.PRE_SWITCHOVER)
            await self._continued.wait()
            self._enter(QemuStatus.DEVICE)
            await self._switch_over(client)
        finally:
            ticking.cancel()
            await asyncio.wait([ticking])
        self._seen.ended_s = time.monotonic()
        self._enter(QemuStatus.COMPLETED)
        await self._tidy_up("the transfer is complete")

    async def _set_out(self, client: HandedOver) -> None:
        """Everything that is needed is there and connected, tracking is on, all is pending."""
        memory = client.memory
        if "throttle" in client.features:
            await client.throttle(0)  # a daemon that died may have left it slowed
        await in_thread(self._prepare, client)
        self._limit_bandwidth()
        if client.devices:
            self._devices = SourceDevices(client.devices, self._parts.open_device)
            await self._devices.begin()
        names = tuple(device.id for device in client.devices)
        await self._the_sender.connect(Manifest(memory, names, self._guest.about.kind or ""))
        await self._the_harvest.start()
        self._seen.setup_s = time.monotonic() - self._seen.began_s
        self._seen.rounds, self._seen.pending_pages = 1, memory.bytes // PAGE_BYTES
        self._enter(QemuStatus.ACTIVE)

    def _prepare(self, client: HandedOver) -> None:
        """Blocking: bitmaps of a large guest are large, and written when they are made."""
        road, settings = self._road, self._road.settings
        self._harvest = self._parts.harvest(client.memory, client.sources)
        self._sender = Sender(
            client.memory,
            client.region_fds,
            address=(road.address.host, road.address.port),
            channels=road.channels,
            tls=road.tls,
            peer_name=settings.peer_name,
            migration_id=settings.migration_id,
            epoch=settings.epoch,
            limits=road.stream,
            region_offsets=client.region_offsets,
        )

    async def _copy(self) -> None:
        """Until what is left fits the downtime limit."""
        while not self._fits(self._seen.pending_pages):
            began_s = time.monotonic()
            await self._send(stable=False)
            if self._guest.process.is_dead:
                raise self._guest.death()
            await self._copy_devices()
            await asyncio.sleep(began_s + LEAST_ROUND_S - time.monotonic())
            await self._read_sources()

    async def _pause(self, client: HandedOver) -> HandedOver:
        """The guest stands still when this returns; by which connection, it tells."""
        if not client.is_connected:
            memory, client = client.memory, await self._guest.connected(within_s=RECONNECT_S)
            if client.memory != memory:
                raise VmmRefused("the process has handed over other memory meanwhile")
        if self._was_running:
            self._seen.stopped_at_s = time.monotonic()  # before it is asked: an upper bound
            self._is_paused = True
            await client.pause(within_s=PAUSE_S)
        return client

    async def _switch_over(self, client: HandedOver) -> None:
        sender = self._the_sender
        sender.limit(None)
        if self._devices is not None:
            self._seen.device_bytes += await self._devices.stop(sender.send_device_data)
        await self._read_sources()
        await self._send(stable=True)
        state_fd = await client.save_state()
        try:
            await sender.send_state(state_fd)
        finally:
            os.close(state_fd)
        finishing = asyncio.create_task(sender.finish(), name="departure-finish")
        try:
            await self._refuse_writes()
            await finishing
        finally:
            finishing.cancel()
            await asyncio.gather(finishing, return_exceptions=True)
        self._is_given_away = True
        await client.departed(self._road.settings.migration_id)

    # Its steps --------------------------------------------------------------------------------

    async def _send(self, *, stable: bool) -> None:
        seen, harvest = self._seen, self._the_harvest
        try:
            sent = await self._the_sender.send(harvest.pending, stable=stable)
        finally:
            seen.pending_pages = await in_thread(harvest.pending.count)
        if seen.note_sent(sent):
            self.limits.assumed_bandwidth_bytes_per_s = None

    async def _read_sources(self) -> None:
        seen = self._seen
        seen.last_round = await self._the_harvest.round()
        seen.rounds += 1
        seen.pending_pages = seen.last_round.pending_pages
        for lost in seen.last_round.lost:
            self._log.warning("dirty pages lost, all taken for dirty", source=lost.source)
        self._tell()

    async def _copy_devices(self) -> None:
        devices, bandwidth = self._devices, self._seen.bandwidth_bytes_per_s
        if devices is None:
            return
        self._seen.device_bytes += await devices.precopy(self._the_sender.send_device_data)
        left = sum(size.stop_copy_bytes or 0 for size in await devices.sizes())
        self._seen.device_seconds = left / bandwidth if bandwidth else 0.0

    async def _refuse_writes(self) -> None:
        """Rule 3."""
        pages = await self._the_harvest.rest()
        if pages:
            raise VmmRefused(
                f"memory was written while paused: {pages} pages after the last ones were sent; "
                "the process must not answer PAUSE before its guest stands still",
                code="written_while_paused",
            )

    def _fits(self, pages: int) -> bool:
        blackout_s = self._seen.blackout_s(pages, self.limits)
        return blackout_s is not None and blackout_s <= self.limits.downtime_s

    def _limit_bandwidth(self) -> None:
        if self._sender is not None and self.status in (QemuStatus.SETUP, QemuStatus.ACTIVE):
            self._sender.limit(self.limits.bandwidth_bytes_per_s or None)

    def _break_round_if_it_fits(self) -> None:
        sender = self._sender
        if sender is None or self.status is not QemuStatus.ACTIVE:
            return
        progress = sender.progress
        self._seen.note_progress(progress)
        if self._fits(progress.remaining_pages):
            sender.break_round()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._break_round_if_it_fits()
            self._tell()

    @property
    def _the_sender(self) -> Sender:
        assert self._sender is not None
        return self._sender

    @property
    def _the_harvest(self) -> Harvest:
        assert self._harvest is not None
        return self._harvest

    # Ending -----------------------------------------------------------------------------------

    def _enter(self, status: QemuStatus) -> None:
        self.status = status
        self._tell()

    async def _give_up(self, status: QemuStatus, error: str | None) -> None:
        """The guest first. Not interrupted: `stop` cancels no more from here on."""
        self._is_giving_up = True
        if self.has_ended:  # what was left to tidy up has failed: the guest is away all the same
            self._log.warning("the transfer is complete, not all is tidied up", cause=error)
            return
        if not self._is_given_away:
            await self._let_run_again()
        await self._tidy_up(error or "the migration was cancelled")
        self.error, self._sender, self._harvest = error, None, None  # their bitmaps may be large
        if error is not None:
            self._log.warning("the transfer failed", cause=error)
        self._enter(status)

    async def _let_run_again(self) -> None:
        if self._devices is not None:
            try:
                await self._devices.abandon()
            except MigrdError as failure:  # the guest is not resumed on a guess: the engine looks
                self._log.error("devices do not run again", cause=failure.message)
                return
        if not self._is_paused:
            return
        for _ in range(RESUME_TRIES):
            try:
                client = await self._guest.connected(within_s=RECONNECT_S)
                self._enter(QemuStatus.CANCELLING)  # told first: from here on the guest may run
                await client.resume()
            except VmmError as failure:
                self._log.warning("the guest is not resumed yet", cause=failure.message)
            else:
                self._seen.resumed_at_s = time.monotonic()
                return

    async def _tidy_up(self, reason: str) -> None:
        """Connections, tracking, devices, throttle. Raises nothing."""
        if self._sender is not None:
            await self._sender.abort(reason, is_told=not self._is_left_off)
        if self._harvest is not None:
            await self._harvest.close()
        if self._devices is not None:
            await self._devices.close()
        if self._seen.throttle_percent and self.status is not QemuStatus.COMPLETED:
            with contextlib.suppress(VmmError):
                await (await self._guest.connected()).throttle(0)
                self._seen.throttle_percent = 0


def _sentence(failure: Exception) -> str:
    return failure.message if isinstance(failure, MigrdError) else str(failure)
