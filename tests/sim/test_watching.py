"""Each line of what is watched (tests.sim.watching) can be seen to fail: one fault for each,
planted in the product, and found by random schedules."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from migrd.core import phases
from migrd.core.phases import Instruction, Phase, Trigger
from migrd.engine import migrations, views
from migrd.engine.device_holding import DeviceHolding
from migrd.engine.incoming import Incoming
from migrd.engine.service import Whereabouts
from migrd.engine.vms import VmTable
from tests.sim.run import Wrong, play
from tests.sim.schedule import from_seed
from tests.sweep.test_mutants import resume_on_a_time_out

FIRST = 1_000_000
MOST = 400

Plant = Callable[[pytest.MonkeyPatch], None]


def moving(phase: Phase, trigger: Trigger, to: Phase) -> Plant:
    """Another row of the table of phases."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        table = {**phases.TRANSITIONS, phase: {**phases.TRANSITIONS[phase], trigger: to}}
        patch.setattr(phases, "TRANSITIONS", table)

    return plant


def step(instruction: Instruction, before: Callable[[Any], Any]) -> Plant:
    """Something else is done before a step."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = migrations.STEPS[instruction]

        async def planted(m: Any) -> Any:
            await before(m)
            return await real(m)

        patch.setattr(migrations, "STEPS", {**migrations.STEPS, instruction: planted})

    return plant


def answering(change: Callable[[Any], Any]) -> Plant:
    """The source's answers are changed."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = views.of_outgoing

        def planted(*args: Any) -> Any:
            return change(real(*args))

        patch.setattr(views, "of_outgoing", planted)

    return plant


def _told_ahead(view: Any) -> Any:
    return replace(view, phase="granted") if view.phase == "switchover" else view


def _told_otherwise_later(view: Any) -> Any:
    is_late = view.is_terminal and view.total_s is not None and view.generation % 2 == 0
    return replace(view, phase="succeeded") if is_late else view


def _told_elsewhere(view: Any) -> Any:
    is_back = view.phase in ("rolled_back", "cancelled")
    return replace(view, guest_runs_on=Whereabouts.DESTINATION) if is_back else view


async def for_ever(_: object) -> None:
    """I11."""
    await asyncio.Event().wait()


def always_the_first_epoch(patch: pytest.MonkeyPatch) -> None:
    """Whatever was before."""
    patch.setattr(VmTable, "last_epoch", lambda self, name: 0)


def devices_are_kept(patch: pytest.MonkeyPatch) -> None:
    """Although their QEMU is dead."""

    async def kept(self: DeviceHolding, instance: str, opened: object) -> None:
        """Nothing is let go of."""

    async def not_watched(self: DeviceHolding, vmm: object, opened: object) -> None:
        """Nobody waits for the end of the process."""

    patch.setattr(DeviceHolding, "_close", kept)
    patch.setattr(DeviceHolding, "_until_exit", not_watched)


def a_task_is_left(patch: pytest.MonkeyPatch) -> None:
    """By each incoming migration."""
    real, strays = Incoming.run, list[asyncio.Task[None]]()

    async def planted(self: Incoming) -> None:
        strays.append(asyncio.create_task(asyncio.sleep(1e9)))
        await real(self)

    patch.setattr(Incoming, "run", planted)


PLANTED: list[tuple[str, str, Plant]] = [
    ("I1", "resumes on a time-out", resume_on_a_time_out),
    ("I2", "ends the source's QEMU first", step(Instruction.ROLL_BACK, lambda m: m.vmm.quit())),
    ("I4", "starts an old copy on a time-out", resume_on_a_time_out),
    (
        "I13",
        "releases the source when the outcome is unknown",
        moving(Phase.GRANTED, Trigger.OUTCOME_UNKNOWN, Phase.COMPLETING),
    ),
    ("I3", "says another end later", answering(_told_otherwise_later)),
    ("I5", "uses an epoch twice", always_the_first_epoch),
    (
        "I7",
        "rolls back what was refused",
        moving(Phase.PREFLIGHT, Trigger.PREFLIGHT_REFUSED, Phase.ROLLING_BACK),
    ),
    ("I8", "answers ahead of the journal", answering(_told_ahead)),
    ("I8", "says the guest is where it is not", answering(_told_elsewhere)),
    ("I9", "leaves a task", a_task_is_left),
    ("open devices", "keeps the devices of a dead QEMU", devices_are_kept),
    ("I10", "is slow to roll back", step(Instruction.ROLL_BACK, lambda m: asyncio.sleep(5.0))),
    ("no end", "never comes to an end", step(Instruction.RELEASE_SOURCE, for_ever)),
]


def seeds_until(what: str) -> int | None:
    """How many schedules until one says so."""
    for count in range(1, MOST + 1):
        try:
            play(from_seed(FIRST + count))
        except Wrong as exc:
            if what in str(exc.__cause__):
                return count
    return None


@pytest.mark.parametrize(
    ("what", "plant"), [(what, plant) for what, _, plant in PLANTED], ids=[p[1] for p in PLANTED]
)
def test_a_planted_fault_is_seen(what: str, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert seeds_until(what) is not None
