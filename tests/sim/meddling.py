"""People who do everything at once: a VM started, stopped, forgotten and defined anew on both hosts
while it is being moved, and given up (guest_lost) without anybody looking.

    python -m tests.sim.meddling SEED [SEED ...]
    python -m tests.sim.meddling --from SEED --runs N

With an arbiter none of that may run a guest twice, however its requests are lost, late or repeated
and whichever daemon is killed. Nor may a VM be stranded: when all is calm, what the answers ask for
gets it started. The words that need a proof (`destination_fenced`, `use_destination_copy`) are said
only when they are true, and records are not removed by hand: what a person swears to is believed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import tests.sim.quick  # noqa: F401 - first: it makes `replace` quick for all that follow
from migrd.core.facts import VmSpec
from migrd.core.phases import Phase
from migrd.engine import boot, registry
from migrd.engine.service import Resolution
from migrd.errors import MigrdError
from tests.fakes import arbiter as fake
from tests.fakes.arbiter import FakeArbiterStore
from tests.fakes.arbiter import Trouble as ArbiterTrouble
from tests.fakes.road import Loss
from tests.fakes.virtual_time import until
from tests.fakes.world import VM, Daemon, Pair
from tests.sim.loop import SimLoop
from tests.sim.run import Names, Wrong
from tests.sim.tempo import BRISK, WATCHERS, nothing

HOSTS = ("alpha", "beta")
DEEDS = 30
"""Of one run, at the most."""
LATE_S = 12.0
CALM_S = 60.0
CURES = 12
"""So many times a person does what the answers ask for, until the VM runs."""
SPEC = VmSpec(VM, "tiny")


@dataclass
class Meddler:
    """One run."""

    random_: random.Random
    pair: Pair
    done: list[str] = field(default_factory=list)

    async def run(self) -> None:
        """Deeds overlap: nobody waits for the one before."""
        doing: list[asyncio.Task[None]] = []
        for _ in range(self.random_.randint(6, DEEDS)):
            host = self.random_.choice(HOSTS)
            deed = self.random_.choice(self._deeds)
            doing.append(asyncio.create_task(self._do(host, deed)))
            await asyncio.sleep(10 ** self.random_.uniform(-2.5, 0.9))
        await asyncio.wait(doing, timeout=CALM_S)
        for task in doing:
            task.cancel()
        await asyncio.wait(doing)

    @property
    def _deeds(self) -> tuple[Callable[[Daemon], Awaitable[object]], ...]:
        deeds = (self.move, self.stop, self.forget, self.define, self.start, self.word, self.kill)
        return (*deeds, self.define_and_start, self.define_and_start, self.stop_and_forget)

    async def _do(self, host: str, deed: Callable[[Daemon], Awaitable[object]]) -> None:
        daemon = self.pair.daemons.get(host)
        if daemon is None or daemon.gate.is_dead:
            return
        what = f"{deed.__name__} on {host}"
        try:
            await deed(daemon)
        except MigrdError as exc:
            self.done.append(f"{what}: {exc.code}")
        except asyncio.CancelledError:
            self.done.append(f"{what}: cut off")
            if daemon is self.pair.daemons.get(host):
                raise
        else:
            self.done.append(what)

    # What people do -------------------------------------------------------------------------

    async def move(self, daemon: Daemon) -> None:
        await self.pair.ask(source=daemon.name)

    async def stop(self, daemon: Daemon) -> None:
        await daemon.service.stop_vm(VM)

    async def forget(self, daemon: Daemon) -> None:
        await daemon.service.forget_vm(VM)

    async def define(self, daemon: Daemon) -> None:
        await daemon.service.define_vm(SPEC, dry_run=False)

    async def start(self, daemon: Daemon) -> None:
        await daemon.service.start_vm(VM)

    async def define_and_start(self, daemon: Daemon) -> None:
        await self.define(daemon)
        await self.start(daemon)

    async def stop_and_forget(self, daemon: Daemon) -> None:
        with contextlib.suppress(MigrdError):
            await self.stop(daemon)
        await self.forget(daemon)

    async def word(self, daemon: Daemon) -> None:
        """Give it up, or say what is true."""
        for view in daemon.service.migrations()[1]:
            if not view.is_terminal:
                word = Resolution.GUEST_LOST
                if self.random_.random() < 0.5:
                    word = self.truth(daemon, view.phase)
                await daemon.service.resolve(view.id, word, evidence="seen", by="meddler")

    def truth(self, daemon: Daemon, phase: str) -> Resolution:
        """What may be sworn to; nothing but guest_lost of a guest that is nowhere whole."""
        other = "beta" if daemon.name == "alpha" else "alpha"
        here, there = (self.pair.hosts[name].living(VM) for name in (daemon.name, other))
        is_source = phase == Phase.NEEDS_OPERATOR
        if any(qemu.is_running for qemu in there) and is_source:
            return Resolution.DESTINATION_RUNS
        if is_source and here and not there:
            return Resolution.DESTINATION_FENCED
        version = self.pair.guest().version
        copies = there if is_source else here
        rest = here if is_source else there
        if not rest and any(qemu.copy == version for qemu in copies):
            return Resolution.USE_DESTINATION_COPY
        return Resolution.GUEST_LOST

    async def kill(self, daemon: Daemon) -> None:
        """kill -9, and a keeper who starts it again."""
        name = daemon.name
        away_s = self.random_.choice((0.0, 0.05, 1.0, 12.0))
        daemon.gate.crash()
        await self.pair.kill(name)
        await asyncio.sleep(away_s)
        await self.pair.start(name)

    # Afterwards -------------------------------------------------------------------------------

    async def is_cured(self) -> bool:
        """A person who does what the answers ask for gets the VM started; or it runs already."""
        for _ in range(CURES):
            if self.pair.running_on() is not None:
                return True
            for daemon in list(self.pair.daemons.values()):
                with contextlib.suppress(MigrdError):
                    await self.word(daemon)
            await asyncio.sleep(CALM_S)
            for host in HOSTS:
                for deed in (self.define, self.start):
                    await self._do(host, deed)
                if self.pair.running_on() is not None:
                    return True
                await self._do(host, self.stop_and_forget)
        return False


def arm(random_: random.Random, pair: Pair, store: FakeArbiterStore) -> None:
    """Requests and messages go astray, as often as the seed says."""
    share = random_.choice((0.0, 0.05, 0.2, 0.5))
    troubles, losses = list(ArbiterTrouble), list(Loss)
    if random_.random() < 0.5:  # else what is late seldom has somebody to cross
        troubles, losses = [ArbiterTrouble.REQUEST_LATE], [Loss.REQUEST_LATE]

    def at_the_arbiter(host: str, call: str) -> ArbiterTrouble | None:
        return random_.choice(troubles) if random_.random() < share else None

    def on_the_road(caller: str, callee: str, call: str) -> Loss | None:
        return random_.choice(losses) if random_.random() < share else None

    store.faults = at_the_arbiter
    pair.road.faults = on_the_road


def play(seed: int) -> list[str]:
    """What was done. Raises Wrong."""
    done: list[str] = []
    try:
        SimLoop().run(_play(seed, done))
    except (Exception, asyncio.CancelledError) as exc:
        told = "\n    ".join(done)
        raise Wrong(f"meddling, seed {seed}:\n    {told}\n  {exc!r}") from exc
    return done


async def _play(seed: int, done: list[str]) -> None:
    random_ = random.Random(seed)
    store = FakeArbiterStore()
    pair = Pair(arbiter=store, **BRISK.options)
    names = Names(seed)
    for module, name, value in (*BRISK.constants, (fake, "LATE_S", LATE_S)):
        pair.replace(module, name, value)
    pair.replace(registry, "uuid", names)
    pair.replace(boot, "secrets", names)
    for owner, watcher in WATCHERS:
        pair.replace(owner, watcher, nothing)
    for disk in pair.disks.values():
        disk.is_sealed = False
    async with pair:
        await pair.boot()
        pair.guest().may_end = True
        arm(random_, pair, store)
        meddler = Meddler(random_, pair, done)
        await meddler.run()
        store.heal()
        pair.road.heal()
        await until(lambda: set(pair.daemons) == set(HOSTS), within_s=100.0, what="both are back")
        await asyncio.sleep(CALM_S)
        pair.check_truth()
        assert await meddler.is_cured(), "the VM is stranded"
        pair.check_truth()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.meddling", description=__doc__)
    parser.add_argument("seeds", nargs="*", type=int, metavar="SEED")
    parser.add_argument("--from", dest="first", type=int, default=0, metavar="SEED")
    parser.add_argument("--runs", type=int, default=0)
    options = parser.parse_args()
    wrong = 0
    for seed in (*options.seeds, *range(options.first, options.first + options.runs)):
        try:
            done = play(seed)
        except Wrong as exc:
            wrong += 1
            sys.stdout.write(f"{exc}\n")
        else:
            if options.seeds:
                sys.stdout.write("\n  ".join((f"seed {seed}", *done)) + "\n")
    sys.stdout.write(f"{options.runs or len(options.seeds)} runs, {wrong} wrong\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # sets have an order, too
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.sim.meddling", *sys.argv[1:]])
    sys.exit(main())
