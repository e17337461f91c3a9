"""What passthrough hardware this host has, kept fresh: fulfils engine.device_ports.DeviceInventory.

    uevents ──> Pending ──┐ one at a time, in a thread
                          ├──> scan_again (named devices) ──┐
    a period, overflow ───┴──> scan_host  (everything) ─────┼──> assemble ──> current, watchers
    probes ──> ProbedFacts ─────────────────────────────────┘

Rules
1. The full scan is the truth; uevents only make it come sooner, for one device. They may be lost.
2. Only one scan runs at a time. What happens meanwhile is gathered: addresses in a set of bounded
   size, and past its bound the next scan is a full one. After a scan that uevents brought
   about it rests for as long as that took, so that a storm of them costs half of a thread at most.
3. Whoever asks for a rescan gets one that began after the question, possibly with others.
4. `current` is replaced as a whole, on the event loop, and only if something has changed; then its
   generation has grown by one. Snapshots are equal or newer, never mixed.
5. Nothing blocks the event loop: sysfs is read, and snapshots are compared, in a thread.
6. When a scan fails for want of descriptors or memory, that says nothing about the host: the last
   snapshot stays, with a line in `trouble`.
7. What a probe has said while a scan ran is in the result too: it is assembled again.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from migrd.core.devices import Device, Inventory
from migrd.engine.threads import in_thread
from migrd.kernel.host_kernel import NOT_READ
from migrd.kernel.host_scan import HostScan, scan_again, scan_host
from migrd.kernel.probed import Answers, ProbedFacts, assemble, concerned
from migrd.kernel.sysfs import Roots
from migrd.kernel.uevents import Listen, Listening, Uevent, concern, listen_to_kernel

RESCAN_EVERY_S: Final = 60.0
MAX_PENDING: Final = 256
"""Devices waiting to be read again; past it everything is read."""
MAX_REST_S: Final = 1.0
SLOW_S: Final = 30.0

log = structlog.get_logger(__name__)


@dataclass
class Pending:
    """What has happened since the last scan began. A uevents.Listener."""

    addresses: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)
    """Those whose bind has ended."""
    everything: bool = False
    failure: OSError | None = None
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    def event(self, event: Uevent) -> None:
        about = concern(event)
        if about is None:
            return
        if about.address is None or len(self.addresses) >= MAX_PENDING:
            self.everything = True
        else:
            self.addresses.add(about.address)
            if about.has_ended:
                self.ended.add(about.address)
        self.wake.set()

    def lost(self) -> None:
        self.everything = True
        self.wake.set()

    def broken(self, error: OSError) -> None:
        self.failure = error
        self.lost()

    def take(self) -> "Pending":
        """All of it; nothing is pending then."""
        taken = Pending(self.addresses, self.ended, self.everything, self.failure)
        self.addresses, self.ended, self.everything, self.failure = set(), set(), False, None
        self.wake.clear()
        return taken


class HostInventory:
    """The inventory of one host. Use from one event loop."""

    def __init__(
        self,
        roots: Roots = Roots(),  # noqa: B008 - frozen, and the same for all
        *,
        listen: Listen = listen_to_kernel,
        rescan_every_s: float = RESCAN_EVERY_S,
    ) -> None:
        self._roots = roots
        self._listen = listen
        self._rescan_every_s = rescan_every_s
        self._scan = HostScan()
        self._current = Inventory(NOT_READ, {}, {}, trouble=self._scan.trouble)
        self._probed = ProbedFacts()
        self._probes_noted = 0
        self._watchers: list[Callable[[Inventory], None]] = []
        self._scanning = asyncio.Lock()
        self._scans_begun = 0
        self._scan_ended = 0
        """Number of the last full scan that came to its end."""
        self._deaf = ""
        self._short = ""

    @property
    def current(self) -> Inventory:
        """The last snapshot; of generation 0 before the first scan."""
        return self._current

    @property
    def estimates_wrong(self) -> int:
        """IOMMU instances whose registers had promised something else than a bind found."""
        return self._probed.estimates_wrong

    async def rescan(self) -> Inventory:
        """Read everything anew, or share a scan that began after this call."""
        asked = self._scans_begun
        async with self._scanning:
            if self._scan_ended <= asked:
                self._scans_begun += 1
                await self._look(None)
                self._scan_ended = self._scans_begun
        return self._current

    async def watch(self, changed: Callable[[Inventory], None]) -> None:
        """Keep `current` fresh until cancelled; `changed` gets each new generation."""
        pending = Pending()
        listening = self._listen_to(pending)
        self._watchers.append(changed)
        try:
            await self._follow(pending)
        finally:
            self._watchers.remove(changed)
            if listening is not None:
                listening.close()

    def note_probed(self, device: Device) -> Inventory:
        """Put what the kernel answered about a device into the snapshot.

        Ignored if the device has gone or has another driver by now.
        """
        if not self._probed.note(device, self._scan):
            return self._current
        self._probes_noted += 1
        answers = self._probed.answers()
        changed = {device.address}
        name = self._scan.devices[device.address].iommu
        instance = self._current.iommus.get(name or "")
        if instance is not None and instance.dirty_tracking != answers.iommus.get(instance.name):
            changed.update(self._scan.index.below[instance.name])
        new = self._assembled(self._scan, answers, self._current, changed, self._own_trouble())
        if new is not None:
            self._publish(new)
        return self._current

    async def _follow(self, pending: Pending) -> None:
        due_s = time.monotonic()
        while True:
            try:
                async with asyncio.timeout(max(0.0, due_s - time.monotonic())):
                    await pending.wake.wait()
            except TimeoutError:
                pass
            began_s = time.monotonic()
            is_due = began_s >= due_s
            taken = pending.take()
            self._forget(taken)
            if taken.everything or is_due:
                await self.rescan()
                due_s = time.monotonic() + self._rescan_every_s
            else:
                async with self._scanning:
                    await self._look(frozenset(taken.addresses))
            if not is_due:
                await asyncio.sleep(min(MAX_REST_S, time.monotonic() - began_s))

    def _forget(self, taken: Pending) -> None:
        if taken.ended:
            self._probed.forget(taken.ended)
            self._probes_noted += 1
        if taken.failure is not None:
            self._tell_deaf(taken.failure)

    async def _look(self, addresses: frozenset[str] | None) -> None:
        """Read these devices, or everything, and publish. Only with the lock held."""
        slow = asyncio.get_running_loop().call_later(SLOW_S, self._tell_slow)
        before = self._scan
        try:
            if addresses is None:
                scan = await in_thread(scan_host, self._roots)
            else:
                scan = await in_thread(scan_again, self._roots, before, addresses)
        except OSError as error:
            self._tell_short(error)
            return
        finally:
            slow.cancel()
        self._short = ""
        self._probed.keep_to(scan)
        about = None if addresses is None else await in_thread(concerned, addresses, before, scan)
        while True:
            noted, previous, answers = self._probes_noted, self._current, self._probed.answers()
            new = await in_thread(
                self._assembled, scan, answers, previous, about, self._own_trouble()
            )
            if noted == self._probes_noted:
                break  # else a probe has ended meanwhile, and `previous` is not the last any more
        self._scan = scan
        if new is not None:
            self._publish(new)

    @staticmethod
    def _assembled(
        scan: HostScan,
        answers: Answers,
        previous: Inventory,
        about: set[str] | None,
        trouble: tuple[str, ...],
    ) -> Inventory | None:
        """The new inventory; None if it is as the previous one."""
        if about is None:
            new = assemble(scan, answers, trouble=trouble)
        else:
            new = assemble(scan, answers, previous=previous, changed=about, trouble=trouble)
        is_same = new == replace(previous, generation=new.generation)
        return None if is_same else new

    def _publish(self, new: Inventory) -> None:
        self._current = replace(new, generation=self._current.generation + 1)
        for changed in list(self._watchers):
            changed(self._current)

    def _own_trouble(self) -> tuple[str, ...]:
        return tuple(line for line in (self._deaf, self._short) if line)

    def _listen_to(self, pending: Pending) -> Listening | None:
        try:
            listening = self._listen(pending)
        except OSError as error:
            self._tell_deaf(error)
            return None
        self._deaf = ""
        return listening

    def _tell_deaf(self, error: OSError) -> None:
        self._deaf = (
            f"no uevents ({error.strerror or error}): changes are seen by the rescan every "
            f"{self._rescan_every_s:g} s only"
        )
        log.warning("cannot receive uevents", cause=str(error), rescan_s=self._rescan_every_s)

    def _tell_short(self, error: OSError) -> None:
        line = f"sysfs could not be read again: {error.strerror}"
        if line != self._short:
            self._short = line
            log.warning("sysfs could not be read again; the last inventory stays", cause=str(error))
            self._publish(
                replace(self._current, trouble=(*self._scan.trouble, *self._own_trouble()))
            )

    @staticmethod
    def _tell_slow() -> None:
        log.warning("reading sysfs takes long: a driver may hold a lock", waited_s=SLOW_S)
