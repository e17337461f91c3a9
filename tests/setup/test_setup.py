"""deploy/setup, with a made-up machine around it: which commands there are decides what it does."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PLAIN_TOOLS = ("sh", "dirname", "cat", "tr", "mktemp", "tail", "rm", "mkdir", "cmp", "sha256sum")


class Machine:
    """A PATH of our own, and a checkout in which the set-up can do its work."""

    def __init__(self, directory: Path) -> None:
        self.bin = directory / "bin"
        self.checkout = directory / "checkout"
        self.bin.mkdir()
        for tool in PLAIN_TOOLS:
            self.bin.joinpath(tool).symlink_to(shutil.which(tool) or pytest.fail(tool))
        (self.checkout / "deploy").mkdir(parents=True)
        script = (ROOT / "deploy" / "setup").read_text()
        assert "PATH=$PATH:/usr/sbin:/sbin" in script
        script = script.replace("PATH=$PATH:/usr/sbin:/sbin", "PATH=$PATH")  # nothing but ours
        (self.checkout / "deploy" / "setup").write_text(script)
        for name in ("pyproject.toml", "requirements.lock", "requirements-dev.lock"):
            shutil.copy(ROOT / name, self.checkout)
        self.command("id", "echo 0")
        self.command("python3", f'exec {sys.executable} "$@"')

    def command(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def with_everything(self) -> None:
        for name in ("qemu-system-x86_64", "as", "ld"):
            self.command(name, "exit 0")

    def set_up(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.bin), "HOME": os.environ.get("HOME", "/")}
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
    assert missing.split() == ["qemu-system-x86", "binutils", "iproute2", "util-linux", "git"]
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
    assert (done.returncode, done.stderr) == (2, "usage: sh deploy/setup [--tests]\n")
