"""What the engine counts on in a Launcher: one body, on the simulated host and on real QEMUs."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

import pytest

from migrd.core.facts import REQUIRED_FEATURES, RunState, VmSpec
from migrd.daemon import KERNEL_PARTS
from migrd.demo import processes
from migrd.direct.handoff_listener import HandoffListener
from migrd.direct.launcher import DirectLauncher
from migrd.direct.profile_files import load_direct_profiles
from migrd.direct.vmm import DirectOptions
from migrd.engine.ports import Launcher, Vmm
from migrd.engine.threads import in_thread
from migrd.errors import Conflict, NotFound, VmmDied
from tests.fakes.launcher import FakeHost, FakeLauncher, Ground
from tests.qemu.hosts import Host, host_of


class World(Protocol):
    """One host; daemons come and go on it."""

    def spec(self, name: str = "vm") -> VmSpec: ...

    def daemon(self) -> AbstractAsyncContextManager[Launcher]: ...

    def kill(self, vmm: Vmm) -> None:
        """SIGKILL its process."""

    def break_starts(self) -> None:
        """From now on QEMU ends at once, and says "no such luck"."""

    def others_launch(self, name: str) -> AbstractAsyncContextManager[None]:
        """Somebody else launches a QEMU where it is adopted from."""


class FakeWorld:
    def __init__(self) -> None:
        self.host = FakeHost("a", Ground())

    def spec(self, name: str = "vm") -> VmSpec:
        return VmSpec(name, "tiny")

    @contextlib.asynccontextmanager
    async def daemon(self) -> AsyncIterator[Launcher]:
        launcher = FakeLauncher(self.host)
        yield launcher
        launcher.close()

    def kill(self, vmm: Vmm) -> None:
        [qemu] = [q for q in self.host.qemus if q.instance == vmm.instance]
        qemu.die("killed")

    def break_starts(self) -> None:
        self.host.launch_fails = "no such luck"

    @contextlib.asynccontextmanager
    async def others_launch(self, name: str) -> AsyncIterator[None]:
        qemu = self.host.boot(name)
        self.host.adopted.add(qemu.instance)
        yield
        if not qemu.is_dead:
            qemu.die("killed")


class RealWorld:
    def __init__(self, host: Host) -> None:
        self.host = host

    def spec(self, name: str = "vm") -> VmSpec:
        return self.host.spec(name)

    def daemon(self) -> AbstractAsyncContextManager[Launcher]:
        return self.host.daemon()

    def kill(self, vmm: Vmm) -> None:
        self.host.end_all()

    def break_starts(self) -> None:
        script = self.host.add_script("echo no such luck >&2; exit 1")
        self.host.add_profile("lab", (str(self.host.binary), str(script)))

    @contextlib.asynccontextmanager
    async def others_launch(self, name: str) -> AsyncIterator[None]:
        with self.host.by_hand(name):
            yield


SMALL = '"--memory-mib", "16", "--working-set-mib", "1", "--filling-mib", "1"'


class DirectWorld:
    """Processes that hand their guests over."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._profile(f'"{sys.executable}", "-m", "migrd.demo.direct_guest"')

    def _profile(self, command: str) -> None:
        profiles = self.directory / "profiles"
        profiles.mkdir(exist_ok=True)
        lines = (
            'engine = "direct"',
            'description = "a small guest"',
            'kind = "demo-1"',
            f"command = [{command}, {SMALL}]",
            "memory_mib = 16",
        )
        (profiles / "tiny.toml").write_text("\n".join(lines))

    def spec(self, name: str = "vm") -> VmSpec:
        return VmSpec(name, "tiny")

    @contextlib.asynccontextmanager
    async def daemon(self) -> AsyncIterator[Launcher]:
        profiles = await in_thread(load_direct_profiles, self.directory / "profiles")
        socket = self.directory / "direct.sock"
        launcher = DirectLauncher(
            profiles, self.directory, socket, KERNEL_PARTS, DirectOptions(), start_deadline_s=20
        )
        async with HandoffListener(socket, on_client=launcher.take):
            yield launcher
            await launcher.close()

    def kill(self, vmm: Vmm) -> None:
        assert vmm.pid is not None
        os.kill(vmm.pid, signal.SIGKILL)

    def break_starts(self) -> None:
        self._profile('"/bin/sh", "-c", "echo no such luck >&2; exit 1"')

    @contextlib.asynccontextmanager
    async def others_launch(self, name: str) -> AsyncIterator[None]:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "migrd.demo.direct_guest"),
            *(word.strip('" ') for word in SMALL.split(",")),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, "MIGRD_VM": name, "MIGRD_SOCKET": f"{self.directory}/direct.sock"},
        )
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()


@pytest.fixture(params=["fake", "direct", pytest.param("real", marks=pytest.mark.real)])
async def world(request: pytest.FixtureRequest, short_tmp_path: Path) -> AsyncIterator[World]:
    if request.param == "fake":
        yield FakeWorld()
        return
    if request.param == "direct":
        yield DirectWorld(short_tmp_path)
        await in_thread(processes.end, await in_thread(processes.guests_of, short_tmp_path))
        return
    binary = request.getfixturevalue("qemu_binaries")["7.2"]
    with contextlib.ExitStack() as stack:
        yield RealWorld(await in_thread(stack.enter_context, host_of(short_tmp_path, binary)))


async def seen_dead(vmm: Vmm) -> None:
    async with asyncio.timeout(10):
        while not vmm.is_dead:  # noqa: ASYNC110 - a Vmm has no event for it
            await asyncio.sleep(0.001)


async def test_a_check_gives_the_same_digest_each_time_and_knows_no_other_profile(
    world: World,
) -> None:
    async with world.daemon() as launcher:
        first = await in_thread(launcher.check, world.spec())
        assert first == await in_thread(launcher.check, world.spec("other"))
        with pytest.raises(NotFound) as missing:
            await in_thread(launcher.check, VmSpec("vm", "none"))
        assert missing.value.code == "unknown_profile"
        with pytest.raises(NotFound):
            await launcher.launch(VmSpec("vm", "none"), "one", incoming=False)
        _, features = await launcher.probe(world.spec())
        assert features >= REQUIRED_FEATURES


async def test_what_is_launched_runs_or_waits_and_is_told_apart_by_instance(world: World) -> None:
    async with world.daemon() as launcher:
        runs = await launcher.launch(world.spec(), "one", incoming=False)
        waits = await launcher.launch(world.spec("other"), "two", incoming=True)
        assert await runs.run_state() is RunState.RUNNING
        assert await waits.run_state() is RunState.INMIGRATE
        assert (runs.vm, runs.instance) == ("vm", "one")
        assert runs.pid is not None
        assert runs.pid != waits.pid
        assert runs.is_reachable
        for vmm in (runs, waits):
            assert launcher.is_managed(vmm)
            assert launcher.spec_of(vmm) == world.spec(vmm.vm)
            with pytest.raises(Conflict):
                await launcher.launch(world.spec(vmm.vm), vmm.instance, incoming=True)
        assert await launcher.find() == []
        for vmm in (runs, waits):
            await vmm.quit()
            assert vmm.is_dead
            await launcher.forget(vmm)


async def test_a_start_that_fails_is_a_death_with_its_reason_and_leaves_nothing(
    world: World,
) -> None:
    world.break_starts()
    async with world.daemon() as launcher:
        with pytest.raises(VmmDied, match="no such luck"):
            await launcher.launch(world.spec(), "one", incoming=True)
        assert await launcher.find() == []
        with pytest.raises(VmmDied, match="no such luck"):
            await launcher.launch(world.spec(), "one", incoming=True)


async def test_the_next_daemon_finds_what_lives_once_and_what_died_as_dead(world: World) -> None:
    async with world.daemon() as launcher:
        vmm = await launcher.launch(world.spec(), "one", incoming=False)
    async with world.daemon() as launcher:
        [found] = await launcher.find()
        assert (found.vm, found.instance, found.pid) == ("vm", "one", vmm.pid)
        assert not found.is_dead
        assert await found.run_state() is RunState.RUNNING
        assert launcher.spec_of(found) == world.spec()
        assert launcher.is_managed(found)
        assert await launcher.find() == []
        with pytest.raises((Conflict, AssertionError)):
            await launcher.forget(found)
        assert not found.is_dead
    world.kill(found)
    async with world.daemon() as launcher:
        [found] = await launcher.find()
        await seen_dead(found)
        with pytest.raises(VmmDied):
            await found.run_state()
        await launcher.forget(found)
        assert launcher.last_words(found) == ""
    async with world.daemon() as launcher:
        assert await launcher.find() == []


async def test_a_death_under_the_daemon_is_seen_and_its_name_can_be_forgotten(world: World) -> None:
    async with world.daemon() as launcher:
        vmm = await launcher.launch(world.spec(), "one", incoming=False)
        world.kill(vmm)
        await seen_dead(vmm)
        with pytest.raises(VmmDied):
            await vmm.run_state()
        await vmm.quit()
        await launcher.forget(vmm)
        assert await launcher.find() == []


async def test_what_others_launched_is_found_and_is_not_managed(world: World) -> None:
    async with world.daemon() as launcher, world.others_launch("theirs"):
        async with asyncio.timeout(10):
            while not (found := await launcher.find()):  # noqa: ASYNC110 - a directory is looked at
                await asyncio.sleep(0.01)
        [vmm] = found
        assert (vmm.vm, vmm.is_dead) == ("theirs", False)
        assert not launcher.is_managed(vmm)
        assert launcher.spec_of(vmm) == VmSpec("theirs", None)
        assert await launcher.find() == []
        await vmm.quit()
        assert vmm.is_dead
        await launcher.forget(vmm)
