"""A process that handed its guest over, as the engine's Vmm: it stands where QEMU stands.

    verbs of the guest   pause, resume, quit, throttle: asks of the hand-over
    a transfer away      Departure: our own task, told of in QEMU's words
    a guest that comes   Arrival: a listening Receiver, told of in the same words

What the engine asks of a VMM and this one answers for itself: who would ask QEMU whether it sends
or receives asks this object, since the daemon moves the memory. So a daemon that was restarted has
no transfer any more, and what it finds says how that ended (`_found`):

    running    NONE        nothing goes on: the engine begins again, where it was in precopy
    paused     FAILED      the guest stood still for a switchover that nobody finishes now
    departed   COMPLETED   it was given away, and never runs again but by RESUME
    incoming   FAILED      half of it is here; a process takes one guest in its life
    loaded     COMPLETED   all of it is here, and waits

What it offers, in the engine's terms: the destination acknowledges (RETURN_PATH), statuses are
told at once (EVENTS), the guest is paused before the switchover and nothing goes on without a word
(PAUSE_BEFORE_SWITCHOVER), the transfer can be cut at any moment (YANK, OOB), several connections
(MULTIFD), TLS with the name of the other host (TLS, TLS_AUTHZ). AUTO_CONVERGE where the process
can slow its guest. No postcopy.
"""

import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Final, NoReturn

from migrd.core.facts import (
    Feature,
    PassthroughFacts,
    QemuStatus,
    RunState,
    TransferAddress,
    TransferSample,
    TransferSettings,
    VmFacts,
)
from migrd.core.rate_reading import MeasuredRate, RateMode, RateOffer
from migrd.core.vfio_launch import VfioLaunchDevice
from migrd.direct.all_devices import run_devices
from migrd.direct.arrival import Arrival
from migrd.direct.departure import Departure
from migrd.direct.feed import DirectFeed, Feeds
from migrd.direct.figures import Limits, Road
from migrd.direct.guest import About, Guest
from migrd.direct.handoff import HandedOver
from migrd.direct.messages import ClientState
from migrd.direct.parts import KernelParts
from migrd.direct.preparation import blocked_reasons, refuse_unfit, stream_context
from migrd.direct.stream_limits import StreamLimits
from migrd.direct.stream_tls import destination_context, source_context
from migrd.engine.ports import PluggedFds, PortRange, TlsIdentity
from migrd.errors import VmmError, VmmRefused, VmmTimedOut
from migrd.processes.process import WatchedProcess

ENGINE_VERSION: Final = 1
QUIT_GRACE_S: Final = 3.0
KILL_GRACE_S: Final = 5.0
OFFERED: Final = frozenset(
    {
        Feature.RETURN_PATH,
        Feature.EVENTS,
        Feature.PAUSE_BEFORE_SWITCHOVER,
        Feature.MULTIFD,
        Feature.AVAIL_SWITCHOVER_BANDWIDTH,
        Feature.TLS,
        Feature.TLS_AUTHZ,
        Feature.YANK,
        Feature.OOB,
    }
)
RESTARTED: Final = {
    ClientState.PAUSED: "migrd was restarted while the guest stood still",
    ClientState.INCOMING: "migrd was restarted while it received the guest",
}


@dataclass(frozen=True)
class DirectOptions:
    """What all processes of this host have in common."""

    channels: int = 2
    """Connections of a transfer, where the request does not say."""
    largest_guest_bytes: int = 24 << 40
    stream: StreamLimits = field(default_factory=StreamLimits)


def version_text(kind: str | None) -> str:
    """For people."""
    return f"direct {ENGINE_VERSION}" + (f" ({kind})" if kind else "")


class DirectVmm:
    """Fulfils `migrd.engine.ports.Vmm`. Owns the transfers; `close` ends them."""

    def __init__(
        self,
        about: About,
        process: WatchedProcess,
        parts: KernelParts,
        options: DirectOptions,
    ) -> None:
        self.guest = Guest(about, process)
        self._process = process
        self._parts = parts
        self._options = options
        self._departure: Departure | None = None
        self._arrival: Arrival | None = None
        self._settings: TransferSettings | None = None
        self._tls: TlsIdentity | None = None
        self._was_launched_here = False
        self._is_paused_here = False
        self._feeds = Feeds(self._look)
        process.call_when_dead(self._on_death)

    # Life

    def attach(self, client: HandedOver) -> None:
        """It has handed over, anew or for the first time."""
        self.guest.attach(client)
        self._feeds.tell()

    def note_launched_here(self) -> None:
        """By this daemon: what it is found as says nothing of an earlier one's transfers."""
        self._was_launched_here = True

    async def close(self) -> None:
        """End the transfers; a guest that stands still for one is resumed. The process goes on."""
        if self._departure is not None:
            await self._departure.leave_off()
        if self._arrival is not None:
            await self._arrival.close()

    @property
    def vm(self) -> str:
        return self.guest.about.vm

    @property
    def instance(self) -> str:
        return self.guest.about.instance

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def is_dead(self) -> bool:
        return self._process.is_dead

    @property
    def is_reachable(self) -> bool:
        return self.guest.is_connected

    def _on_death(self) -> None:
        if self._departure is not None:
            self._departure.note_death()
        if self._arrival is not None:
            self._arrival.part("the process that was to take the guest has died")
        self._feeds.end(self.guest.death())

    # Facts

    async def facts(self) -> VmFacts:
        client = await self.guest.asked()
        await client.ask_state()
        offer = client.offer if client.has_offered else None
        memory = self._arrival.memory if offer is None and self._arrival is not None else None
        memory = memory if offer is None else offer.memory
        ids = () if offer is None else tuple(device.id for device in offer.devices)
        features = OFFERED | ({Feature.AUTO_CONVERGE} if "throttle" in client.features else set())
        return VmFacts(
            vm=self.vm,
            run_state=self.guest.run_state,
            qemu_status=self._look().qemu_status,
            qemu_version=version_text(self.guest.about.kind),
            machine_type=self.guest.about.kind,
            memory_bytes=self.guest.about.memory_limit_bytes if memory is None else memory.bytes,
            features=frozenset(features),
            passthrough_devices=ids,
            watches_dma=True,
            devices=tuple(PassthroughFacts(id_) for id_ in ids),
            blocked_reasons=tuple(blocked_reasons(client)),
            pid=self.pid,
        )

    async def run_state(self) -> RunState:
        await self._ask_state()
        return self.guest.run_state

    async def _ask_state(self) -> None:
        client = await self.guest.connected()
        if not self.guest.is_offering:  # else it has just said that it runs
            await client.ask_state()

    async def sample(self) -> TransferSample:
        if self.is_dead:
            raise self.guest.death()
        if self._departure is None and self._arrival is None:
            await self.guest.connected()
        return self._look()

    def _look(self) -> TransferSample:
        run_state = self.guest.run_state
        if self._departure is not None:
            return self._departure.sample(run_state)
        if self._arrival is not None:
            return self._arrival.sample(run_state)
        status, error = self._found()
        return TransferSample(time.monotonic(), status, run_state, error=error)

    def _found(self) -> tuple[QemuStatus, str | None]:
        """What the process says of a transfer that another daemon, or nobody, had to do with."""
        state = self.guest.state
        if state is None:
            return QemuStatus.UNKNOWN, None
        if state in (ClientState.DEPARTED, ClientState.LOADED):
            return QemuStatus.COMPLETED, None
        if self._was_launched_here or self._is_paused_here or state not in RESTARTED:
            return QemuStatus.NONE, None
        return QemuStatus.FAILED, RESTARTED[state]

    @contextlib.asynccontextmanager
    async def feed(self) -> AsyncIterator[DirectFeed]:
        async with self._feeds.open() as feed:
            if self.is_dead:
                feed.end(self.guest.death())
            yield feed

    # A migration away

    async def prepare_outgoing(self, settings: TransferSettings, tls: TlsIdentity | None) -> None:
        refuse_unfit(settings, tls)
        self._settings, self._tls = settings, tls

    async def start_outgoing(self, address: TransferAddress) -> None:
        settings = self._settings
        if settings is None:
            raise VmmRefused("no migration was prepared")
        if self._departure is not None and not self._departure.has_ended:
            raise VmmRefused("a transfer is going on already")
        client = await self.guest.asked()
        if client.state not in (ClientState.RUNNING, ClientState.PAUSED):
            raise VmmRefused(f"the process is {client.state.name.lower()}: nothing to move")
        tls = await stream_context(source_context, settings, self._tls)
        channels = settings.multifd_channels or self._options.channels
        road = Road(address, settings, tls, channels, self._options.stream)
        self._arrival = None
        self._departure = Departure(self.guest, road, self._parts, self._feeds.tell)
        self._departure.start()
        self._feeds.tell()

    async def clean_outgoing(self) -> None:
        self._settings = self._tls = None
        if "throttle" in (await self.guest.connected()).features:  # by an earlier daemon, maybe
            await self.set_throttle(0)

    async def set_limits(
        self,
        *,
        max_bandwidth_bytes_per_s: int | None = None,
        downtime_limit_s: float | None = None,
        switchover_bandwidth_bytes_per_s: int | None = None,
    ) -> None:
        departure = self._departure
        if departure is None or departure.has_ended:
            return
        now = departure.limits
        bandwidth, downtime_s = max_bandwidth_bytes_per_s, downtime_limit_s
        departure.change_limits(
            Limits(
                now.downtime_s if downtime_s is None else downtime_s,
                now.bandwidth_bytes_per_s if bandwidth is None else bandwidth,
                switchover_bandwidth_bytes_per_s,
            )
        )

    async def set_throttle(self, percent: int) -> None:
        client = await self.guest.asked()
        await client.throttle(percent)
        if self._departure is not None:
            self._departure.throttled(percent)

    async def start_postcopy(self) -> None:
        self._refuse_postcopy()

    async def continue_switchover(self) -> None:
        if self._departure is None:
            raise VmmRefused("no transfer is going on")
        self._departure.continue_switchover()

    async def cancel_transfer(self) -> None:
        if self._departure is not None:
            await self._departure.stop(QemuStatus.CANCELLED, None)

    async def free_stalled(self) -> None:
        if self._departure is not None:
            await self._departure.stop(QemuStatus.FAILED, "the connection was cut from here")

    async def pause_postcopy(self) -> None:
        self._refuse_postcopy()

    async def listen_for_recovery(
        self, listen_host: str, ports: PortRange | None = None
    ) -> TransferAddress:
        self._refuse_postcopy()

    async def resume_postcopy(self, address: TransferAddress) -> None:
        self._refuse_postcopy()

    def _refuse_postcopy(self) -> NoReturn:
        raise VmmRefused("the direct engine does no postcopy")

    # A guest that comes

    async def prepare_incoming(
        self,
        settings: TransferSettings,
        tls: TlsIdentity | None,
        listen_host: str,
        ports: PortRange | None = None,
    ) -> TransferAddress:
        refuse_unfit(settings, tls)
        if self._arrival is not None and self._arrival.address is not None:
            if self._arrival.is_listening:
                return self._arrival.address
            raise VmmRefused("the process has had its incoming guest")
        client = await self.guest.asked()
        if client.state is not ClientState.INCOMING or client.has_offered:
            raise VmmRefused(
                f"the process is {client.state.name.lower()}: only one that was launched to wait "
                "for an incoming guest takes one"
            )
        context = await stream_context(destination_context, settings, tls)
        limits = self._limits_of_arrival()
        arrival = Arrival(self.guest, settings, context, self._parts, limits, self._feeds.tell)
        address = await arrival.listen(listen_host, ports)
        self._arrival = arrival
        self._feeds.tell()
        return address

    def _limits_of_arrival(self) -> StreamLimits:
        limit = self.guest.about.memory_limit_bytes or self._options.largest_guest_bytes
        most = min(limit, self._options.largest_guest_bytes)
        return replace(self._options.stream, memory_bytes=most)

    # The guest and the process

    async def run_guest(self) -> None:
        client = await self.guest.asked()
        if self._arrival is not None and client.state is ClientState.LOADED:
            await self._arrival.run_devices()
        elif client.has_offered and client.devices:  # another daemon may have stopped them
            with client.held():
                await run_devices(client.devices, self._parts.open_device)
        await client.resume()
        if self._arrival is not None:
            self._arrival.part()
        self._is_paused_here = False
        self._feeds.tell()

    async def pause_guest(self) -> None:
        client = await self.guest.asked()
        await client.pause()
        self._is_paused_here = True
        self._feeds.tell()

    async def plug_device(self, device: VfioLaunchDevice, fds: PluggedFds) -> None:
        raise VmmRefused("a process of the direct engine brings its devices itself")

    async def unplug_device(self, id: str, *, within_s: float) -> None:
        raise VmmRefused("a process of the direct engine keeps its devices itself")

    async def rate_offer(self) -> RateOffer:
        """Nothing: writes are counted by protecting pages, which costs each page a fault."""
        return RateOffer()

    async def measure_rate(
        self, window_s: float, mode: RateMode, *, pages_per_gib: int
    ) -> MeasuredRate:
        raise VmmRefused("the direct engine measures no rates outside of migrations")

    async def quit(self) -> None:
        await self._end_transfers()
        if self.guest.is_connected:
            with contextlib.suppress(VmmError):
                client = await self.guest.asked()
                await client.quit(within_s=QUIT_GRACE_S)
                await self._process.wait_dead(within_s=QUIT_GRACE_S)
        if not self._process.is_dead:
            self._process.kill()
            if not await self._process.wait_dead(within_s=KILL_GRACE_S):
                raise VmmTimedOut(f"the process of {self.vm} was not seen to exit (pid {self.pid})")

    async def _end_transfers(self) -> None:
        if self._departure is not None:
            await self._departure.stop(QemuStatus.FAILED, "the process was ended", resumes=False)
        if self._arrival is not None:
            await self._arrival.close()
