"""One QEMU process, as real ones were seen to behave; it outlives any daemon.

Rules (design measurements on QEMU 7.2 and 10.0):
- a destination (`-S -incoming defer`) runs by `cont` alone; a `cont` that comes too early, while
  it is `inmigrate`, makes it run as soon as the guest has arrived;
- it takes one incoming migration in its life;
- a source resumes by itself when its migration fails or is cancelled, whatever the daemon wishes;
- `cont` in `postmigrate` is accepted: nothing but the daemon's journal protects the guest;
- numbers vanish with `failed` and `cancelled`; events are told once, and never repeated;
- while a stalled stream is written in status `device`, no in-band command is answered, on any
  monitor. What was sent then takes effect later. `yank` is answered always;
- what a device writes that came with enable-migration=on, watched by nothing, is not sent again;
- passthrough devices come with the launch or are plugged, and go when the guest lets go of them;
  while a migration runs they stay. One whose state cannot be moved is reset, the migration fails
  and the guest runs on.

Longer than others because one process keeps all of these rules.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

from migrd.core.facts import (
    Feature,
    QemuStatus,
    RunState,
    TransferAddress,
    TransferSample,
    TransferSettings,
    VmSpec,
)
from migrd.core.vfio_launch import GivenBy, QemuVfioFeature, VfioLaunch, VfioLaunchDevice
from migrd.errors import VmmRefused
from tests.fakes.guest import Guest, Holder
from tests.fakes.meter import FakeMeter
from tests.fakes.transfer import Transfer
from tests.fakes.virtual_time import now_s
from tests.fakes.wire import MIB, FakeWire

PAGE_BYTES = 4096
_PIDS = itertools.count(4200)
_VANISH = frozenset({QemuStatus.NONE, QemuStatus.SETUP, QemuStatus.FAILED, QemuStatus.CANCELLED})


@dataclass
class Load:
    """What the guest does to its memory, and what its devices cost."""

    memory_bytes: int = 256 * MIB
    dirty_bytes_per_s: int = 64 * MIB
    working_set_bytes: int = 48 * MIB
    device_bytes: int = 1 * MIB
    device_s: float = 0.002


@dataclass
class Make:
    """What kind of QEMU this is."""

    version: str = "10.0.2"
    features: frozenset[Feature] = frozenset(Feature)
    stays_on_error: bool = True
    """`exit-on-error: false` is known: a failed destination stays and says why."""
    postcopy_status_first: bool = True
    """Status `postcopy-active` is told before the device state is sent (and may yet fail)."""
    passthrough_devices: tuple[str, ...] = ()
    """Ids of devices that every one of them has, however it was launched."""
    blocked_reasons: tuple[str, ...] = ()
    vfio_features: frozenset[QemuVfioFeature] = frozenset(QemuVfioFeature)
    refuses_plug: str | None = None
    """Its reason not to take a device."""
    forgets_addresses: bool = False
    """It was given descriptors, and nobody remembers of what."""
    guest_lets_go: bool | None = True
    """Of a device that is to be unplugged; False: it says no, None: it says nothing."""
    blocks_migration: frozenset[str] = frozenset()
    """Ids of devices that cannot migrate."""


@dataclass
class Numbers:
    """What query-migrate shows of the migration going on."""

    remaining_bytes: int = 0
    transferred_bytes: int = 0
    dirty_sync_count: int = 0
    dirty_pages_per_s: float | None = None
    bandwidth_bytes_per_s: float | None = None
    downtime_s: float | None = None
    error: str | None = None


@dataclass
class Limits:
    """Parameters that can be changed while it runs, and what was prepared."""

    downtime_limit_s: float = 0.3
    max_bandwidth_bytes_per_s: int = 128 * MIB
    switchover_bandwidth_bytes_per_s: int = 0
    settings: TransferSettings | None = None
    throttle_percent: int = 0


class FakeQemu:
    """The process. Daemons reach it through `fakes.vmm.FakeVmm` only."""

    is_silent = False
    """Its in-band monitor answers nothing (SIGSTOP, a blocked main loop)."""
    refuses_cont: str | None = None
    was_incoming_once = False
    last_words = ""
    ignores_quit = False
    """Not even SIGKILL ends it (it hangs in the kernel)."""
    is_dead = False
    autostart = False
    """`cont` was said while `inmigrate`."""
    port: int | None = None
    reset_devices: tuple[str, ...] = ()

    def __init__(
        self,
        host_name: str,
        spec: VmSpec,
        instance: str,
        guest: Guest,
        wire: FakeWire,
        *,
        incoming: bool,
        load: Load,
        make: Make,
        devices: VfioLaunch | None = None,
    ) -> None:
        self.host_name = host_name
        self.pid = next(_PIDS)
        self.name = f"{host_name}/{self.pid}"
        self.spec = spec
        self.instance = instance
        self.guest = guest
        self.wire = wire
        self.incoming = incoming
        self.load = load
        self.make = make
        self.status = QemuStatus.NONE
        self.run_state = RunState.INMIGRATE if incoming else RunState.PRELAUNCH
        self.copy: int | None = None if incoming else guest.version
        self.missing_from: Holder | None = None
        self.numbers = Numbers()
        self.limits = Limits()
        self.meter = FakeMeter()
        self.transfer: Transfer | None = None
        given = devices or VfioLaunch()
        self.devices = {device.id: device for device in given.devices}
        self.iommufds = list(given.iommufds)
        self.listeners: list[Callable[[str], None]] = []
        self.on_death: list[Callable[[], None]] = []
        self._answers = asyncio.Event()
        self._answers.set()
        self._waiting: list[Callable[[], object]] = []
        guest.holders.append(self)

    # Events -----------------------------------------------------------------------------------

    def tell(self, event: str) -> None:
        """MIGRATION, STOP, RESUME, MIGRATION_PASS."""
        for listener in list(self.listeners):
            listener(event)

    def set_status(self, status: QemuStatus) -> None:
        if not self.is_dead and status is not self.status:
            self.status = status
            self.tell("MIGRATION")

    # The guest --------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        return self.guest.running_on is self

    def run(self) -> None:
        """The vCPUs begin to run."""
        if self.is_running or self.is_dead:
            return
        self.run_state = RunState.RUNNING
        self.guest.started(self, now_s())
        self.tell("RESUME")

    def stop(self, run_state: RunState) -> None:
        """The vCPUs stop, if they run."""
        was = self.is_running
        self.guest.stopped(self, now_s())
        self.run_state = run_state
        if was:
            self.tell("STOP")

    def shut_down(self) -> None:
        """The guest ends itself (`-no-shutdown`: the process stays)."""
        self.stop(RunState.SHUTDOWN)

    def cont(self) -> None:
        """QMP `cont`. Raises VmmRefused."""
        if self.refuses_cont is not None:
            raise VmmRefused(self.refuses_cont)
        if self.run_state is RunState.INMIGRATE:
            self.autostart = True
        elif self.run_state is RunState.FINISH_MIGRATE:
            raise VmmRefused("Migration is not finalized yet")
        elif self.run_state in (RunState.SHUTDOWN, RunState.INTERNAL_ERROR):
            raise VmmRefused("Resetting the Virtual Machine is required")
        else:
            self.run()

    def arrive(self, version: int, missing_from: Holder | None) -> None:
        """The guest's device state has been loaded (with all memory, unless postcopy)."""
        self.copy, self.missing_from = version, missing_from
        self.run_state = RunState.PAUSED
        if self.autostart:
            self.run()

    def die(self, words: str = "") -> None:
        """The process ends, for whatever reason."""
        if self.is_dead:
            return
        self.guest.stopped(self, now_s())
        self.is_dead = True
        self.last_words = words
        self.unblock()
        if self.transfer is not None:
            self.transfer.end_died(self)
        for told in list(self.on_death):
            told()

    # Passthrough devices ----------------------------------------------------------------------

    @property
    def device_ids(self) -> tuple[str, ...]:
        return (*self.make.passthrough_devices, *self.devices)

    @property
    def blocked_reasons(self) -> tuple[str, ...]:
        own = [
            f"{id_}: VFIO migration is not supported in kernel"
            for id_ in self.device_ids
            if id_ in self.make.blocks_migration
        ]
        return (*self.make.blocked_reasons, *own)

    def plug(self, device: VfioLaunchDevice, *, new_iommufd: bool) -> None:
        """QMP `device_add`, with the object before it. Raises VmmRefused."""
        if device.id in self.device_ids:
            return
        if self.is_migrating:
            raise VmmRefused("device_add not allowed while migrating", code="plug_refused")
        needed = {QemuVfioFeature.IOMMUFD} if device.iommufd is not None else set()
        needed |= {QemuVfioFeature.DEVICE_FD} if device.given_by is GivenBy.FD else set()
        if needed - self.make.vfio_features:
            text = "this QEMU does not offer what the device needs"
            raise VmmRefused(text, code="passthrough_unsupported")
        is_there = device.iommufd is None or device.iommufd in self.iommufds
        if self.make.refuses_plug is not None or is_there == new_iommufd:
            text = self.make.refuses_plug or f"iommufd object {device.iommufd}"
            raise VmmRefused(text, code="plug_refused")
        self.devices[device.id] = device
        if new_iommufd and device.iommufd is not None:
            self.iommufds.append(device.iommufd)

    def ask_to_unplug(self, id_: str) -> None:
        """QMP `device_del`; the guest lets go at once, or not. Raises VmmRefused."""
        if id_ not in self.devices:
            return
        if self.is_migrating:
            raise VmmRefused("device_del not allowed while migrating", code="unplug_refused")
        if self.make.guest_lets_go is False:
            text = f"the guest does not let go of {id_}"
            raise VmmRefused(text, code="unplug_refused_by_guest")
        if self.make.guest_lets_go:
            self.let_go(id_)

    def let_go(self, id_: str) -> None:
        """The guest lets go of a device."""
        gone = self.devices.pop(id_)
        if gone.iommufd not in {device.iommufd for device in self.devices.values()}:
            self.iommufds = [iommufd for iommufd in self.iommufds if iommufd != gone.iommufd]

    def fail_device(self, id_: str) -> None:
        """Its state cannot be moved for the switchover: it is reset, and the guest runs on."""
        assert self.transfer is not None
        self.reset_devices = (*self.reset_devices, id_)
        self.transfer.break_(
            f"{id_}: Failed setting device state to STOP_COPY. Recover state is ERROR. "
            "Resetting device: Input/output error"
        )

    @property
    def device_states(self) -> tuple[tuple[str, str], ...]:
        """As the events of real devices with pre-copy and P2P told them."""
        if self.incoming and self.copy is None:
            word = "resuming" if self.transfer is not None else ""
        elif self.status is QemuStatus.ACTIVE and self.is_running:
            word = "pre-copy"
        elif self.status in (QemuStatus.PRE_SWITCHOVER, QemuStatus.DEVICE):
            word = "stop-copy"
        else:
            word = "running" if self.is_running else "stop"
        return tuple((id_, word) for id_ in sorted(self.device_ids) if word)

    # Migration --------------------------------------------------------------------------------

    @property
    def is_migrating(self) -> bool:
        return self.transfer is not None and not self.transfer.is_over

    def start_outgoing(self, address: TransferAddress) -> None:
        """QMP `migrate`: accepted even when nobody listens. Raises VmmRefused."""
        if self.transfer is not None and not self.transfer.is_over:
            raise VmmRefused("There's a migration process in progress")
        if self.blocked_reasons:
            raise VmmRefused(f"State blocked by {self.blocked_reasons[0]}")
        if self.run_state is RunState.INMIGRATE:
            raise VmmRefused("Guest is waiting for an incoming migration")
        unwatched = [
            id_
            for id_, device in self.devices.items()
            if device.properties.get("enable-migration") == "on"
        ]
        if self.is_running and unwatched:
            self.guest.violate(f"P5: what {unwatched} write from now on is not sent again")
        self.numbers = Numbers()
        self.transfer = Transfer(self, address.port)
        self.transfer.start()

    def start_incoming(self) -> int:
        """QMP `migrate-incoming`. Raises VmmRefused the second time."""
        if not self.incoming:
            raise VmmRefused("'-incoming' was not specified on the command line")
        if self.was_incoming_once:
            raise VmmRefused("The incoming migration has already been started")
        self.was_incoming_once = True
        self.port = self.wire.listen(self)
        self.set_status(QemuStatus.SETUP)
        return self.port

    def stream_ended(self, reason: str) -> None:
        """The connection was closed; bad news unless the guest is here already."""
        if self.is_dead or self.copy is not None:
            return
        if self.make.stays_on_error:
            self.numbers.error = reason
            self.set_status(QemuStatus.FAILED)
        else:
            self.die(f"qemu-system-x86_64: load of migration failed: {reason}")

    def yank(self) -> None:
        """Out of band: cut this process' migration connection. Raises VmmRefused."""
        if self.transfer is None or self.transfer.is_over:
            raise VmmRefused("Instance not found")
        self.transfer.break_("Channel error: Input/output error")

    # The monitor --------------------------------------------------------------------------------

    def block(self) -> None:
        """The main loop waits for the stream: no in-band command is answered."""
        self._answers.clear()

    def unblock(self) -> None:
        """Answers again; what was sent meanwhile takes effect now."""
        self._answers.set()
        waiting, self._waiting = self._waiting, []
        for effect in waiting:
            if not self.is_dead:
                effect()

    @property
    def is_blocked(self) -> bool:
        return self.is_silent or not self._answers.is_set()

    async def answered(self) -> None:
        """Return once in-band commands are answered."""
        while self.is_blocked:
            if self.is_silent:
                await asyncio.sleep(0.05)
            else:
                await self._answers.wait()

    def take_later(self, effect: Callable[[], object]) -> None:
        """A command whose sender has stopped waiting: it takes effect when unblocked."""
        if self.is_blocked:
            self._waiting.append(effect)
        elif not self.is_dead:  # it has just been
            effect()

    def sample(self) -> TransferSample:
        """query-migrate and query-status."""
        was_reset = self.status is QemuStatus.FAILED
        bare = TransferSample(
            now_s(),
            self.status,
            self.run_state,
            error=self.numbers.error,
            device_states=self.device_states,
            reset_devices=self.reset_devices if was_reset else (),
        )
        if self.status in _VANISH or (self.incoming and self.copy is None):
            return bare
        numbers, limits = self.numbers, self.limits
        return replace(
            bare,
            total_bytes=self.load.memory_bytes,
            remaining_bytes=numbers.remaining_bytes,
            transferred_bytes=numbers.transferred_bytes,
            dirty_pages_per_s=numbers.dirty_pages_per_s,
            page_size_bytes=PAGE_BYTES,
            qemu_dirty_sync_count=numbers.dirty_sync_count,
            bandwidth_bytes_per_s=numbers.bandwidth_bytes_per_s,
            downtime_s=numbers.downtime_s,
            throttle_percent=limits.throttle_percent or None,
        )
