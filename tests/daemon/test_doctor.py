"""The doctor: a sound host is called sound, each thing that is wrong is found with its cure, and
looking changes nothing."""

import asyncio
import json
import os
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from migrd.cli.main import build
from migrd.doctor import kernel, software, storage
from migrd.doctor.command import doctor
from migrd.doctor.examination import examine
from migrd.doctor.finding import Check, Found, Status, ok, run_check
from migrd.journal.sqlite import open_journal
from tests.daemon.hosts import Host, bad


def tree(root: Path) -> dict[str, tuple[int, int, int]]:
    return {
        str(path): (s := path.lstat(), (s.st_mode, s.st_size, s.st_mtime_ns))[1]
        for path in sorted(root.rglob("*"))
    }


# The whole


async def test_a_sound_host_is_called_sound_and_looking_changes_nothing(
    host: Host, qemu_binary: Path
) -> None:
    host.profile(str(qemu_binary))
    config = await asyncio.to_thread(lambda: host.config)
    async with open_journal(host.root / "state" / "journal.db"):
        pass
    before = tree(host.root)
    findings = await examine(config, {})
    assert tree(host.root) == before
    assert [f for f in bad(findings) if f.name != "clock"] == []  # the machine's clock is its own
    names = [finding.name for finding in findings]
    assert names[:2] == ["configuration", "python"]
    assert f"qemu {qemu_binary}" in names
    for wanted in (
        "launch profiles", "state directory", "runtime directory", "journal", "address",
        "api tokens", "peer certificates", "migration certificates", "peers", "kvm",
        "iommu and vfio", "postcopy", "memory", "open files", "clock",
    ):  # fmt: skip
        assert wanted in names


async def test_with_a_wrong_configuration_the_rest_is_still_looked_at(tmp_path: Path) -> None:
    config = tmp_path / "migrd.toml"
    config.write_text("[host]\nnam = 1\n[log]\nlevel = 3\n")
    findings = await examine(config, {})
    assert findings[0].status is Status.FAIL
    assert "host.nam is not a setting" in findings[0].message
    assert f"migrd config check --config {config}" in findings[0].cure
    assert {"python", "kvm", "memory"} <= {finding.name for finding in findings}


async def test_every_finding_that_is_not_ok_says_what_to_do(host: Host) -> None:
    host.profile("/nonexistent/qemu")
    host.more = '[peers.host-b]\nurl = "https://127.0.0.1:1"\n'
    host.token.write_text("short")
    (host.root / "tls" / "client-key.pem").unlink()
    findings = await examine(await asyncio.to_thread(lambda: host.config), {})
    assert len(bad(findings)) >= 4
    for finding in bad(findings):
        assert finding.cure, finding


async def test_a_check_that_hangs_is_a_finding_and_does_not_hold_the_others_up() -> None:
    release = threading.Event()

    def hang() -> Found:
        release.wait(30)
        return ok("x", "late")

    begun_s = time.monotonic()
    (finding,) = await run_check(Check("storage", blocking=hang, deadline_s=0.1))
    assert time.monotonic() - begun_s < 5
    assert finding.status is Status.FAIL
    assert "no answer within 0.1 s" in finding.message
    release.set()


async def test_a_defect_in_a_check_is_a_finding() -> None:
    def defect() -> Found:
        raise LookupError("planted")

    async def waiting_defect() -> Found:
        raise LookupError("planted")

    for check in (Check("x", blocking=defect), Check("x", waiting=waiting_defect)):
        (finding,) = await run_check(check)
        assert finding.status is Status.WARN
        assert "LookupError: planted" in finding.message


# The command


def test_the_command_prints_findings_with_cures_and_its_exit_code_says_how_bad(
    host: Host,
) -> None:
    host.profile("/nonexistent/qemu")
    program = build([doctor])
    told = CliRunner().invoke(program, ["doctor", "--config", str(host.config)])
    assert told.exit_code == 1
    assert "/nonexistent/qemu" in told.stdout
    assert "do: apt-get install qemu-system-x86" in told.stdout
    told = CliRunner().invoke(program, ["doctor", "--config", str(host.config), "-o", "json"])
    answer = json.loads(told.stdout)
    assert answer["ok"] is False
    failed = [item["name"] for item in answer["items"] if item["status"] == "fail"]
    assert failed == ["qemu /nonexistent/qemu"]


# Software


def test_an_old_python_is_refused() -> None:
    assert software.look_at_python((3, 10, 1)).status is Status.FAIL
    assert software.look_at_python().status is Status.OK


@pytest.mark.parametrize("binary", ["/nonexistent/qemu", "/bin/true", "/etc/passwd"])
def test_what_is_no_qemu_is_named_with_what_to_install(host: Host, binary: str) -> None:
    host.profile(binary)
    (finding,) = bad(software.look_at_profiles(host.settings()))
    assert finding.status is Status.FAIL
    assert binary in finding.name
    assert "apt-get install qemu-system-x86" in finding.cure


def test_a_qemu_that_lacks_what_is_required_is_refused_by_its_features(
    host: Host, monkeypatch: pytest.MonkeyPatch, qemu_binaries: dict[str, Path]
) -> None:
    from migrd.core.facts import Feature

    host.profile(str(qemu_binaries["7.2"]))
    monkeypatch.setattr(software, "REQUIRED_FEATURES", frozenset({Feature.SWITCHOVER_ACK}))
    (finding,) = bad(software.look_at_profiles(host.settings()))
    assert finding.status is Status.FAIL
    assert "lacks what migrd needs: switchover_ack" in finding.message


def test_profiles_that_are_wrong_or_not_there_are_told(host: Host) -> None:
    (none,) = bad(software.look_at_profiles(host.settings()))
    assert none.status is Status.WARN
    (host.root / "profiles" / "odd.toml").write_text("binary = 1\n")
    (wrong,) = bad(software.look_at_profiles(host.settings()))
    assert wrong.status is Status.FAIL
    assert "odd.toml" in wrong.message


# Storage


def test_a_directory_that_will_be_made_is_fine_and_is_not_made(tmp_path: Path) -> None:
    assert bad(storage.look_at_state(tmp_path / "a" / "b")) == []
    assert bad(storage.look_at_runtime(tmp_path / "a" / "b")) == []
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_a_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    assert "is no directory" in storage.look_at_state(tmp_path / "state" / "x").message


def test_a_directory_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = storage.look_at_state(Path("/proc/sys/kernel"))  # not even root makes files there
    assert finding.status is Status.FAIL
    monkeypatch.setattr(os, "access", lambda *_: False)
    finding = storage.look_at_runtime(tmp_path)
    assert finding.status is Status.FAIL
    assert finding.cure.startswith("install -d")


@pytest.mark.parametrize(
    ("kind", "status"), [("tmpfs", Status.WARN), ("nfs4", Status.FAIL), ("ext4", Status.OK)]
)
def test_the_file_system_of_the_journal_matters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, status: Status
) -> None:
    monkeypatch.setattr(storage, "file_system_of", lambda _: kind)
    assert storage.look_at_state(tmp_path).status is status


def test_the_kind_of_a_file_system_comes_from_the_kernel(tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        f"1 1 0:0 / /x rw - proc proc rw\n"
        f"2 1 {os.major(device)}:{os.minor(device)} / / rw,relatime shared:1 - xfs /dev/x rw\n"
    )
    assert storage.file_system_of(tmp_path, mounts) == "xfs"
    assert storage.file_system_of(tmp_path, tmp_path / "none") == ""


def test_a_slow_disk_and_a_full_one_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as slow:
        slow.setattr(storage, "_fsync_s", lambda _: 0.5)
        assert "fsync 500.0 ms" in storage.look_at_state(tmp_path).message
        assert storage.look_at_state(tmp_path).status is Status.WARN
    monkeypatch.setattr(storage, "LEAST_FREE_BYTES", 1 << 62)
    assert storage.look_at_state(tmp_path).cure.startswith("make room")


async def test_a_journal_is_tried_on_a_copy(short_tmp_path: Path) -> None:
    path = short_tmp_path / "journal.db"
    assert "will be made" in (await asyncio.to_thread(storage.look_at_journal, path)).message
    async with open_journal(path):
        finding = await asyncio.to_thread(storage.look_at_journal, path)
        assert finding.status is Status.OK
        assert "in use" in finding.message
    before = tree(short_tmp_path)
    finding = await asyncio.to_thread(storage.look_at_journal, path)
    assert (finding.status, finding.message) == (Status.OK, f"{path}: 0 VMs, 0 migrations")
    assert tree(short_tmp_path) == before


async def test_a_damaged_and_a_missing_journal_are_told_and_left_alone(
    short_tmp_path: Path,
) -> None:
    path = short_tmp_path / "journal.db"
    async with open_journal(path):
        pass
    whole = path.read_bytes()
    path.write_bytes(b"\0" * len(whole))
    before = tree(short_tmp_path)
    finding = await asyncio.to_thread(storage.look_at_journal, path)
    assert finding.status is Status.FAIL
    assert "/migrd-doctor-" not in finding.message, "the copy is nobody's business"
    assert "no older copy" in finding.cure
    assert tree(short_tmp_path) == before
    path.unlink()
    finding = await asyncio.to_thread(storage.look_at_journal, path)
    assert finding.status is Status.FAIL
    assert "is gone" in finding.message
    assert "no older copy" in finding.cure


# Kernel


def test_kvm_matters_only_where_a_profile_wants_it(tmp_path: Path) -> None:
    missing = tmp_path / "kvm"
    assert kernel.look_at_kvm(False, missing).status is Status.OK
    assert kernel.look_at_kvm(True, missing).status is Status.FAIL
    missing.write_text("")  # something else of that name
    finding = kernel.look_at_kvm(True, missing)
    assert finding.status is Status.FAIL
    assert "makes no VM" in finding.message


def test_a_profile_under_kvm_is_what_wants_it(host: Host) -> None:
    host.profile("/usr/bin/qemu-system-x86_64", "tcg")
    assert not kernel._wants_kvm(host.settings())
    host.profile("/usr/bin/qemu-system-x86_64", "kvm")
    assert kernel._wants_kvm(host.settings())


@pytest.mark.parametrize(
    ("switch", "uid", "wanted", "status"),
    [
        (None, 0, True, Status.WARN),
        (None, 0, False, Status.OK),
        ("0", 0, True, Status.OK),
        ("0", 1000, True, Status.WARN),
        ("0", 1000, False, Status.OK),
        ("1", 1000, True, Status.OK),
    ],
)
def test_userfaultfd_matters_where_postcopy_is_wanted(
    tmp_path: Path, switch: str | None, uid: int, wanted: bool, status: Status
) -> None:
    (tmp_path / "proc/sys/vm").mkdir(parents=True)
    if switch is not None:
        (tmp_path / "proc/sys/vm/unprivileged_userfaultfd").write_text(f"{switch}\n")
    assert kernel.look_at_userfaultfd(wanted, tmp_path, uid).status is status


def test_a_host_without_memory_and_one_without_descriptors_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 1048576 kB\nMemAvailable: 1024 kB\nHugePages_Total: 0\n")
    finding = kernel.look_at_memory(meminfo)
    assert (finding.status, finding.message) == (Status.WARN, "1 MiB available of 1024 MiB")
    monkeypatch.setattr("resource.getrlimit", lambda _: (256, 1024))
    assert "LimitNOFILE" in kernel.look_at_open_files().cure


@pytest.mark.parametrize(
    ("now_s", "is_synchronised", "status"),
    [(1e9, True, Status.FAIL), (2e9, False, Status.WARN), (2e9, True, Status.OK)],
)
def test_a_clock_that_is_wrong_or_alone_is_told(
    monkeypatch: pytest.MonkeyPatch, now_s: float, is_synchronised: bool, status: Status
) -> None:
    monkeypatch.setattr("migrd.doctor.kernel.time.time", lambda: now_s)
    monkeypatch.setattr(kernel, "_is_synchronised", lambda: is_synchronised)
    (finding,) = kernel.look_at_clock()
    assert finding.status is status
