"""The unit file and its companions, judged by systemd's own tools and by what must not change.

The machine's systemd is used where it has one; elsewhere its package is unpacked, not installed.
"""

import shutil
import subprocess
from pathlib import Path

from migrd.config import Settings
from migrd.config.sources import CREDENTIALS
from tests.setup import debian

DEPLOY = Path(__file__).parents[2] / "deploy"
UNIT = DEPLOY / "migrd.service"
LIBRARIES = "usr/lib/x86_64-linux-gnu"


PROGRAMS = {  # where bookworm's package has them
    "systemd-analyze": "usr/bin/systemd-analyze",
    "systemd-sysusers": "bin/systemd-sysusers",
    "systemd-tmpfiles": "bin/systemd-tmpfiles",
}


def systemd_tool(name: str) -> str:
    """systemd-analyze or one of its siblings. Raises debian.SetUpError when it cannot be had."""
    found = shutil.which(name)
    if found is not None:
        return found
    return str(
        debian.unpacked(
            debian.Bundle(
                name=name,
                packages=("systemd",),
                program=PROGRAMS[name],
                environment=(
                    ("LD_LIBRARY_PATH", f"{{root}}/{LIBRARIES}/systemd:{{root}}/{LIBRARIES}"),
                    ("SYSTEMD_UNIT_PATH", "{root}/lib/systemd/system:"),
                ),
            )
        )
    )


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def service() -> dict[str, list[str]]:
    """Every assignment of [Service], in order; systemd allows a key more than once."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in UNIT.read_text().splitlines():
        if line.startswith("["):
            section = line
        elif section == "[Service]" and "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    # verify wants the program to be there; it is installed by the package, not by the tests
    unit.write_text(UNIT.read_text().replace("=/usr/bin/migrd ", "=/bin/true "))
    told = run(systemd_tool("systemd-analyze"), "verify", "--man=no", str(unit))
    assert (told.returncode, told.stderr) == (0, "")


def test_a_wrong_key_in_the_unit_would_be_seen(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    planted = UNIT.read_text().replace("=/usr/bin/migrd ", "=/bin/true ")
    unit.write_text(planted.replace("KillMode=process", "KillMod=process"))
    told = run(systemd_tool("systemd-analyze"), "verify", "--man=no", str(unit))
    assert "KillMod" in told.stderr


def test_guests_survive_a_restart_of_the_unit_and_an_upgrade() -> None:
    unit = service()
    assert unit["KillMode"] == ["process"]
    assert unit["RuntimeDirectoryPreserve"] == ["yes"]
    assert unit["OOMPolicy"] == ["continue"]


def test_the_unit_leaves_qemu_what_a_guest_needs() -> None:
    unit = service()
    for forbidden in ("MemoryDenyWriteExecute", "PrivateDevices", "ProtectClock", "DeviceAllow"):
        assert forbidden not in unit
    assert unit["LimitMEMLOCK"] == ["infinity"]
    assert unit["TasksMax"] == ["infinity"]


def test_the_daemon_tells_systemd_and_is_watched() -> None:
    unit = service()
    assert unit["Type"] == ["notify"]
    assert unit["WatchdogSec"] == ["30s"]
    assert unit["Restart"] == ["on-failure"]


def test_the_unit_and_the_settings_mean_the_same_directories() -> None:
    unit, host = service(), Settings().host
    assert [f"/run/{name}" for name in unit["RuntimeDirectory"]] == [str(host.runtime_dir)]
    assert [f"/var/lib/{name}" for name in unit["StateDirectory"]] == [str(host.state_dir)]
    assert f"/etc/{unit['ConfigurationDirectory'][0]}" == str(host.profiles_dir.parent)


def test_every_credential_that_the_settings_know_is_loaded_and_may_be_missing() -> None:
    loaded = dict(line.split(":") for line in service()["LoadCredential"])
    assert set(loaded) == set(CREDENTIALS)
    for name, source in loaded.items():
        assert source == f"migrd.{name}", "an absolute path would have to exist"


def test_the_user_of_the_unit_is_made_with_its_groups(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    told = run(
        systemd_tool("systemd-sysusers"), f"--root={tmp_path}", str(DEPLOY / "migrd.sysusers")
    )
    assert told.returncode == 0, told.stderr
    users = (tmp_path / "etc/passwd").read_text()
    groups = (tmp_path / "etc/group").read_text()
    assert users.startswith("migrd:")
    assert "/nologin" in users
    assert "kvm:" in groups
    assert groups.split("kvm:")[1].splitlines()[0].endswith(":migrd")
    assert service()["User"] == ["migrd"]


def test_the_directories_are_made_with_their_modes(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    run(systemd_tool("systemd-sysusers"), f"--root={tmp_path}", str(DEPLOY / "migrd.sysusers"))
    told = run(
        systemd_tool("systemd-tmpfiles"),
        f"--root={tmp_path}",
        "--create",
        str(DEPLOY / "migrd.tmpfiles"),
    )
    assert told.returncode == 0, told.stderr
    modes = {
        name: f"{(tmp_path / name).stat().st_mode & 0o777:04o}"
        for name in (
            "etc/migrd",
            "etc/migrd/profiles",
            "etc/migrd/tls",
            "run/migrd",
            "var/lib/migrd",
        )
    }
    assert modes == {
        "etc/migrd": "0755",
        "etc/migrd/profiles": "0755",
        "etc/migrd/tls": "0750",
        "run/migrd": "0750",
        "var/lib/migrd": "0700",
    }
