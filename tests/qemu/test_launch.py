"""Launching real QEMUs, and everything that can go wrong at a start."""

import asyncio
import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrd.core.facts import REQUIRED_FEATURES, RunState, VmSpec
from migrd.errors import ConfigError, Conflict, Invalid, NotFound, VmmDied
from migrd.qemu.instances import Instance, LaunchRecord
from migrd.qemu.launch import QemuLauncher
from migrd.qemu.profile import TCG_EXTRA_KIB
from migrd.qemu.profile_files import Profiles
from tests.qemu.hosts import Host, host_of, machine_of, until


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


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def children() -> set[int]:
    """Our children, zombies included."""
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


# Starting


async def test_a_launched_guest_runs_and_is_fully_recorded(each_host: Host) -> None:
    host = each_host
    async with host.daemon() as launcher:
        vmm = await launcher.launch(host.spec(), "one", incoming=False)
        assert (vmm.vm, vmm.instance, vmm.is_dead, vmm.is_reachable) == ("vm", "one", False, True)
        facts = await vmm.facts()
        assert facts.is_running
        assert facts.machine_type == "pc-i440fx-7.2"
        assert facts.memory_bytes == (64 << 20) + TCG_EXTRA_KIB * 1024
        assert facts.features >= REQUIRED_FEATURES
        await until(lambda: host.heartbeats(vmm) >= 3, "the guest counts on its serial line")
        record = host.record(vmm)
        assert record["process"]["pid"] == vmm.pid
        assert (record["vm"], record["profile"], record["incoming"]) == ("vm", "lab", False)
        assert record["digest"] == await asyncio.to_thread(launcher.check, host.spec())
        assert stat.S_IMODE(host.directory(vmm).stat().st_mode) == 0o700
        for name in ("qmp.sock", "oob.sock", "stderr.log", "serial.log"):
            mode = (host.directory(vmm) / name).stat().st_mode
            assert not mode & 0o077, f"{name} is open to others: {stat.filemode(mode)}"
        assert launcher.is_managed(vmm)
        assert launcher.spec_of(vmm) == host.spec()
        assert launcher.serial_path(vmm) == str(host.directory(vmm) / "serial.log")
        await vmm.quit()
        await launcher.forget(vmm)
        await launcher.forget(vmm)
        assert not host.directory(vmm).parent.exists()


async def test_a_destination_waits_for_a_guest_and_runs_nothing(each_host: Host) -> None:
    async with each_host.daemon() as launcher:
        vmm = await launcher.launch(each_host.spec(), "one", incoming=True)
        assert await vmm.run_state() is RunState.INMIGRATE
        assert each_host.heartbeats(vmm) == 0
        argv = each_host.record(vmm)["argv"]
        assert argv[-3:] == ["-S", "-incoming", "defer"]
        await vmm.quit()
        await launcher.forget(vmm)


async def test_a_qemu_shares_nothing_with_the_daemon_that_launched_it(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIGRD_TOKEN", "secret")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/x")
    with (host.root / "ours").open("w") as ours:
        os.set_inheritable(ours.fileno(), True)
        async with host.daemon() as launcher:
            vmm = await launcher.launch(host.spec(), "one", incoming=False)
            own = Path(f"/proc/{vmm.pid}")
            assert vmm.pid is not None
            assert os.getsid(vmm.pid) == os.getpgid(vmm.pid) == vmm.pid
            assert os.readlink(own / "cwd") == "/"
            environment = (own / "environ").read_bytes().split(b"\0")
            names = {line.partition(b"=")[0] for line in environment if line}
            assert names <= {b"PATH", b"TMPDIR", b"TZ", b"LC_ALL"}
            links = [os.readlink(fd) for fd in (own / "fd").iterdir()]
            assert not any("ours" in link or "epoll" in link for link in links if "/" in link)
            assert os.readlink(own / "fd" / "0") == "/dev/null"
            await vmm.quit()
            await launcher.forget(vmm)


async def test_twenty_starts_leave_no_process_no_descriptor_and_no_file(host: Host) -> None:
    async with host.daemon() as launcher:
        await launcher.probe(host.spec())
        fds, before = open_fds(), children()
        for number in range(20):
            vmm = await launcher.launch(host.spec(), f"n{number}", incoming=bool(number % 2))
            await vmm.quit()
            await launcher.forget(vmm)
        assert open_fds() == fds
        assert children() == before
        assert list((host.run / "vms").iterdir()) == []


async def test_a_path_with_a_comma_and_an_equals_sign_reaches_qemu_as_it_is(host: Host) -> None:
    disk = host.firmware / "a,if=none,readonly=off=b.img"
    disk.write_bytes(bytes(1 << 20))
    host.add_profile(
        "disk",
        ('"-bios", "{firmware}"', '"-drive", "file={firmware},if=none,id=d,format=raw"'),
    )
    async with host.daemon() as launcher:
        spec = VmSpec("vm", "disk", {"firmware": disk.name})
        vmm = await launcher.launch(spec, "one", incoming=False)
        blocks = await machine_of(vmm).monitor.execute("query-block")
        assert [block["inserted"]["file"] for block in blocks] == [str(disk)]
        await vmm.quit()
        await launcher.forget(vmm)


async def test_the_shipped_linux_profile_starts_with_every_parameter_filled(host: Host) -> None:
    disks = host.root / "disks"
    disks.mkdir()
    (disks / "web.raw").write_bytes(bytes(1 << 20))
    shipped = Path(__file__).parents[2] / "config" / "profiles" / "linux.toml"
    text = shipped.read_text().replace("/srv/migrd/disks", str(disks))
    text = text.replace("/usr/bin/qemu-system-x86_64", str(host.binary))
    # what a test machine lacks: KVM, a tap device, a file system that can do without its cache
    text = text.replace('accelerator = "kvm"', 'accelerator = "tcg"').replace("cache=none,", "")
    text = text.replace(
        "tap,id=net0,ifname={tap},script=no,downscript=no", "socket,id=net0,listen=:0"
    )
    start = text.index("[parameters.tap]")
    text = text[:start] + text[text.index("[parameters.mac]") :]
    (host.profiles / "linux.toml").write_text(text)
    values: dict[str, int | str] = {
        "memory_mib": 256,
        "disk": "web.raw",
        "mac": "52:54:00:12:34:56",
        "vcpus": 2,
    }
    async with host.daemon() as launcher:
        vmm = await launcher.launch(VmSpec("web", "linux", values), "one", incoming=True)
        assert (await vmm.facts()).machine_type == "pc-q35-7.2"
        assert launcher.serial_path(vmm) is None
        await vmm.quit()
        await launcher.forget(vmm)


# Starts that fail


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo no such luck >&2; exit 3", "exit code 3.*no such luck"),
        ("echo broken >&2; kill -9 $$", "killed by SIGKILL.*broken"),
        ("exit 0", "exit code 0"),
        ('"{binary}" "$@"', "must end in `exec`ing QEMU"),
        ("exec sleep 60", "made no monitor in time"),
    ],
    ids=["fails", "killed", "ends", "forks", "hangs"],
)
async def test_a_qemu_that_does_not_start_is_ended_and_its_last_words_are_told(
    host: Host, script: str, words: str
) -> None:
    path = host.add_script(script.replace("{binary}", str(host.binary)))
    host.add_profile("odd", (str(host.binary), str(path)))
    before, fds = children(), open_fds()
    async with host.daemon(start_deadline_s=2.0) as launcher:
        with pytest.raises(VmmDied, match=f"(?s){words}") as died:
            await launcher.launch(host.spec(profile="odd"), "one", incoming=True)
        assert died.value.code == "vmm_start_failed"
        assert list((host.run / "vms").iterdir()) == []
        assert await launcher.find() == []
    assert children() == before
    assert open_fds() == fds


async def test_a_device_that_qemu_does_not_know_is_told_in_its_words_and_at_once(
    each_host: Host,
) -> None:
    each_host.add_profile("odd", ('"-nodefaults"', '"-nodefaults", "-device", "nonsense"'))
    async with each_host.daemon() as launcher:
        began_s = time.monotonic()
        with pytest.raises(VmmDied, match="'nonsense' is not a valid device model name"):
            await launcher.launch(each_host.spec(profile="odd"), "one", incoming=False)
        assert time.monotonic() - began_s < 5


async def test_a_binary_that_is_not_there_or_no_program_is_told_with_the_cure(host: Host) -> None:
    host.add_profile("none", (str(host.binary), "/usr/bin/none"))
    (host.root / "text").write_text("no program")
    host.add_profile("text", (str(host.binary), str(host.root / "text")))
    (host.root / "junk").write_bytes(b"\x7fELF nonsense")
    (host.root / "junk").chmod(0o755)
    host.add_profile("junk", (str(host.binary), str(host.root / "junk")))
    async with host.daemon() as launcher:
        for name, why in (
            ("none", "No such file or directory"),
            ("text", "Permission denied"),
            ("junk", "Exec format error"),
        ):
            with pytest.raises(VmmDied, match=f"{why}; install QEMU, or mend `binary`") as died:
                await launcher.launch(host.spec(profile=name), "one", incoming=False)
            assert died.value.code == "vmm_not_started"
            with pytest.raises(VmmDied, match="does not run as a QEMU"):
                await launcher.probe(host.spec(profile=name))
        assert list((host.run / "vms").iterdir()) == []
        versions = await launcher.versions()
        assert {name for name, version in versions.items() if version is None} == {
            "none",
            "text",
            "junk",
        }


async def test_a_launch_that_is_cancelled_at_any_time_leaves_nothing(host: Host) -> None:
    async with host.daemon() as launcher:
        before, fds = children(), open_fds()
        for number, after_s in enumerate((0.0, 0.001, 0.003, 0.01, 0.02, 0.03)):
            launch = launcher.launch(host.spec(), f"n{number}", incoming=True)
            task = asyncio.create_task(launch)
            await asyncio.sleep(after_s)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                vmm = await task  # it was faster
                await vmm.quit()
                await launcher.forget(vmm)
        assert children() == before
        assert open_fds() == fds
        assert not list(host.run.glob("vms/*/*"))


async def test_a_full_disk_starts_nothing_or_ends_what_was_started(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, before = LaunchRecord.write, children()
    for good_writes in (0, 1):
        written: list[Instance] = []

        def fill(
            record: LaunchRecord,
            at: Instance,
            written: list[Instance] = written,
            good_writes: int = good_writes,
        ) -> None:
            written.append(at)
            if len(written) > good_writes:
                raise OSError(errno.ENOSPC, "No space left on device", str(at.record_path))
            write(record, at)

        monkeypatch.setattr(LaunchRecord, "write", fill)
        async with host.daemon() as launcher:
            with pytest.raises(VmmDied, match=r"launch\.json: No space left on device"):
                await launcher.launch(host.spec(), "one", incoming=False)
            assert await launcher.find() == []
        assert children() == before
        assert not list(host.run.glob("vms/*/*"))


async def test_a_runtime_directory_that_cannot_be_used_is_told(host: Host) -> None:
    host.run.write_text("no directory")
    async with host.daemon() as launcher:
        with pytest.raises(VmmDied, match=r"see to `host.runtime_dir`"):
            await launcher.launch(host.spec(), "one", incoming=False)


async def test_an_instance_is_launched_once(host: Host) -> None:
    async with host.daemon() as launcher:
        vmm = await launcher.launch(host.spec(), "one", incoming=True)
        with pytest.raises(Conflict):
            await launcher.launch(host.spec(), "one", incoming=True)
        async with host.daemon() as other:
            with pytest.raises(Conflict):
                await other.launch(host.spec(), "one", incoming=True)
        assert not vmm.is_dead
        await vmm.quit()
        await launcher.forget(vmm)


async def test_requests_that_are_wrong_start_nothing(host: Host) -> None:
    async with host.daemon() as launcher:
        for spec in (
            VmSpec("../up", "lab", {"firmware": "guest.rom"}),
            VmSpec("vm", "lab", {"firmware": "../p/lab.toml"}),
            VmSpec("v" * 64, "lab", {"firmware": "guest.rom", "memory_mib": "64"}),
            VmSpec("vm", None),
        ):
            with pytest.raises(Invalid):
                await launcher.launch(spec, "one", incoming=False)
        with pytest.raises(Invalid):
            await launcher.launch(host.spec(), "../../up", incoming=False)
        with pytest.raises(NotFound):
            await launcher.launch(host.spec(profile="none"), "one", incoming=False)
        assert not host.run.exists()


def test_a_runtime_directory_with_too_long_a_name_is_refused_before_anything_starts() -> None:
    async def make(path: Path) -> QemuLauncher:
        return QemuLauncher(Profiles(), path)

    for path in (Path("/tmp/" + "x" * 80), Path("run/migrd")):
        with pytest.raises(ConfigError, match=r"host\.runtime_dir"):
            asyncio.run(make(path))
    launcher = asyncio.run(make(Path("/tmp/" + "x" * 45)))
    with pytest.raises(Invalid, match="characters too long") as refused:
        launcher.check(VmSpec("v" * 60, "lab"))
    assert [v.code for v in refused.value.violations] == ["name_too_long"]


async def test_a_binary_is_probed_once_until_it_changes(each_host: Host) -> None:
    counted = each_host.add_script(
        f'echo x >> "{each_host.root}/asked"\nexec "{each_host.binary}" "$@"'
    )
    each_host.add_profile("odd", (str(each_host.binary), str(counted)))
    async with each_host.daemon() as launcher:
        first = await launcher.probe(each_host.spec(profile="odd"))
        assert await launcher.probe(each_host.spec(profile="odd")) == first
        assert first[1] >= REQUIRED_FEATURES
        assert (each_host.root / "asked").read_text() == "x\n"
        os.utime(counted, (1, 1))
        assert await launcher.probe(each_host.spec(profile="odd")) == first
        assert (each_host.root / "asked").read_text() == "x\nx\n"
