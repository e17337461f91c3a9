"""What must be true after every step of a run, and what says so when it is not.

    I1   fakes.guest.Guest.started: the vCPUs run nowhere else          at each start of a guest
    I2   Guest.check_kept, and here: a whole copy exists unless what had it was killed (a source
         that has the other copy given up, by message or by record, has it alone from then on)
                                                     at each end of a QEMU, each record, each look
    I3   here: a terminal phase is the last one; run._check: it is the ground truth
    I4   Guest.started: nobody runs a copy that is older than the guest
    I5   here: each migration that is asked for has a higher epoch than all before it on that disk;
         what a disk knows of a VM never goes back                                at each record
    I6   not here: no page is copied in these runs (tests.core, tests.engine harvest; P5 of FakeQemu
         says when devices would write unwatched)
    I7   here: each record moves its migration along the table, as it was when this was imported;
         each look: generations, versions and timelines only grow
    I8   here: no answer is ahead of the journal, or behind what has been acknowledged; who says
         where the guest runs is right                                 at random moments (`looks`)
    I9   world.check_truth: devices; run._check: one QEMU is left; loop.SimLoop.run: tasks
    I10  here: 1 s after a decision to roll back, which no fault has come near, the guest runs
    I11  run._until_over: an end after all faults; run._check: the VM is moved again
    I12  not here: tests.test_log and tests.api (no secret ever comes into these runs)
    I13  here: a QEMU is ended by the side that may, in the phases that permit it   at each `quit`

`Watch.wrong` has what was seen; the run ends with it. Each line can be seen to fail: tests.sim
.test_watching plants one fault for each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from migrd.core.handover import DESTINATION_TRANSITIONS, DestinationEvent, DestinationPhase
from migrd.core.migration import MigrationEvent
from migrd.core.phases import TRANSITIONS, Phase
from migrd.engine.service import MigrationView, Role, Whereabouts
from tests.fakes.guest import Holder
from tests.fakes.qemu_process import FakeQemu
from tests.fakes.virtual_time import now_s
from tests.fakes.world import VM, Daemon, Pair

TABLE = {phase: dict(row) for phase, row in TRANSITIONS.items()}
TABLE_THERE = {phase: dict(row) for phase, row in DESTINATION_TRANSITIONS.items()}
"""As they were before anybody could change them."""
RESUMED_S = 1.0
ACTS_FIRST = frozenset({Phase.PREFLIGHT, Phase.SWITCHOVER, Phase.ROLLING_BACK})
"""What a source whose journal fails does first, and says so (engine.outgoing)."""
MAY_END_SOURCE = frozenset({Phase.COMPLETING, Phase.SUCCEEDED, Phase.GUEST_LOST})
HAS_LEFT = frozenset({Phase.GRANTED, Phase.COMPLETING, Phase.SUCCEEDED})
TERMINAL = frozenset(phase for phase, row in TABLE.items() if not row)


@dataclass
class Course:
    """The records of one migration on one disk."""

    host: str
    instance: str | None
    epoch: int
    phase: Any
    before: Any = None
    was_granted: bool = False
    seen: MigrationView | None = None


@dataclass
class Watch:
    """Of one run."""

    pair: Pair
    wrong: list[str] = field(default_factory=list)
    courses: dict[tuple[str, str], Course] = field(default_factory=dict)
    struck_at_s: float = 0.0
    """When the last fault began or ended."""
    lasting: int = 0
    """Faults that go on."""
    may_be_gone: bool = False
    """What had the guest was killed, or it has ended itself."""
    is_forced: bool = False
    """A switchover was forced: QEMU answers nothing, a cancel neither, until all is sent."""
    looks: int = 0
    _arrivals: dict[str, asyncio.Event] = field(default_factory=dict)
    _vm_epochs: dict[str, int] = field(default_factory=dict)

    def begin(self) -> None:
        """From here on."""
        for name, disk in self.pair.disks.items():
            disk.wrote = lambda kind, id_, values, host=name: self._wrote(host, kind, id_, values)
        self.pair.guest().asked_to_end = self._asked_to_end

    def struck(self) -> None:
        """A fault begins or ends at this moment."""
        self.struck_at_s = now_s()

    async def comes_to(self, phase: str) -> bool:
        """Until a journal says so; False when all is over before."""
        await self._arrivals.setdefault(phase, asyncio.Event()).wait()
        return any(c.phase == phase for c in self.courses.values())

    def has_granted(self, host: str) -> bool:
        """And nothing has come of it yet, or it rolls back."""
        mine = [c for c in self.courses.values() if c.host == host and c.was_granted]
        return any(c.phase not in TERMINAL or c.before is Phase.GRANTED for c in mine)

    def _arrived(self, to: Phase | DestinationPhase) -> None:
        told = self._arrivals.values() if to in TERMINAL else [self._arrivals.get(to.value)]
        for event in told:
            if event is not None:
                event.set()

    def say(self, what: str) -> None:
        self.wrong.append(f"{now_s() - 1000:.4f} s: {what}")

    # Records ------------------------------------------------------------------------------------

    def _wrote(self, host: str, kind: str, id_: str, values: Iterable[Any]) -> None:
        self._check_kept()
        match kind:
            case "request" | "incoming":
                (stored,) = values
                first = Phase.PENDING if kind == "request" else DestinationPhase.PREPARING
                instance = getattr(stored, "instance", None)
                last = max((c.epoch for c in self.courses.values() if c.host == host), default=0)
                if stored.epoch <= last:
                    self.say(f"I5: {host} {kind} of epoch {stored.epoch} after {last}")
                course = Course(host, instance, stored.epoch, first)
                self.courses[host, id_] = course
            case "vm":
                (vm,) = values
                if vm.epoch < self._vm_epochs.get(host, 0):
                    self.say(f"I5: {host} knows epoch {vm.epoch} after {self._vm_epochs[host]}")
                self._vm_epochs[host] = vm.epoch
            case _:
                known = self.courses.get((host, id_))
                if known is not None:  # else it is of before the watch began
                    known.before = known.phase
                    for event in values:
                        self._moved(known, id_, event)

    def _moved(self, course: Course, id_: str, event: MigrationEvent | DestinationEvent) -> None:
        table: Any = TABLE if isinstance(event, MigrationEvent) else TABLE_THERE
        to = table[course.phase].get(event.trigger)
        if to is None:
            self.say(f"I7: {course.host} {id_}: {event.trigger} in {course.phase}")
            return
        course.phase = to
        course.was_granted = course.was_granted or to is Phase.GRANTED
        self._arrived(to)
        if to is Phase.ROLLING_BACK:
            loop = asyncio.get_running_loop()
            loop.call_later(RESUMED_S, self._check_resumed, course, now_s())

    def _check_resumed(self, course: Course, since_s: float) -> None:
        """I10: nothing else has failed, and it runs again."""
        is_quiet = not self.lasting and self.struck_at_s <= since_s and not self.is_forced
        is_last = all(other.epoch <= course.epoch for other in self.courses.values())
        daemon = self.pair.daemons.get(course.host)
        if not is_quiet or not is_last or self.may_be_gone or daemon is None or daemon.gate.is_dead:
            return
        runs_on = self.pair.running_on()
        if course.phase in HAS_LEFT and runs_on is not None:
            return  # it had left by postcopy before that
        if runs_on != course.host:
            self.say(f"I10: not running on {course.host} {RESUMED_S:g} s after a roll-back began")

    def _check_kept(self) -> None:
        guest = self.pair.guest()
        if not self.may_be_gone and not guest.may_end and not guest.whole_copies:
            self.say("I2: no whole copy of the guest exists, and nothing that had one was killed")

    # Acts ---------------------------------------------------------------------------------------

    def _asked_to_end(self, holder: Holder) -> None:
        """A daemon ends a QEMU."""
        assert isinstance(holder, FakeQemu)
        mine = [c for c in self.courses.values() if c.host == holder.host_name]
        there = [c for c in mine if c.instance == holder.instance]
        if self.pair.guest().may_end:
            return
        if there and there[-1].phase is DestinationPhase.REFUSED:
            return
        if any(c.instance is None and c.phase in MAY_END_SOURCE for c in mine):
            return
        if holder.missing_from is not None and holder.missing_from.is_dead:
            return  # what it waits for is gone for good
        said = [f"{c.phase}" for c in mine]
        self.say(f"I13: {holder.name} is ended, and the journal of its host says {said}")

    # Answers ------------------------------------------------------------------------------------

    def look(self) -> None:
        """Ask both daemons at once, as many clients would."""
        self._check_kept()
        newest = max(self.courses.values(), key=lambda c: c.epoch, default=None)
        for host, daemon in self.pair.daemons.items():
            if daemon.gate.is_dead or daemon.gate.stands_still or not daemon.engine.host.recovered:
                continue
            self.looks += 1
            for view in daemon.service.migrations()[1]:
                course = self.courses.get((host, view.id))
                if course is not None:
                    self._check_answer(daemon, view, course)
                    if newest is not None and course.epoch == newest.epoch:
                        self._check_place(view)

    def _check_answer(self, daemon: Daemon, view: MigrationView, course: Course) -> None:
        journal = daemon.journal
        allowed = {course.phase.value}
        if journal.writing or journal.fsync_fails:
            allowed.add(getattr(course.before, "value", ""))  # not acknowledged
        if DestinationPhase.RECEIVING.value in allowed:
            allowed.add(DestinationPhase.LOADED.value)  # its QEMU says so, and says so again
        is_said = any(each.type == "JournalFailing" for each in view.conditions)
        may_be_ahead = view.phase in ACTS_FIRST and (is_said or bool(journal.writing))
        if view.phase not in allowed and not may_be_ahead:
            self.say(f"I8: {course.host} answers {view.phase}, its journal says {course.phase}")
        last, course.seen = course.seen, view
        if last is not None and last.is_terminal and view.phase != last.phase:
            self.say(f"I3: {course.host} said {last.phase} and now {view.phase}")

    def _check_place(self, view: MigrationView) -> None:
        """Who says where it runs is right."""
        runs_on, said = self.pair.running_on(), view.guest_runs_on
        where = {Whereabouts.SOURCE: view.source, Whereabouts.DESTINATION: view.destination}
        is_bound = view.role is Role.SOURCE or view.is_terminal
        if is_bound and runs_on is not None and where.get(said, runs_on) != runs_on:
            self.say(f"I8: {view.role} says {where[said]} ({view.phase}), it is on {runs_on}")
        if runs_on is not None and said is Whereabouts.NOWHERE:
            self.say(f"I3: {view.role} says nowhere ({view.phase}), and it runs on {runs_on}")


async def keep_looking(watch: Watch, moments_s: Iterable[float]) -> None:
    """Ask at these moments."""
    began_s = now_s()
    for at_s in moments_s:
        await asyncio.sleep(max(0.0, began_s + at_s - now_s()))
        watch.look()


__all__ = ["VM", "Watch", "keep_looking"]
