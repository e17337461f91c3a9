"""Finding QEMUs again after a restart, and adopting those of others: proof before anything ends."""

import asyncio
import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrd.core.facts import RunState, VmSpec
from migrd.engine.ports import Vmm
from migrd.engine.threads import in_thread
from migrd.errors import Conflict, VmmDied, VmmRefused
from migrd.qemu.launch import QemuLauncher
from tests.lab.leaks import processes_naming
from tests.qemu.hosts import Host, host_of, machine_of, until

LAUNCH_AND_DIE = """
import asyncio, os, sys
from pathlib import Path
from tests.qemu.hosts import Host
from migrd.qemu.launch import QemuLauncher
from migrd.qemu.profile_files import load_profiles

async def main():
    root = Path(sys.argv[1])
    launcher = QemuLauncher(load_profiles(root / "p"), root / "r")
    await launcher.launch(Host.spec(None), "one", incoming=False)
    os._exit(7)

asyncio.run(main())
"""


@pytest.fixture
def host(short_tmp_path: Path, qemu_binaries: dict[str, Path]) -> Iterator[Host]:
    """Profiles and directories of one host with QEMU 7.2."""
    with host_of(short_tmp_path, qemu_binaries["7.2"]) as made:
        yield made


@pytest.fixture
def each_host(short_tmp_path: Path, qemu_binary: Path) -> Iterator[Host]:
    """On QEMU 7.2, and again on QEMU 10."""
    with host_of(short_tmp_path, qemu_binary) as made:
        yield made


@contextlib.contextmanager
def sleeping() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with any of this."""
    with subprocess.Popen(["sleep", "60"]) as stranger:
        yield stranger
        stranger.kill()


async def launched_by_another(host: Host) -> None:
    """A daemon in another process launches "one", and dies at once."""
    argv = [sys.executable, "-c", LAUNCH_AND_DIE, str(host.root)]
    died = await in_thread(subprocess.run, argv, timeout=60)
    assert died.returncode == 7


# After a restart


async def test_a_guest_outlives_its_daemon_and_the_next_one_finds_it(each_host: Host) -> None:
    host = each_host
    await launched_by_another(host)
    async with host.daemon() as launcher:
        [vmm] = await launcher.find()
        assert (vmm.vm, vmm.instance, vmm.is_dead, vmm.is_reachable) == ("vm", "one", False, True)
        assert launcher.spec_of(vmm) == host.spec()
        assert launcher.is_managed(vmm)
        assert launcher.serial_path(vmm) == str(host.directory(vmm) / "serial.log")
        assert await vmm.run_state() is RunState.RUNNING
        beats = host.heartbeats(vmm)
        await until(lambda: host.heartbeats(vmm) > beats + 2, "the guest goes on")
        assert await launcher.find() == []
        with pytest.raises(Conflict):
            await launcher.forget(vmm)
        await vmm.quit()
        await launcher.forget(vmm)
        assert not host.directory(vmm).exists()


async def test_a_daemon_that_was_killed_before_it_noted_the_process_is_made_up_for(
    host: Host,
) -> None:
    async with host.daemon() as launcher:
        vmm = await launcher.launch(host.spec(), "one", incoming=True)
        record = host.record(vmm)
    identity, record["process"] = record["process"], None
    (host.directory(vmm) / "launch.json").write_text(json.dumps(record))
    async with host.daemon() as launcher:
        [found] = await launcher.find()
        assert found.pid == vmm.pid == identity["pid"]
        assert host.record(found)["process"] == identity
        await found.quit()
        await launcher.forget(found)


@pytest.mark.parametrize("stage", ["mkdir", "log", "intent"])
async def test_a_daemon_that_was_killed_before_the_start_leaves_what_is_proven_dead(
    host: Host, stage: str
) -> None:
    directory = host.run / "vms" / "vm" / "one"
    directory.mkdir(parents=True)
    if stage != "mkdir":
        (directory / "stderr.log").touch()
    if stage == "intent":
        fields = {"version": 1, "vm": "vm", "profile": "lab", "parameters": {}, "instance": "one",
                  "incoming": True, "argv": [], "digest": "", "serial": False,
                  "requested_wall_s": 0.0, "process": None}  # fmt: skip
        (directory / "launch.json").write_text(json.dumps(fields))
    async with host.daemon() as launcher:
        [vmm] = await launcher.find()
        assert vmm.is_dead
        assert launcher.spec_of(vmm).profile == ("lab" if stage == "intent" else None)
        await launcher.forget(vmm)
        assert not directory.exists()


@pytest.mark.parametrize("text", ["", "{garbage", "[1]", '{"version": 99}', '{"version": 1}'])
async def test_a_record_that_cannot_be_read_is_no_proof_of_death(host: Host, text: str) -> None:
    async with host.daemon() as launcher:
        vmm = await launcher.launch(host.spec(), "one", incoming=True)
    (host.directory(vmm) / "launch.json").write_text(text)
    async with host.daemon() as launcher:
        [found] = await launcher.find()
        assert not found.is_dead
        assert found.pid == vmm.pid
        assert launcher.spec_of(found) == VmSpec("vm", None)
        with pytest.raises(Conflict):
            await launcher.forget(found)
        assert host.directory(vmm).exists()
        await found.quit()
        await launcher.forget(found)


async def test_a_record_alone_proves_nothing_and_is_left_alone(host: Host) -> None:
    directory = host.run / "vms" / "vm" / "one"
    directory.mkdir(parents=True)
    (directory / "launch.json").write_text("{garbage")
    (host.run / "vms" / "not ours").mkdir()
    (host.run / "vms" / "not ours" / "x").mkdir()
    async with host.daemon() as launcher:
        [vmm] = await launcher.find()
        assert (vmm.vm, vmm.is_dead, vmm.is_reachable) == ("vm", False, False)
        with pytest.raises(Conflict):
            await launcher.forget(vmm)
        assert directory.exists()


async def test_a_pid_used_again_is_neither_taken_for_the_qemu_nor_killed(host: Host) -> None:
    async with host.daemon() as launcher:
        vmm = await launcher.launch(host.spec(), "one", incoming=True)
        record = host.record(vmm)
        await vmm.quit()
    with sleeping() as stranger:
        record["process"]["pid"] = stranger.pid
        (host.directory(vmm) / "launch.json").write_text(json.dumps(record))
        async with host.daemon() as launcher:
            [found] = await launcher.find()
            assert found.is_dead
            await found.quit()
            await launcher.forget(found)
        assert stranger.poll() is None


async def test_a_wrong_identity_is_no_proof_while_the_log_is_locked(host: Host) -> None:
    async with host.daemon() as launcher:
        vmm = await launcher.launch(host.spec(), "one", incoming=True)
        record = host.record(vmm)
    record["process"]["start_ticks"] -= 1
    (host.directory(vmm) / "launch.json").write_text(json.dumps(record))
    async with host.daemon() as launcher:
        [found] = await launcher.find()
        assert not found.is_dead
        assert found.pid == vmm.pid
        with pytest.raises(Conflict):
            await launcher.forget(found)
        await found.quit()
        await launcher.forget(found)


async def test_a_held_lock_and_no_socket_leave_it_unknown(host: Host) -> None:
    async with host.daemon() as launcher:
        vmm = await launcher.launch(host.spec(), "one", incoming=True)
        record = host.record(vmm)
        await vmm.quit()
    with (host.directory(vmm) / "stderr.log").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # as by a child that QEMU left behind
        assert record["process"]["pid"] == vmm.pid
        async with host.daemon() as launcher:
            [found] = await launcher.find()
            assert not found.is_dead
            assert not found.is_reachable
            with pytest.raises(Conflict):
                await launcher.forget(found)
    async with host.daemon() as launcher:
        [found] = await launcher.find()
        assert found.is_dead
        await launcher.forget(found)


async def test_looking_while_launching_and_forgetting_finds_nothing_twice(host: Host) -> None:
    async with host.daemon() as launcher:
        found: list[Vmm] = []

        async def look() -> None:
            while True:
                found.extend(await launcher.find())

        looking = [asyncio.create_task(look()) for _ in range(2)]
        for number in range(8):
            vmm = await launcher.launch(host.spec(), f"n{number}", incoming=True)
            await vmm.quit()
            await launcher.forget(vmm)
        for task in looking:
            task.cancel()
        await asyncio.wait(looking)
        assert found == []


async def test_a_qemu_that_died_while_no_daemon_ran_is_found_dead_with_its_last_words(
    host: Host,
) -> None:
    async with host.daemon() as launcher:
        vmm = await launcher.launch(host.spec(), "one", incoming=False)
    with (host.directory(vmm) / "stderr.log").open("a") as log:
        log.write("old\n" * 3000 + "out of \x1b[31mluck\n")
    host.end_all()
    await until(lambda: not processes_naming(host.root), "it is gone")
    async with host.daemon() as launcher:
        [found] = await launcher.find()
        assert found.is_dead
        words = launcher.last_words(found)
        assert words.endswith("old\nout of ?[31mluck")
        assert len(words) <= 4096
        await launcher.forget(found)
        assert launcher.last_words(found) == ""
        assert launcher.spec_of(found) == VmSpec("vm", None)
        assert not launcher.is_managed(found)


async def test_a_sigkill_of_qemu_is_seen_within_milliseconds(host: Host) -> None:
    async with host.daemon() as launcher:
        vmm = await launcher.launch(host.spec(), "one", incoming=False)
        process = machine_of(vmm)._process
        before = time.monotonic()
        host.end_all()
        assert await process.wait_dead(within_s=5)
        took_s = time.monotonic() - before
        assert vmm.is_dead
        assert process.ending == "killed by SIGKILL"
        assert str(vmm.pid) not in os.listdir("/proc")
        assert took_s < 0.25, f"{took_s * 1000:.0f} ms"
        with pytest.raises(VmmDied):
            await vmm.run_state()
        await launcher.forget(vmm)


# Adoption


async def find_until(launcher: QemuLauncher, count: int) -> list[Vmm]:
    """Look again and again until `count` QEMUs were found."""
    found: list[Vmm] = []
    async with asyncio.timeout(15):
        while len(found) < count:
            await asyncio.sleep(0.01)
            found += await launcher.find()
    return found


async def test_a_qemu_launched_by_hand_is_adopted_when_it_comes(each_host: Host) -> None:
    host = each_host
    async with host.daemon() as launcher:
        assert await launcher.find() == []
        with host.by_hand("hand") as child:
            await until(lambda: (host.adopt / "hand.oob.qmp").exists(), "its sockets")
            [vmm] = await find_until(launcher, 1)
            assert (vmm.vm, vmm.pid) == ("hand", child.pid)
            assert not launcher.is_managed(vmm)
            assert launcher.spec_of(vmm) == VmSpec("hand", None)
            assert launcher.serial_path(vmm) is None
            assert launcher.last_words(vmm) == ""
            assert await vmm.run_state() is RunState.PRELAUNCH
            assert await launcher.find() == []
            async with host.daemon() as next_one:  # one client per monitor: it waits its turn
                [again] = await next_one.find()
                assert again.instance == vmm.instance
            await launcher.forget(vmm)  # closes the connections, and no more
            assert child.poll() is None
            [vmm] = await launcher.find()
            await vmm.quit()
            assert child.wait(timeout=10) == 0
            assert vmm.is_dead
            await launcher.forget(vmm)
            assert await launcher.find() == []


async def test_an_adopted_qemu_is_never_killed(host: Host) -> None:
    with host.by_hand("hand", has_oob=False) as child:
        await until(lambda: (host.adopt / "hand.qmp").exists(), "its socket")
        async with host.daemon() as launcher:
            [vmm] = await find_until(launcher, 1)
            await machine_of(vmm).monitor.close()  # it can no longer be asked
            with pytest.raises(VmmRefused, match="never killed from here"):
                await vmm.quit()
        assert child.poll() is None


async def test_left_over_sockets_odd_names_and_rivals_are_not_adopted(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("stale.qmp", "bad name.qmp", "-x.qmp"):
        with socket.socket(socket.AF_UNIX) as plain:
            plain.bind(str(host.adopt / name))
    (host.adopt / "file.qmp").write_text("")
    (host.adopt / "dangling.qmp").symlink_to("nowhere")
    async with host.daemon() as launcher:
        vmm = await launcher.launch(host.spec("hand"), "one", incoming=True)
        (host.adopt / "twice.qmp").symlink_to(host.directory(vmm) / "qmp.sock")
        with host.by_hand("hand"):
            await until(lambda: (host.adopt / "hand.oob.qmp").exists(), "its sockets")
            for _ in range(3):
                assert await launcher.find() == []
                await asyncio.sleep(0.05)
        assert "migrd itself launched a VM named hand" in caplog.text
        assert "'bad name' is no name for a VM" in caplog.text
        assert caplog.text.count("'bad name'") == 1
        await vmm.quit()
        await launcher.forget(vmm)
    for path in host.adopt.iterdir():
        path.unlink()


async def test_a_directory_for_adoption_that_is_not_there_is_told_once(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    host.adopt.rmdir()
    async with host.daemon() as launcher:
        assert await launcher.find() == []
        assert await launcher.find() == []
    assert caplog.text.count("no VM is adopted") == 1
