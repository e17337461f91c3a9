"""What must be true after a faulted migration: the ground truth against every answer.

each migration has ended; a person had to settle one only where a QEMU was killed
the guest runs where the answers say, in one QEMU; its count has no gap and no repeat, its
memory is as predicted; nobody but the youngest QEMU that ever ran is seen running
both hosts say the same of it, and the VM migrates again
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from datetime import datetime
from itertools import pairwise
from typing import Any

from migrd.cli.client import Problem
from migrd.cli.exits import CommandError
from migrd.cli.seen import Json
from migrd.demo.errors import ProofFailed
from migrd.demo.heartbeat import SerialTap, heartbeats
from tests.integration.fleet import TERMINAL, VM
from tests.long.blows import Fight
from tests.long.field import NAMES, Field
from tests.long.schedule import EVERY
from tests.sweep.sweeping import BROKEN

END_S = 90.0
DOUBT_S = 6.0
"""So long `needs_operator` is left alone before a person looks: most of it settles by itself."""
CLEAN_S = 30.0
_BROKEN = (b"Traceback", *(event.encode() for event in BROKEN))


class Violation(AssertionError):
    """Something is not as it must be; `kind` is a column of the summary."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def check(holds: bool, kind: str, message: str) -> None:
    if not holds:
        raise Violation(kind, message)


async def judge(fight: Fight) -> tuple[str, list[str]]:
    """(how it ended, what a person had to say). Raises Violation, ProofFailed, AssertionError."""
    words: list[str] = []
    ended = await _ends(fight, words)
    two = fight.two
    _never_twice(two)
    if fight.schedule.seed >= EVERY:
        await _was_reached(fight)
    await fight.end()
    await _nothing_broke(two)
    phases = [str(view["phase"]) for _, view in ended]
    if await _died_afterwards(fight, phases):
        phases.append("its QEMU killed afterwards")
        _continuous(two)
    elif "guest_lost" in phases:
        await _is_lost(fight)
    else:
        flips = phases.count("succeeded")
        on = fight.source if flips % 2 == 0 else fight.destination
        await _is_whole(two, flips, on)
        for host, view in ended:
            await _other_agrees(two, host, view)
    return ",".join(phases) or "never begun", words


def _never_twice(two: Field) -> None:
    """Asked of all QEMUs all the time."""
    assert two.ground is not None
    seen = two.ground.violations
    check(not seen, "double run", f"{len(seen)} times, first: {seen[0] if seen else None}")


async def _nothing_broke(two: Field) -> None:
    """No daemon has logged since the last look that it met something it has no rule for."""
    for host in two.hosts.values():
        log = await asyncio.to_thread(host.log.read_bytes)
        new = log[two.read_bytes.get(host.name, 0) :]
        two.read_bytes[host.name] = len(log)
        bad = [line for line in new.splitlines() if any(word in line for word in _BROKEN)]
        check(not bad, "broke", "; ".join(line.decode(errors="replace") for line in bad[:3]))


async def _was_reached(fight: Fight) -> None:
    """What the schedule is for; the destination may come to it when the source has ended."""
    last, give_up_at = fight.schedule.blows[-1], time.monotonic() + 5.0
    while not fight.was_struck_at(last):
        check(time.monotonic() < give_up_at, "not reached", f"nobody came to {last.point}")
        await asyncio.sleep(0.02)


async def _ends(fight: Fight, words: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Every migration of this fight in its terminal phase."""
    give_up_at, doubted_at = time.monotonic() + END_S, None
    while True:
        await fight.hurry()
        try:
            begun = await fight.begun()
        except CommandError:  # one has come to its failpoint only now
            await asyncio.sleep(0.05)
            continue
        left = [one for one in begun if one[1]["phase"] not in TERMINAL]
        if not left:
            return begun
        doubts = [one for one in left if one[1]["phase"] == "needs_operator"]
        doubted_at = (doubted_at or time.monotonic()) if doubts else None
        if doubted_at is not None and time.monotonic() - doubted_at > DOUBT_S:
            words.append(await _say_the_truth(fight, *doubts[0]))
            doubted_at = None
        phases = [(view["phase"], view["cause"]) for _, view in left]
        check(time.monotonic() < give_up_at, "no end", f"still going on: {phases}")
        await asyncio.sleep(0.05)


async def _say_the_truth(fight: Fight, host: str, view: dict[str, Any]) -> str:
    """A person looks at both hosts; nobody is called unless a process that mattered has died."""
    two, ground = fight.two, fight.two.ground
    assert ground is not None
    check(bool(fight.killed), "false answer", f"a person is called for nothing: {view['cause']}")
    here, there = await two.qemus(host), await two.qemus(two.other(host))
    were_there = [*there, *(pid for pid, on in fight.killed.items() if on == two.other(host))]
    ran_there = any(map(ground.has_run, were_there)) or two.beats(two.other(host)) > 0
    if there and ran_there:
        word = "destination_runs"
    elif here and not ran_there:
        word = "destination_fenced"
        for pid in there:
            raise Violation("false answer", f"called although QEMU {pid} waits: {view['cause']}")
    else:
        word = "guest_lost"
    body: Json = {"resolution": word, "evidence": "looked at both hosts' processes"}
    with contextlib.suppress(Problem):  # it may have settled meanwhile
        await two.call(host, "POST", f"/v1/migrations/{view['id']}:resolve", body=body)
    return f"{view['cause']['code']}: {word}"


async def _is_lost(fight: Fight) -> None:
    """Only by the death of a QEMU, and then really nowhere."""
    two = fight.two
    check(bool(fight.killed), "lost", "the guest is said to be lost, and nothing was killed")
    await _until_qemus(two, 0)
    _continuous(two)


async def _died_afterwards(fight: Fight, phases: list[str]) -> bool:
    """The guest was where it is said to be, and the blow hit it there when all was over."""
    if "guest_lost" in phases or await fight.two.qemus():
        return False
    assert fight.two.ground is not None
    check(bool(fight.killed), "lost", f"no QEMU is left, and none was killed: {phases}")
    return fight.two.ground.runs in fight.killed


async def _until_qemus(two: Field, count: int, within_s: float = 30.0) -> None:
    try:
        await two.only_qemus(count, within_s=within_s)
    except AssertionError as exc:
        raise Violation("left behind", str(exc)) from exc


def _continuous(two: Field) -> int:
    """Read what was printed as one log; how often the guest moved."""
    try:
        beats = heartbeats([tap for tap in two.taps if tap.chunks])
    except ProofFailed as exc:
        raise Violation("double run", str(exc)) from exc
    for before, after in pairwise(beats):
        step = after.sequence - before.sequence
        check(step > 0, "double run", f"beat {after.sequence} after {before.sequence}")
        check(step == 1, "memory", f"beat {after.sequence} after {before.sequence}: a gap")
        check(not after.integrity_errors, "memory", "the guest found pages changed")
    return sum(a.owner != b.owner for a, b in pairwise(beats))


async def _is_whole(two: Field, flips: int, on: str) -> None:
    await two.counts_on(on, within_s=30.0)
    await _until_qemus(two, 1)
    moved = _continuous(two)
    check(moved == flips, "false answer", f"the guest moved {moved} times; told: {flips}")
    try:
        await two.prove(flips, on=on)
    except AssertionError as exc:
        raise Violation("false answer", str(exc)) from exc
    except Exception as exc:
        raise Violation("memory", str(exc)) from exc


async def _other_agrees(two: Field, host: str, view: dict[str, Any]) -> None:
    """The destination says the same of this migration, soon. One whose QEMU died as it was started
    may have missed that the guest was given back: it asks when it is asked next."""
    wanted = "running" if view["phase"] == "succeeded" else "refused"
    give_up_at, told = time.monotonic() + 30.0, None
    while time.monotonic() < give_up_at:
        try:
            seen = await two.migration(two.other(host), view["id"])
            told = seen["phase"]
            if (told, seen["guest_runs_on"]) == ("starting", "unknown") and wanted == "refused":
                return
        except Problem as problem:
            if problem.status == 404 and wanted == "refused":
                return
        except CommandError:
            pass
        if told == wanted:
            return
        await asyncio.sleep(0.05)
    raise Violation("false answer", f"{host} says {view['phase']}, the other {told}")


def restarts_within(fight: Fight, ended: list[tuple[str, dict[str, Any]]]) -> int:
    """Daemons that were ready and were killed while a migration of this fight was unfinished."""
    spans = [(_wall_s(v["created_at"]), _wall_s(v["timeline"][-1]["entered_at"])) for _, v in ended]
    return sum(
        death.was_ready and any(begun <= death.wall_s <= over for begun, over in spans)
        for death in fight.two.deaths
    )


def _wall_s(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


async def migrates_again(two: Field) -> None:
    """As if nothing had been."""
    source = await two.home()
    destination = two.other(source)
    policy: Json = {"deadline_s": 60}
    try:
        migration = await two.migrate(source, destination, policy=policy)
        seen = await two.ended(source, migration, CLEAN_S)
    except (CommandError, AssertionError) as exc:
        raise Violation("stuck", f"it does not migrate again: {exc}") from exc
    why = f"{seen['phase']}: {seen['cause']} {seen['refusals']}"
    check(seen["phase"] == "succeeded", "stuck", why)
    await two.counts_on(destination, within_s=30.0)
    await _until_qemus(two, 1)
    _never_twice(two)
    moved = _continuous(two)
    check(moved == 1, "false answer", f"moved once, seen {moved} times")


async def start_anew(two: Field) -> None:
    """After a guest was lost: a person starts it, on the host that says it was there."""
    await forget_what_was_heard(two, everything=True)
    denied = []
    for name in NAMES:
        try:
            await two.call(name, "POST", f"/v1/vms/{VM}:start")
        except CommandError as exc:
            denied.append(f"{name}: {exc}")
        else:
            await two.counts_on(name)
            return
    raise Violation("stuck", f"a lost guest cannot be started: {denied}")


async def forget_what_was_heard(two: Field, *, everything: bool = False) -> None:
    """Keep what was heard from the last line on, so that the next proof joins it."""
    heard = [tap for tap in two.taps if tap.chunks]
    for tap in heard if everything else heard[:-1]:
        tap.chunks.clear()
    if heard and not everything:
        _keep_the_last_line(heard[-1])


def _keep_the_last_line(tap: SerialTap) -> None:
    text = tap.text()
    begins = text.rfind(b"\n", 0, text.rfind(b"\n")) + 1
    last_s = tap.chunks[-1][0]
    tap.chunks[:] = [(last_s, text[begins:])]
