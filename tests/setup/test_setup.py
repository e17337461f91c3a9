"""deploy/setup, with a made-up machine around it: which commands there are decides what it does."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
HEADER = "/usr/include/gelf.h"
C_SOURCES = ("migrd/core/_bits.c", "migrd/core/_bits_words.h")
SOURCES = (
    *("pyproject.toml", "setup.py", "requirements.lock", "requirements-dev.lock"),
    *C_SOURCES,
)
PLAIN_TOOLS = ("sh", "dirname", "cat", "tr", "mktemp", "tail", "rm", "mkdir", "cmp", "sha256sum")


class Machine:
    """A PATH of our own, and a checkout in which the set-up can do its work."""

    def __init__(self, directory: Path) -> None:
        self.bin = directory / "bin"
        self.checkout = directory / "checkout"
        self.header = directory / "gelf.h"
        self.bin.mkdir()
        for tool in PLAIN_TOOLS:
            self.bin.joinpath(tool).symlink_to(shutil.which(tool) or pytest.fail(tool))
        (self.checkout / "deploy").mkdir(parents=True)
        script = (ROOT / "deploy" / "setup").read_text()
        assert "PATH=$PATH:/usr/sbin:/sbin" in script
        assert HEADER in script
        script = script.replace("PATH=$PATH:/usr/sbin:/sbin", "PATH=$PATH")  # nothing but ours
        script = script.replace(HEADER, str(self.header))
        (self.checkout / "deploy" / "setup").write_text(script)
        (self.checkout / "migrd" / "core").mkdir(parents=True)
        for name in SOURCES:
            shutil.copy(ROOT / name, self.checkout / name)
        self.command("id", "echo 0")
        self.command("python3", f'exec {sys.executable} "$@"')
        self.pip_calls = directory / "pip"

    def command(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def with_everything(self) -> None:
        for name in ("qemu-system-x86_64", "as", "ld"):
            self.command(name, "exit 0")

    def with_fake_environments(self) -> None:
        """`python3 -m venv` makes an environment whose pip only notes what it is asked for."""
        self.with_everything()
        pip = f'case "$*" in *" install "*) echo "$@" >>{self.pip_calls};; esac'
        make = f"mkdir -p $3/bin; touch $3/bin/migrd; cp {self.bin}/pip $3/bin/python"
        self.command("pip", pip)
        for tool in ("touch", "cp", "chmod"):
            self.bin.joinpath(tool).symlink_to(shutil.which(tool) or pytest.fail(tool))
        self.command(
            "python3",
            f'case "$2" in venv) {make}; chmod +x $3/bin/*;; *) exec {sys.executable} "$@";; esac',
        )

    def installed(self) -> list[str]:
        """What pip was asked to install since the last time."""
        calls = self.pip_calls.read_text().splitlines() if self.pip_calls.exists() else []
        self.pip_calls.unlink(missing_ok=True)
        return [call.split()[-1] for call in calls]

    def set_up(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.bin), "HOME": str(self.bin), "TMPDIR": str(self.bin)}
        return subprocess.run(
            ["sh", str(self.checkout / "deploy" / "setup"), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_root_it_lists_exactly_what_is_missing_and_touches_nothing(
    machine: Machine,
) -> None:
    machine.command("id", "echo 1000")
    done = machine.set_up("--tests")
    assert done.returncode == 1
    missing = done.stderr.partition("(names of Debian packages): ")[2].partition("- install")[0]
    assert missing.split() == [
        *("qemu-system-x86", "binutils", "iproute2", "util-linux", "git"),
        *("flex", "bison", "bc", "make", "gcc", "xz-utils", "libelf-dev"),
    ]
    assert not (machine.checkout / ".venv").exists()


def test_only_what_is_missing_is_installed(machine: Machine) -> None:
    machine.with_everything()
    (machine.bin / "ld").unlink()
    (machine.bin / "env").symlink_to(shutil.which("env") or pytest.fail("env"))
    machine.command("apt-get", f'echo "$@" >>{machine.bin}/called')
    done = machine.set_up()
    assert done.returncode == 1
    assert "still missing after installing: binutils" in done.stderr
    assert machine.bin.joinpath("called").read_text().splitlines() == [
        "-q update",
        "-q install -y --no-install-recommends binutils",
    ]


def test_a_package_that_cannot_be_installed_ends_it_with_apts_own_words(
    machine: Machine,
) -> None:
    machine.command("apt-get", "echo E: the mirror is on fire; exit 100")
    done = machine.set_up()
    assert done.returncode == 1
    assert "E: the mirror is on fire" in done.stderr


def test_an_old_python_is_refused_by_name(machine: Machine) -> None:
    machine.with_everything()
    machine.command(
        "python3", 'case "$*" in *version_info*) exit 1;; --version) echo Python 3.9;; esac'
    )
    done = machine.set_up()
    assert done.returncode == 1
    assert "Python 3.9 is too old" in done.stderr


def test_a_wrong_argument_shows_the_usage(machine: Machine) -> None:
    done = machine.set_up("--nonesuch")
    usage = "usage: sh deploy/setup [--tests | --without-qemu]\n"
    assert (done.returncode, done.stderr) == (2, usage)


def test_the_direct_engine_needs_no_qemu_and_no_root(machine: Machine) -> None:
    machine.with_fake_environments()
    for tool in ("qemu-system-x86_64", "as", "ld"):
        (machine.bin / tool).unlink()
    machine.command("id", "echo 1000")
    assert machine.set_up().returncode == 1
    done = machine.set_up("--without-qemu")
    assert done.returncode == 0, done.stderr
    assert machine.installed() == ["requirements.lock", "."]


def test_the_environment_is_made_once_and_again_only_when_a_lock_changes(
    machine: Machine,
) -> None:
    machine.with_fake_environments()
    done = machine.set_up()
    assert done.returncode == 0, done.stderr
    assert machine.installed() == ["requirements.lock", "."]
    machine.set_up()
    assert machine.installed() == []
    with (machine.checkout / "requirements.lock").open("a") as lock:
        lock.write("# changed\n")
    machine.set_up()
    assert machine.installed() == ["requirements.lock", "."]


@pytest.mark.parametrize("source", C_SOURCES)
def test_a_changed_c_source_is_built_anew_and_no_old_binary_stays(
    machine: Machine, source: str
) -> None:
    machine.with_fake_environments()
    machine.set_up()
    machine.installed()
    binary = machine.checkout / "migrd" / "core" / "_bits.abi3.so"
    binary.touch()
    machine.set_up()
    assert (machine.installed(), binary.exists()) == ([], True)
    with (machine.checkout / source).open("a") as code:
        code.write("/* changed */\n")
    machine.set_up()
    assert (machine.installed(), binary.exists()) == (["requirements.lock", "."], False)


def test_an_environment_for_the_tests_serves_the_demo_too_but_not_the_other_way_round(
    machine: Machine,
) -> None:
    machine.with_fake_environments()
    for tool in ("ip", "tc", "unshare", "git", "flex", "bison", "bc", "make", "gcc", "xz"):
        machine.command(tool, "exit 0")
    machine.header.touch()
    machine.set_up()
    machine.installed()
    assert machine.set_up("--tests").returncode == 0
    assert machine.installed() == ["requirements.lock", "requirements-dev.lock", "."]
    machine.set_up()
    assert machine.installed() == []


def test_an_environment_that_was_not_finished_is_finished_next_time(machine: Machine) -> None:
    machine.with_fake_environments()
    working = (machine.bin / "pip").read_text()
    machine.command("pip", "exit 1")
    done = machine.set_up()
    assert done.returncode == 1
    assert "pip could not install" in done.stderr
    (machine.bin / "pip").write_text(working)
    assert machine.set_up().returncode == 0
    assert machine.installed() == ["requirements.lock", "."]
