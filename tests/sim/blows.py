"""Carries out what a schedule has in store, on a `Pair`."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Callable, Sequence

from migrd.core.migration import Policy, WhenNotConverging
from migrd.errors import MigrdError
from tests.fakes.gate import Fault
from tests.fakes.qemu_process import FakeQemu
from tests.fakes.road import Loss
from tests.fakes.virtual_time import now_s
from tests.fakes.vmm import FakeVmm
from tests.fakes.world import VM, Pair
from tests.sim.arbiter_blows import Arbiter
from tests.sim.schedule import Blow, Lost, Struck, Timed
from tests.sim.watching import Watch
from tests.sweep.sweeping import UNCOUNTED, strikes


def _nobody() -> None:
    """Wants to know."""


class Calls:
    """A daemon's plan over all its lives."""

    def __init__(self, blows: Sequence[Blow], host: str) -> None:
        self.note: Callable[[], None] = _nobody
        mine = [blow for blow in blows if isinstance(blow, Struck) and blow.host == host]
        self._blows = {blow.number: blow for blow in mine}
        self.is_armed = False
        self.away_s = 0.0
        """How long the daemon that was killed last stays down."""
        self.struck: list[str] = []
        self._seen = 0

    def __call__(self, call: str, _: int) -> Fault | None:
        if not self.is_armed or call in UNCOUNTED:
            return None
        self._seen += 1
        blow = self._blows.get(self._seen)
        if blow is None:
            return None
        ways = list(strikes(call))
        name, fault = ways[blow.choice % len(ways)]
        self.away_s = blow.away_s if fault.error is None else 0.0
        self.note()
        self.struck.append(f"{call}: {name}")
        return fault


class Messages:
    """What becomes of the messages between the daemons."""

    def __init__(self, blows: Sequence[Blow]) -> None:
        lost = [blow for blow in blows if isinstance(blow, Lost)]
        self._losses = {(blow.call, blow.number): blow.loss for blow in lost}
        self._seen = Counter[str | None]()
        self.note: Callable[[], None] = _nobody
        self.struck: list[str] = []

    def __call__(self, caller: str, callee: str, call: str) -> Loss | None:
        if call == "hello":
            return None
        self._seen.update((None, call))
        loss = self._losses.get((call, self._seen[call]))
        loss = loss or self._losses.get((None, self._seen[None]))
        if loss is not None:
            self.note()
            self.struck.append(f"{caller} > {callee} {call}: {loss.value}")
        return loss


class Trouble:
    """Everything that happens at a moment of time."""

    def __init__(self, pair: Pair, watch: Watch, arbiter: Arbiter | None = None) -> None:
        self._pair = pair
        self._watch = watch
        self.arbiter = arbiter
        self.died: list[str] = []
        """QEMUs that were killed while they held a whole copy of the guest, or what one lacked."""
        self.ended_itself = False
        self.struck: list[str] = []
        self.undo: list[Callable[[], None]] = []

    def arm_arbiter(self) -> None:
        """From here on its requests are struck, where there is one."""
        if self.arbiter is not None:
            self.arbiter.arm(self._pair)
            self.undo.append(self.arbiter.heal)

    @property
    def all_struck(self) -> list[str]:
        return [*self.struck, *([] if self.arbiter is None else self.arbiter.struck)]

    async def strike(self, blow: Timed) -> None:
        if blow.after is not None and not await self._watch.comes_to(blow.after):
            return
        await asyncio.sleep(blow.at_s)
        self._watch.struck()
        after = "" if blow.after is None else f" after {blow.after}"
        self.struck.append(
            f"{blow.at_s:.4f} s{after}: {blow.what} {blow.host} for {blow.for_s:g} s"
        )
        await getattr(self, f"_{blow.what}")(blow)

    async def _lasting(
        self, blow: Timed, begin: Callable[[], None], end: Callable[[], None]
    ) -> None:
        begin()
        self.undo.append(end)
        self._watch.lasting += 1
        try:
            await asyncio.sleep(blow.for_s)
        finally:
            self._watch.lasting -= 1
            self._watch.struck()
            end()

    async def _part(self, blow: Timed) -> None:
        road = self._pair.road
        ways = {("alpha", "beta"), ("beta", "alpha")}
        await self._lasting(blow, lambda: road.down.update(ways), road.down.clear)

    async def _part_one_way(self, blow: Timed) -> None:
        road, other = self._pair.road, "beta" if blow.host == "alpha" else "alpha"
        await self._lasting(blow, lambda: road.down.add((blow.host, other)), road.down.clear)

    async def _cut(self, blow: Timed) -> None:
        self._pair.ground.wire.cut()

    async def _freeze(self, blow: Timed) -> None:
        wire = self._pair.ground.wire
        await self._lasting(blow, wire.freeze, wire.heal)

    async def _swallow_ack(self, blow: Timed) -> None:
        wire = self._pair.ground.wire

        def swallow(on: bool) -> None:
            wire.swallows_ack = on

        await self._lasting(blow, lambda: swallow(True), lambda: swallow(False))

    async def _qemu_dies(self, blow: Timed) -> None:
        guest = self._pair.guest()
        for qemu in self._pair.hosts[blow.host].living(VM):
            is_missed = any(holder.missing_from is qemu for holder in guest.holders)
            if qemu.copy == guest.version or qemu.is_running or is_missed:
                self.died.append(qemu.name)
                self._watch.may_be_gone = True
                if self._is_given_up_elsewhere(blow.host):
                    guest.may_end = True
            qemu.die("killed by the schedule")

    def _is_given_up_elsewhere(self, host: str) -> bool:
        """Its daemon has given up the other copy while the one here was whole: it has asked for a
        refusal, or the arbiter to give the guest back, which may happen at any time from then on.
        """
        pair = self._pair
        asked = None if pair.arbiter is None else pair.arbiter.asked.get(host)
        is_back = asked is not None and json.loads(asked).get("owner") == host
        return bool(pair.road.under_way[host, "discard"]) or (
            is_back and self._watch.has_granted(host)
        )

    async def _qemu_hangs(self, blow: Timed) -> None:
        hung = self._pair.hosts[blow.host].living(VM)

        def end() -> None:
            for qemu in hung:
                _set_silent(qemu, False)

        def begin() -> None:
            for qemu in hung:
                _set_silent(qemu, True)

        await self._lasting(blow, begin, end)

    async def _monitor_lost(self, blow: Timed) -> None:
        daemon = self._pair.daemons.get(blow.host)
        if daemon is None:
            return
        try:
            handle = daemon.launcher.handle(VM)
        except (KeyError, AssertionError):
            return  # no QEMU, or none that this daemon has found yet

        def connect(on: bool) -> None:
            handle.is_connected = on

        await self._lasting(blow, lambda: connect(False), lambda: connect(True))

    async def _disk_full(self, blow: Timed) -> None:
        daemon = self._pair.daemons.get(blow.host)
        if daemon is None:
            return

        def fill(on: bool) -> None:
            daemon.journal.is_full = on

        await self._lasting(blow, lambda: fill(True), lambda: fill(False))

    async def _kill(self, blow: Timed) -> None:
        daemon = self._pair.daemons.get(blow.host)
        if daemon is not None:
            daemon.gate.crash()

    async def _crash_loop(self, blow: Timed) -> None:
        """It is killed again and again, soon after each start."""
        end_s, step_s = now_s() + min(blow.for_s, 3.0), 0.002
        while now_s() < end_s:
            await self._kill(blow)
            await asyncio.sleep(step_s)
            step_s *= 1.7

    async def _stopped(self, blow: Timed) -> None:
        """SIGSTOP, and SIGCONT when it is over."""
        daemon = self._pair.daemons.get(blow.host)
        if daemon is not None:
            await self._lasting(blow, daemon.gate.stop, daemon.gate.go_on)

    async def _half_open(self, blow: Timed) -> None:
        """Requests arrive; no answer comes back."""
        road, other = self._pair.road, "beta" if blow.host == "alpha" else "alpha"
        await self._lasting(blow, lambda: road.mute.add((blow.host, other)), road.mute.clear)

    async def _disk_slow(self, blow: Timed) -> None:
        daemon = self._pair.daemons.get(blow.host)
        if daemon is None:
            return

        def slow(on: bool) -> None:
            daemon.journal.is_slow = on

        await self._lasting(blow, lambda: slow(True), lambda: slow(False))

    async def _fsync_fails(self, blow: Timed) -> None:
        """The next record gets to the disk although its write failed; nothing more does, and the
        daemon dies before the disk is mended."""
        daemon = self._pair.daemons.get(blow.host)
        if daemon is None:
            return
        daemon.journal.fsync_fails = True
        self._watch.lasting += 1
        try:
            await asyncio.sleep(min(blow.for_s, 3.0))
        finally:
            self._watch.lasting -= 1
            daemon.gate.crash()

    async def _events_lost(self, blow: Timed) -> None:
        for handle in self._handles(blow.host):

            def deafen(on: bool, handle: FakeVmm = handle) -> None:
                handle.is_deaf = on

            await self._lasting(blow, lambda: deafen(True), lambda: deafen(False))

    async def _events_late(self, blow: Timed) -> None:
        for handle in self._handles(blow.host):

            def delay(by_s: float, handle: FakeVmm = handle) -> None:
                handle.event_delay_s = by_s

            await self._lasting(blow, lambda: delay(0.3), lambda: delay(0.0))

    def _handles(self, host: str) -> list[FakeVmm]:
        daemon = self._pair.daemons.get(host)
        if daemon is None:
            return []
        with contextlib.suppress(KeyError, AssertionError):
            return [daemon.launcher.handle(VM)]
        return []

    async def _clock_jumps(self, blow: Timed) -> None:
        """Somebody sets the host's wall clock, an hour back or forth."""
        self._pair.jumped_s[blow.host] += 3600.0 if blow.for_s < 1.0 else -3600.0

    async def _device_fails(self, blow: Timed) -> None:
        """A device of the source cannot be moved: it goes to ERROR and is reset."""
        for qemu in self._pair.hosts["alpha"].living(VM):
            if qemu.devices and qemu.is_migrating and not qemu.incoming:
                qemu.fail_device(next(iter(qemu.devices)))

    async def _policy(self, blow: Timed) -> None:
        """Somebody changes the policy on the way."""
        ways = list(WhenNotConverging)
        way = ways[int(blow.at_s * 1e6) % len(ways)]
        await self._ask("change_policy", Policy(when_not_converging=way, downtime_limit_s=0.2))

    async def _delete(self, blow: Timed) -> None:
        """Somebody wants the VM forgotten in the middle of it."""
        daemon = self._pair.daemons.get(blow.host)
        if daemon is None or daemon.gate.is_dead:
            return
        with contextlib.suppress(MigrdError, asyncio.CancelledError):
            await daemon.service.forget_vm(VM)

    async def _cancel(self, blow: Timed) -> None:
        await self._ask("cancel")

    async def _force_switchover(self, blow: Timed) -> None:
        self._watch.is_forced = True
        await self._ask("switch_over")

    async def _ask(self, verb: str, *args: object) -> None:
        daemon = self._pair.daemons.get("alpha")
        if daemon is None or daemon.gate.is_dead:
            return
        with contextlib.suppress(MigrdError, asyncio.CancelledError):
            for view in daemon.service.migrations()[1]:
                await getattr(daemon.service, verb)(view.id, *args, by="schedule")

    async def _ask_again(self, blow: Timed) -> None:
        """Somebody else wants the same VM moved, or its opposite, in the middle of it."""
        daemon = self._pair.daemons.get(blow.host)
        if daemon is None or daemon.gate.is_dead:
            return
        with contextlib.suppress(MigrdError, asyncio.CancelledError):
            await self._pair.ask(source=blow.host)

    async def _guest_shuts_down(self, blow: Timed) -> None:
        running = self._pair.guest().running_on
        if isinstance(running, FakeQemu):
            self.ended_itself = self._watch.may_be_gone = True
            self._pair.guest().may_end = True
            running.shut_down()


def _set_silent(qemu: FakeQemu, on: bool) -> None:
    qemu.is_silent = on
    if not on and not qemu.is_blocked:
        qemu.unblock()  # what was sent meanwhile takes effect
