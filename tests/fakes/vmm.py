"""The engine's Vmm on a simulated QEMU: latencies, time-outs, a blocked monitor, proof of death.

One FakeVmm is one daemon's connection to one process (`fakes.qemu_process.FakeQemu`); the process
goes on without it. In-band calls wait while the process is blocked, and raise VmmTimedOut after
DEADLINE_S; what was sent takes effect when it is unblocked. Out-of-band calls are answered always.

Longer than others because the port that it fulfils is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import TypeVar

from migrd.core.facts import (
    PassthroughFacts,
    QemuStatus,
    RunState,
    TransferAddress,
    TransferSample,
    TransferSettings,
    VmFacts,
)
from migrd.core.rate_reading import MeasuredRate, RateMode, RateOffer
from migrd.core.vfio_launch import GivenBy, VfioLaunchDevice
from migrd.engine.ports import PluggedFds, TlsIdentity
from migrd.errors import VmmDied, VmmRefused, VmmTimedOut, VmmUnreachable
from tests.fakes.qemu_process import FakeQemu
from tests.fakes.transfer import Transfer
from tests.fakes.virtual_time import now_s

T = TypeVar("T")

DEADLINE_S = 2.0
LATENCY_S = 0.0004
PACE_S = 0.1
LOST_PACE_S = 0.05
NEAR_END_PACE_S = 0.02
_SHORT_LIVED = frozenset({QemuStatus.SETUP, QemuStatus.DEVICE, QemuStatus.CANCELLING})
POLLS_GROW = 1.0
"""Each poll that finds nothing new makes the pause before the next one so much longer."""
LONGEST = 20.0
IN_POSTCOPY = frozenset({QemuStatus.POSTCOPY_ACTIVE, QemuStatus.POSTCOPY_RECOVER})
IDLE = frozenset({QemuStatus.NONE, QemuStatus.COMPLETED, QemuStatus.FAILED, QemuStatus.CANCELLED})


class FakeVmm:
    """Fulfils `engine.ports.Vmm`."""

    def __init__(self, qemu: FakeQemu) -> None:
        self.qemu = qemu
        self.is_connected = True
        self.is_deaf = False
        """No event arrives on this connection."""
        self.event_delay_s = 0.0
        self.is_foreign = False
        """Adopted without proof of life: its death cannot be seen."""
        self._stopped_at_s: float | None = None
        self._resumed_at_s: float | None = None
        self._feeds: set[FakeFeed] = set()
        self._leaving: set[str] = set()
        qemu.listeners.append(self._take_event)
        qemu.on_death.append(self._wake_feeds)

    def disconnect(self) -> None:
        """The daemon has ended."""
        if self._take_event in self.qemu.listeners:
            self.qemu.listeners.remove(self._take_event)
            self.qemu.on_death.remove(self._wake_feeds)

    @property
    def vm(self) -> str:
        return self.qemu.spec.name

    @property
    def instance(self) -> str:
        return self.qemu.instance

    @property
    def pid(self) -> int | None:
        return self.qemu.pid

    @property
    def is_dead(self) -> bool:
        return self.qemu.is_dead and not self.is_foreign

    @property
    def is_reachable(self) -> bool:
        return self.is_connected and not self.qemu.is_dead

    # Events -------------------------------------------------------------------------------------

    def _take_event(self, event: str) -> None:
        if self.is_deaf:
            return
        if self.event_delay_s:
            asyncio.get_running_loop().call_later(self.event_delay_s, self._heard, event)
        else:
            self._heard(event)

    def _heard(self, event: str) -> None:
        if event == "STOP":
            self._stopped_at_s = now_s()
        elif event == "RESUME":
            self._resumed_at_s = now_s()
        if self.is_connected:
            for feed in self._feeds:
                feed.take_event(event)

    def _wake_feeds(self) -> None:
        for feed in self._feeds:
            feed.wake()

    # Calls --------------------------------------------------------------------------------------

    def _check_alive(self) -> None:
        if self.is_dead:
            raise VmmDied(f"QEMU of {self.vm} is dead (pid {self.pid})")
        if not self.is_reachable:
            raise VmmUnreachable(f"QEMU of {self.vm}: no connection")

    async def _in_band(self, effect: Callable[[], T], *, deadline_s: float = DEADLINE_S) -> T:
        self._check_alive()
        await asyncio.sleep(LATENCY_S)
        self._check_alive()
        if self.qemu.is_blocked:
            try:
                async with asyncio.timeout(deadline_s):
                    await self.qemu.answered()
            except TimeoutError:
                self.qemu.take_later(_quietly(effect))
                self._check_alive()
                raise VmmTimedOut(
                    f"QEMU of {self.vm} has not answered in {deadline_s:g} s"
                ) from None
            except asyncio.CancelledError:
                self.qemu.take_later(_quietly(effect))
                raise
        self._check_alive()
        result = effect()
        await asyncio.sleep(LATENCY_S)
        self._check_alive()
        return result

    async def _out_of_band(self, effect: Callable[[], T]) -> T:
        self._check_alive()
        await asyncio.sleep(LATENCY_S)
        self._check_alive()
        result = effect()
        await asyncio.sleep(LATENCY_S)
        return result

    async def facts(self) -> VmFacts:
        return await self._in_band(self._facts)

    def _facts(self) -> VmFacts:
        qemu = self.qemu
        return VmFacts(
            vm=self.vm,
            run_state=qemu.run_state,
            qemu_status=qemu.status,
            qemu_version=qemu.make.version,
            machine_type="pc-i440fx-7.2",
            memory_bytes=qemu.load.memory_bytes,
            features=qemu.make.features,
            passthrough_devices=qemu.device_ids,
            devices=self._devices(),
            blocked_reasons=qemu.blocked_reasons,
            pid=qemu.pid,
        )

    def _devices(self) -> tuple[PassthroughFacts, ...]:
        qemu = self.qemu
        states, forgets = dict(qemu.device_states), qemu.make.forgets_addresses
        facts = []
        for id_ in qemu.device_ids:
            given = qemu.devices.get(id_)
            own = tuple(reason for reason in qemu.blocked_reasons if reason.startswith(f"{id_}:"))
            facts.append(
                PassthroughFacts(
                    id=id_,
                    address=None if given is None or forgets else given.address,
                    iommufd=given.iommufd if given is not None else None,
                    guest_bus=given.guest_bus if given is not None else None,
                    guest_address=given.guest_address if given is not None else None,
                    migrates=not own,
                    blocked_reasons=own,
                    device_state=states.get(id_),
                    was_reset=id_ in qemu.reset_devices,
                )
            )
        return tuple(facts)

    async def run_state(self) -> RunState:
        return await self._in_band(lambda: self.qemu.run_state)

    async def sample(self) -> TransferSample:
        return await self._in_band(self.sample_now)

    def sample_now(self) -> TransferSample:
        """query-migrate and query-status, with the events seen on this connection."""
        sample = self.qemu.sample()
        return replace(sample, stopped_at_s=self._stopped_at_s, resumed_at_s=self._resumed_at_s)

    @contextlib.asynccontextmanager
    async def feed(self) -> AsyncIterator[FakeFeed]:
        feed = FakeFeed(self)
        self._feeds.add(feed)
        try:
            yield feed
        finally:
            self._feeds.discard(feed)

    # A migration away -----------------------------------------------------------------------------

    async def prepare_outgoing(self, settings: TransferSettings, tls: TlsIdentity | None) -> None:
        await self._in_band(lambda: self._prepare(settings))

    def _prepare(self, settings: TransferSettings) -> None:
        qemu = self.qemu
        if qemu.transfer is not None and not qemu.transfer.is_over:
            raise VmmRefused("There's a migration process in progress")
        if settings.postcopy and qemu.device_ids:
            raise VmmRefused("VFIO migration is not supported with postcopy migration")
        qemu.limits.settings = settings
        qemu.limits.downtime_limit_s = settings.downtime_limit_s
        qemu.limits.max_bandwidth_bytes_per_s = settings.max_bandwidth_bytes_per_s
        qemu.limits.throttle_percent = 0

    async def start_outgoing(self, address: TransferAddress) -> None:
        self._stopped_at_s = self._resumed_at_s = None
        await self._in_band(lambda: self.qemu.start_outgoing(address))

    async def clean_outgoing(self) -> None:
        await self._in_band(self._clean)

    def _clean(self) -> None:
        if self.qemu.transfer is not None and not self.qemu.transfer.is_over:
            raise VmmRefused("There's a migration process in progress")
        self.qemu.limits = type(self.qemu.limits)()

    async def prepare_incoming(
        self,
        settings: TransferSettings,
        tls: TlsIdentity | None,
        listen_host: str,
        ports: tuple[int, int] | None = None,
    ) -> TransferAddress:
        def listen() -> TransferAddress:
            if self.qemu.port is None:
                self._prepare(settings)
                self.qemu.start_incoming()
            assert self.qemu.port is not None
            return TransferAddress(listen_host, self.qemu.port)

        return await self._in_band(listen)

    async def set_limits(
        self,
        *,
        max_bandwidth_bytes_per_s: int | None = None,
        downtime_limit_s: float | None = None,
        switchover_bandwidth_bytes_per_s: int | None = None,
    ) -> None:
        def change() -> None:
            limits = self.qemu.limits
            if max_bandwidth_bytes_per_s is not None:
                limits.max_bandwidth_bytes_per_s = max_bandwidth_bytes_per_s
            if downtime_limit_s is not None:
                limits.downtime_limit_s = round(downtime_limit_s, 3)
            if switchover_bandwidth_bytes_per_s is not None:
                limits.switchover_bandwidth_bytes_per_s = switchover_bandwidth_bytes_per_s

        await self._in_band(change)

    async def set_throttle(self, percent: int) -> None:
        def throttle() -> None:
            settings = self.qemu.limits.settings
            if settings is not None and settings.auto_converge:
                self.qemu.limits.throttle_percent = percent

        await self._in_band(throttle)

    async def start_postcopy(self) -> None:
        def start() -> None:
            transfer = self._transfer()
            self.qemu.stop(RunState.PAUSED)  # or it would resume by itself when it fails
            transfer.start_postcopy()

        await self._in_band(start)

    async def continue_switchover(self) -> None:
        await self._in_band(lambda: self._transfer().continue_())

    async def cancel_transfer(self) -> None:
        def cancel() -> None:
            if self.qemu.transfer is not None:
                self.qemu.transfer.cancel()

        await self._in_band(cancel)

    async def free_stalled(self) -> None:
        await self._out_of_band(self.qemu.yank)

    async def pause_postcopy(self) -> None:
        def pause() -> None:
            transfer = self._transfer()
            if not transfer.is_postcopy or self.qemu.status not in IN_POSTCOPY:
                raise VmmRefused("migrate-pause is currently only supported during postcopy")
            if transfer.source is not self.qemu:  # it pauses, whatever the other end knows
                self.qemu.set_status(QemuStatus.POSTCOPY_PAUSED)
            if transfer.source is self.qemu or not self.qemu.wire.frozen:
                transfer.break_("Channel error: Input/output error")

        await self._out_of_band(pause)

    async def listen_for_recovery(
        self, listen_host: str, ports: tuple[int, int] | None = None
    ) -> TransferAddress:
        def listen() -> TransferAddress:
            if self.qemu.status is not QemuStatus.POSTCOPY_PAUSED:
                raise VmmRefused("Migrate recover can only be run when postcopy is paused.")
            return TransferAddress(listen_host, self.qemu.wire.listen(self.qemu))

        return await self._out_of_band(listen)

    async def resume_postcopy(self, address: TransferAddress) -> None:
        await self._in_band(lambda: self._transfer().resume(address.port))

    def _transfer(self) -> Transfer:
        if self.qemu.transfer is None:
            raise VmmRefused("There is no migration in progress")
        return self.qemu.transfer

    # The guest and the process --------------------------------------------------------------------

    async def run_guest(self) -> None:
        await self._in_band(self.qemu.cont)

    async def pause_guest(self) -> None:
        await self._in_band(lambda: self.qemu.stop(RunState.PAUSED))

    async def plug_device(self, device: VfioLaunchDevice, fds: PluggedFds) -> None:
        if (device.given_by is GivenBy.FD) != (fds.device is not None):
            raise VmmRefused("a descriptor is missing, or one too many", code="bad_descriptors")
        if device.id in self._leaving & self.qemu.devices.keys():
            text = f"{device.id} is being unplugged, and the guest has not let go of it yet"
            raise VmmRefused(text, code="unplug_pending")
        is_new = fds.iommufd is not None
        await self._in_band(lambda: self.qemu.plug(device, new_iommufd=is_new))

    async def unplug_device(self, id: str, *, within_s: float) -> None:
        await self._in_band(lambda: self.qemu.ask_to_unplug(id))
        self._leaving.add(id)
        deadline_s = now_s() + within_s
        while id in self.qemu.devices:
            self._check_alive()
            if now_s() >= deadline_s:
                text = f"the guest has not let go of {id} within {within_s:g} s, and still may"
                raise VmmTimedOut(text, code="unplug_timed_out")
            await asyncio.sleep(LATENCY_S)
        self._leaving.discard(id)

    async def rate_offer(self) -> RateOffer:
        return await self._in_band(lambda: self.qemu.meter.offer)

    async def measure_rate(
        self, window_s: float, mode: RateMode, *, pages_per_gib: int
    ) -> MeasuredRate:
        meter = self.qemu.meter
        await self._in_band(lambda: meter.begin(window_s, mode))
        overrun_s = await meter.until_over(window_s)
        load, is_running = self.qemu.load, self.qemu.run_state is RunState.RUNNING
        pages = pages_per_gib if mode is RateMode.PAGE_SAMPLING else None
        return await self._in_band(
            lambda: meter.figure(load, window_s, pages, overrun_s, is_running=is_running)
        )

    async def quit(self) -> None:
        if self.qemu.is_dead:
            return
        await asyncio.sleep(LATENCY_S)
        if self.qemu.ignores_quit:
            raise VmmTimedOut(f"QEMU of {self.vm} was not seen to exit (pid {self.pid})")
        if self.qemu.guest.asked_to_end is not None:
            self.qemu.guest.asked_to_end(self.qemu)
        was_whole = self.qemu in self.qemu.guest.whole_copies
        self.qemu.die("terminated by migrd")
        if was_whole:
            self.qemu.guest.check_kept(f"migrd ended {self.qemu.name}")
        await asyncio.sleep(LATENCY_S)


class FakeFeed:
    """Fulfils `engine.ports.TransferFeed`."""

    def __init__(self, vmm: FakeVmm) -> None:
        self._vmm = vmm
        self._queue: deque[TransferSample] = deque()
        self._latest: TransferSample | None = None
        self._woken = asyncio.Event()
        self._poll_at_s = 0.0
        self._grown = 1.0

    @property
    def latest(self) -> TransferSample | None:
        return self._latest

    def wake(self) -> None:
        self._woken.set()

    def take_event(self, event: str) -> None:
        """Told before any poll could tell; a run state follows STOP only when asked for."""
        last, vmm = self._latest, self._vmm
        self._poll_at_s, self._grown = 0.0, 1.0
        if last is not None and event != "MIGRATION_PASS":
            now = replace(vmm.sample_now(), at_s=now_s())
            sample = replace(last, at_s=now.at_s)
            if event == "MIGRATION":
                sample = replace(sample, qemu_status=now.qemu_status)
            elif event == "STOP":
                sample = replace(sample, run_state=RunState.UNKNOWN, stopped_at_s=now.stopped_at_s)
            else:
                sample = replace(sample, run_state=RunState.RUNNING, resumed_at_s=now.resumed_at_s)
            self._publish(sample)
        self.wake()

    def _publish(self, sample: TransferSample) -> None:
        self._latest = sample
        self._queue.append(sample)

    async def newer(self, *, within_s: float) -> TransferSample | None:
        deadline_s = now_s() + within_s
        while not self._queue:
            if self._vmm.is_dead:
                raise VmmDied(f"QEMU of {self._vmm.vm} is dead (pid {self._vmm.pid})")
            if now_s() >= self._poll_at_s and self._vmm.is_reachable:
                await asyncio.sleep(LATENCY_S)
                if not self._vmm.qemu.is_blocked and not self._vmm.is_dead:
                    sample = self._vmm.sample_now()
                    self._grow(sample)
                    self._poll_at_s = now_s() + self._pace_s * self._grown
                    self._publish(sample)
                    continue
                self._grown = min(self._grown * POLLS_GROW, LONGEST)
                self._poll_at_s = now_s() + PACE_S * self._grown
            elif now_s() >= self._poll_at_s:
                self._poll_at_s = now_s() + LOST_PACE_S
            left_s = deadline_s - now_s()
            if left_s <= 0:
                return None
            await self._wait(min(left_s, max(self._poll_at_s - now_s(), LATENCY_S)))
        return self._queue.popleft()

    def _grow(self, sample: TransferSample) -> None:
        last = self._latest
        is_news = last is None or replace(last, at_s=sample.at_s) != sample
        self._grown = 1.0 if is_news else min(self._grown * POLLS_GROW, LONGEST)

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        self._woken.clear()

    @property
    def _pace_s(self) -> float:
        status = self._vmm.qemu.status
        if status in _SHORT_LIVED:
            return NEAR_END_PACE_S
        return 5 * PACE_S if status in IDLE else PACE_S


def _quietly(effect: Callable[[], object]) -> Callable[[], None]:
    """Nobody hears what a late command comes to."""

    def late() -> None:
        with contextlib.suppress(VmmRefused):
            effect()

    return late
