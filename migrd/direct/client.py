"""Makes a process migratable by migrd: the client library for authors of VMMs in Python.

    class Machine(Vmm):                                  what only the author knows
        def save_state(self) -> bytes: ...
        def load_state(self, state: bytes) -> None: ...
        def memory_arrived(self, regions): ...           incoming: here is your memory

    client = DirectClient(Machine(), regions=[GuestRegion.create(id=0, gpa=0, length_bytes=...)])
    client.start()
    with client.gate.entered():                          in each thread that writes guest memory
        while True:
            client.gate.checkpoint()
            ...

A thread of the library connects to the daemon, for ever, hands over, and answers what migrd asks;
the methods of Vmm are called in it, one at a time. PAUSE closes the gate: it is answered when every
thread that entered stands at a checkpoint, and refused after 4 s, with the gate open again: before
the 5 s are over for which migrd waits. A process that is to be given a guest begins with the gate
closed, so its threads may be started at once.

What writes guest memory without a thread of yours (KVM's vCPUs, vhost, io_uring) is stopped in
`Vmm.pause`. A method that raises refuses the ask, and must leave everything as it was; the text of
its exception is shown to the operator. The rules that this keeps stand in messages.py.

Standard library alone, but for messages.py, client_link.py, gate.py and guest_memory.py beside it:
these five files can be copied into another project.
"""

import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from migrd.direct.client_link import ClientLink, LinkEnded, sealed
from migrd.direct.gate import Gate
from migrd.direct.guest_memory import GuestRegion, WriteTracking
from migrd.direct.messages import (
    MOST_RANGES,
    MOST_THROTTLE_PERCENT,
    PAGE_BYTES,
    Answer,
    Ask,
    BadMessage,
    ClientState,
    Departed,
    DeviceMessage,
    Event,
    EventKind,
    Features,
    GiveRegion,
    Hello,
    LoadState,
    OfferEnd,
    Pause,
    Quit,
    RangeMessage,
    RegionMessage,
    Resume,
    SaveState,
    SourceKind,
    SourceMessage,
    Status,
    Throttle,
    Welcome,
    printable,
)

__all__ = ["ClientState", "DeviceSource", "DirectClient", "Gate", "GuestRegion", "Vmm"]


class Refused(Exception):
    """What was asked is not possible now; nothing was changed."""


class Reply(NamedTuple):
    """What goes with an answer; the descriptor is closed once it is sent."""

    value: int = 0
    fd: int | None = None


_FIRST_BACKOFF_S: Final = 0.05
_LONGEST_BACKOFF_S: Final = 1.0
_DAEMON_S: Final = 30.0
"""For a daemon to take a hand-over, or to read what is sent."""
_PAUSE_S: Final = 4.0
"""For the threads to stop; less than migrd waits for the answer, so a guest that is too slow runs
again, and says why, before the daemon gives up."""
_RUNNING, _PAUSED = ClientState.RUNNING, ClientState.PAUSED
_INCOMING, _LOADED, _DEPARTED = ClientState.INCOMING, ClientState.LOADED, ClientState.DEPARTED


class Vmm:
    """What only the author of the VMM knows. Called in the library's thread."""

    def save_state(self) -> bytes:
        """All that the guest is, besides its memory. It is paused."""
        return b""

    def load_state(self, state: bytes) -> None:
        """Become that guest; do not run it. Its memory is there."""

    def memory_arrived(self, regions: Sequence[GuestRegion]) -> None:
        """All memory of the guest that has come, contents and all; it stands still meanwhile."""

    def pause(self) -> None:
        """Stop what the gate does not: on return nothing may write guest memory."""

    def resume(self) -> None:
        """Undo `pause`. After a load: the guest begins to run here."""

    def departed(self) -> None:
        """The guest runs elsewhere from now on. Let go of what it shares, not of its memory."""

    def throttle(self, percent: int) -> None:
        """Slow down what the gate does not, by this share of its time; 0: full speed."""

    def quit(self) -> None:
        """The process is to end."""
        os.kill(os.getpid(), signal.SIGTERM)

    def problem(self, text: str) -> None:
        """The daemon is not there, or refuses; told once per change. The guest goes on."""
        sys.stderr.write(f"migrd: {text}\n")


@dataclass(frozen=True)
class DeviceSource:
    """Who sees the DMA of a device: an iommufd page table, or the device's own log."""

    kind: SourceKind
    fd: int
    """Of /dev/iommu, or of the device. Stays the author's, and open."""
    ranges: tuple[RangeMessage, ...]
    """Addresses are IOVAs."""
    page_size_bytes: int = PAGE_BYTES
    hwpt_id: int = 0


class DirectClient:
    """One VM's connection to migrd. `vm` and `socket_path` come from the environment that migrd's
    launcher sets (MIGRD_VM, MIGRD_SOCKET) when they are not given; whether the process waits for a
    guest always does (MIGRD_INCOMING, MIGRD_INSTANCE)."""

    def __init__(
        self,
        vmm: Vmm,
        *,
        regions: Sequence[GuestRegion] = (),
        device_sources: Sequence[DeviceSource] = (),
        devices: Mapping[str, int] | None = None,
        throttles: bool = False,
        vm: str | None = None,
        socket_path: Path | None = None,
    ) -> None:
        """`devices`: VFIO devices whose state migrd moves, by name. `throttles`: every thread that
        writes guest memory passes the gate, or `Vmm.throttle` is there.

        Raises KeyError (nothing names the socket or the VM), OSError (writes cannot be tracked)."""
        is_incoming = os.environ.get("MIGRD_INCOMING", "") == "1"
        self.gate: Final = Gate(is_open=not is_incoming)
        self._vmm = vmm
        self._vm = os.environ["MIGRD_VM"] if vm is None else vm
        self._path = Path(os.environ["MIGRD_SOCKET"]) if socket_path is None else socket_path
        self._instance = os.environ.get("MIGRD_INSTANCE", "")
        self._features = Features.THROTTLE if throttles else Features(0)
        self._regions = list(regions)
        self._device_sources = tuple(device_sources)
        self._devices = dict(devices or {})
        self._tracking = WriteTracking()
        for region in self._regions:
            self._tracking.watch(region)
        self._state = _INCOMING if is_incoming else _RUNNING
        self._migration_id = ""
        self._has_memory = not is_incoming
        self._has_offered = False  # on this connection
        self._most_state_bytes = 0
        self._last_problem = ""
        self._farewell = ""
        self._stopping = threading.Event()
        self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="migrd", daemon=True)

    @property
    def state(self) -> ClientState:
        """Where the guest stands."""
        return self._state

    def start(self) -> None:
        """Connect, hand over and serve, in a thread of its own."""
        self._thread.start()

    def stop(self, why: str = "it ends") -> None:
        """End the library's thread, having told migrd. The guest is not touched. Idempotent."""
        self._farewell = why
        self._stopping.set()
        os.write(self._wake[1], b"x")
        if self._thread is not threading.current_thread() and self._thread.is_alive():
            self._thread.join()

    # ------------------------------------------------------------------------- the connection

    def _run(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while not self._stopping.is_set():
            self._has_offered = False
            try:
                with closing(ClientLink(self._path, self._wake[0])) as link:
                    self._hand_over(link)
                    backoff_s, self._last_problem = _FIRST_BACKOFF_S, ""
                    while self._serve(link):
                        pass
            except (LinkEnded, BadMessage, OSError) as failure:
                self._report(str(failure))
            self._stopping.wait(backoff_s)
            backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)

    def _report(self, text: str) -> None:
        if text != self._last_problem and not self._stopping.is_set():
            self._last_problem = text
            with suppress(Exception):
                self._vmm.problem(text)

    def _hand_over(self, link: ClientLink) -> None:
        names = self._vm, self._instance, self._migration_id
        features = self._features
        if self._state is _INCOMING and self._devices:
            features |= Features.DEVICES
        link.send(Hello(self._state, features, *names))
        if self._state is not _INCOMING:
            self._offer(link)
        elif self._devices:
            self._offer_devices(link)
            link.send(OfferEnd(0, 0, len(self._devices)))
        self._welcome(link)

    def _welcome(self, link: ClientLink) -> None:
        received = link.receive(within_s=_DAEMON_S)
        if received is None:
            raise LinkEnded("it is stopped")
        if not isinstance(received.message, Welcome):
            raise BadMessage(f"the daemon said {received.message.TYPE.name}, not WELCOME")
        self._most_state_bytes = received.message.most_state_bytes

    def _offer(self, link: ClientLink) -> None:
        for region in self._regions:
            place = region.gpa, region.length_bytes, region.offset_bytes, region.hva
            link.send(RegionMessage(region.id, *place), fd=region.fd)
        watched = [RangeMessage(r.id, 0, r.hva, r.length_bytes) for r in self._regions]
        pagemap = DeviceSource(SourceKind.PROCESS, self._tracking.pagemap_fd, tuple(watched))
        sources = 0
        for source in (pagemap, *self._device_sources):
            for first in range(0, len(source.ranges), MOST_RANGES):
                ranges = source.ranges[first : first + MOST_RANGES]
                head = source.kind, source.hwpt_id, source.page_size_bytes
                link.send(SourceMessage(*head, ranges), fd=source.fd)
                sources += 1
        self._offer_devices(link)
        link.send(OfferEnd(len(self._regions), sources, len(self._devices)))
        self._has_offered = True

    def _offer_devices(self, link: ClientLink) -> None:
        for name, fd in self._devices.items():
            link.send(DeviceMessage(name), fd=fd)

    def _serve(self, link: ClientLink) -> bool:
        """Take one message; False: the library was stopped."""
        received = link.receive(within_s=None)
        if received is None:
            link.send(Event(EventKind.GOING_AWAY, self._farewell))
            return False
        ask = received.message
        if not isinstance(ask, Ask):
            received.close_fd()
            raise BadMessage(f"the daemon said {ask.TYPE.name}, which is no question")
        status, text, reply = Status.DONE, "", Reply()
        try:
            reply = self._do(ask, received.take_fd()) or reply
        except Exception as failure:  # the author's, too: whatever it is, the ask is refused
            status, text = Status.REFUSED, _reason(failure)
        try:
            answer = Answer(status, self._state, reply.value, self._migration_id, text)
            link.send(answer, received.serial, fd=reply.fd)
        finally:
            if reply.fd is not None:
                os.close(reply.fd)
        if isinstance(ask, Quit):
            self._vmm.quit()
        if self._state is _RUNNING and not self._has_offered:
            self._offer(link)
            self._welcome(link)
        return True

    # --------------------------------------------------------------------------- what is asked

    def _do(self, ask: Ask, fd: int | None) -> Reply | None:
        """Raises whatever refuses it. `fd` is ours."""
        if isinstance(ask, GiveRegion) and fd is not None:
            self._give_region(ask, fd)
        elif isinstance(ask, LoadState) and fd is not None:
            self._load_state(ask, fd)
        elif isinstance(ask, Throttle):
            self._throttle(ask)
        elif isinstance(ask, Departed):
            self._departed(ask)
        elif isinstance(ask, Pause):
            self._pause()
        elif isinstance(ask, Resume):
            self._resume()
        elif isinstance(ask, SaveState):
            return self._save_state()
        return None

    def _expect(self, *states: ClientState) -> None:
        if self._state not in states:
            wanted = " or ".join(state.name.lower() for state in states)
            raise Refused(f"the guest is {self._state.name.lower()}, not {wanted}")

    def _pause(self) -> None:
        self._expect(_RUNNING, _PAUSED)
        if self._state is _PAUSED:
            return
        self.gate.close(within_s=_PAUSE_S)
        try:
            self._vmm.pause()
        except BaseException:
            self.gate.open()
            raise
        self._state = _PAUSED

    def _resume(self) -> None:
        self._expect(_RUNNING, _PAUSED, _LOADED, _DEPARTED)
        if self._state is _RUNNING:
            return
        self._vmm.resume()
        self._state, self._migration_id = _RUNNING, ""
        self.gate.open()

    def _save_state(self) -> Reply:
        self._expect(_PAUSED)
        state = self._vmm.save_state()
        if len(state) > self._most_state_bytes:
            raise Refused(f"the state has {len(state)} bytes, more than {self._most_state_bytes}")
        return Reply(len(state), sealed(state))

    def _give_region(self, ask: GiveRegion, fd: int) -> None:
        try:
            self._expect(_INCOMING)
            if ask.index != len(self._regions) or ask.index >= ask.total:
                raise Refused(f"region {ask.index} of {ask.total}, {len(self._regions)} are here")
            place = {"fd": fd, "offset_bytes": ask.offset_bytes, "length_bytes": ask.length_bytes}
            region = GuestRegion.map(id=ask.id, gpa=ask.gpa, **place)
        except BaseException:
            os.close(fd)
            raise
        self._tracking.watch(region)
        self._regions.append(region)
        if len(self._regions) == ask.total:
            self._vmm.memory_arrived(tuple(self._regions))
            self._has_memory = True

    def _load_state(self, ask: LoadState, fd: int) -> None:
        with open(fd, "rb") as passed:
            self._expect(_INCOMING)
            if not self._has_memory:
                raise Refused("the guest's memory is not here yet")
            passed.seek(0)  # its place in the file is shared with whoever wrote it
            state = passed.read()
        if len(state) != ask.length_bytes:
            raise Refused(f"the state has {len(state)} bytes, not {ask.length_bytes}")
        self._vmm.load_state(state)
        self._state = _LOADED

    def _departed(self, ask: Departed) -> None:
        self._expect(_PAUSED, _DEPARTED)
        if self._state is _DEPARTED:
            if ask.migration_id != self._migration_id:
                raise Refused(f"the guest departed in {self._migration_id} already")
            return
        self._state, self._migration_id = _DEPARTED, ask.migration_id
        try:
            self._vmm.departed()
        except Exception as failure:  # it has left all the same
            self._report(_reason(failure))

    def _throttle(self, ask: Throttle) -> None:
        if not self._features & Features.THROTTLE or ask.percent > MOST_THROTTLE_PERCENT:
            raise Refused(f"{ask.percent} %: throttling is not offered, or not by that much")
        self._vmm.throttle(ask.percent)
        self.gate.throttle(ask.percent)


def _reason(failure: Exception) -> str:
    return printable(str(failure)) or type(failure).__name__
