"""Programs from Debian packages, unpacked into the cache and never installed.

The tests need a second QEMU, promtool, etcd, a newer Linux' headers and a compiler for arm64.
Installing them would replace the machine's own QEMU or headers, start services, or leave
entries in its package sources, so they are unpacked:

    the machine's sources --(which mirror carries bookworm?)--> private apt root
    private apt root --(apt resolves what this machine lacks)--> *.deb
    *.deb --(dpkg-deb -x)--> cache/<bundle>/root --(wrapper)--> one executable path

Rules:
1. No host name stands here. The mirror is whatever the machine's own sources name
   for its release; backports are a suite of the same archive.
2. The machine's package state is only read: lists, archives and locks are private
   (`-o Dir::...`), and nothing is ever configured or registered.
3. What is missing fails here, with the reason; no caller may skip for it.
4. A bundle is complete or absent: it is built aside, tried, and then renamed.

Only the standard library is used: this runs before the virtual environment exists.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from migrd.demo.image import cache_dir

BACKPORTS = "-backports"
_LIB = "usr/lib/x86_64-linux-gnu"
_OS_RELEASE = Path("/etc/os-release")
_ENTRY = "$(SITE) $(RELEASE) $(CODENAME) $(COMPONENT)"
# --reinstall: a package that is installed in this very version is needed here too.
_DOWNLOAD = ("--download-only", "--yes", "--no-install-recommends", "--reinstall")


class SetUpError(Exception):
    """The machine cannot give the tests what they need; the text says what to do."""


@dataclass(frozen=True)
class Bundle:
    """A set of packages that belong together, and the program in it that is run."""

    name: str
    packages: tuple[str, ...]
    program: str
    """Path of the program below the unpacked root."""
    try_with: tuple[str, ...] = ("--version",)
    """Arguments of a first run that must succeed."""
    backports: bool = False
    alone: bool = False
    """Only the packages themselves, not what they depend on."""
    arguments: tuple[str, ...] = ()
    """Put before the caller's own; `{root}` is the unpacked root."""
    environment: tuple[tuple[str, str], ...] = ()
    """Set for the program; `{root}` as above."""
    is_program: bool = field(default=True, repr=False)  # unpacked, both kinds are the same
    """False: what is wanted are files to read; `program` is one of them and is returned as is."""


QEMU_10 = Bundle(
    name="qemu-10",
    # Those after the first are dependencies: named, they are unpacked even where an older
    # version, which would satisfy apt, is installed.
    packages=(
        "qemu-system-x86",
        "qemu-system-common",
        "qemu-system-data",
        "seabios",
        "ipxe-qemu",
    ),
    program="usr/bin/qemu-system-x86_64",
    try_with=("-M", "none", "-accel", "tcg", "-version"),
    backports=True,
    arguments=("-L", "{root}/usr/share/qemu", "-L", "{root}/usr/share/seabios"),
    environment=(("QEMU_MODULE_DIR", f"{{root}}/{_LIB}/qemu"),),
)
PROMTOOL = Bundle(
    name="promtool",
    packages=("prometheus",),
    program="usr/bin/promtool",
    alone=True,  # a static program; its package would bring a web page's libraries along
)
ETCD = Bundle(
    name="etcd",
    packages=("etcd-server",),
    program="usr/bin/etcd",
    alone=True,  # static, too; installed, it would come up as a service of the machine
)
# The machine's own kernel headers are older than iommufd.
LINUX_HEADERS = Bundle(
    name="linux-headers",
    packages=("linux-libc-dev",),
    program="usr/include/linux/iommufd.h",
    backports=True,
    alone=True,
    is_program=False,
)
# The compiler proper: enough to check a source for arm64 without making an object of it.
ARM64_COMPILER = Bundle(
    name="arm64-compiler",
    packages=("cpp-12-aarch64-linux-gnu",),
    program="usr/lib/gcc-cross/aarch64-linux-gnu/12/cc1",
    alone=True,
)


def qemu_binaries() -> dict[str, Path]:
    """The QEMUs to test with, by version. Raises SetUpError if one cannot be had."""
    return {
        "7.2": _named("MIGRD_TEST_QEMU_7") or _distribution_qemu(),
        "10": _named("MIGRD_TEST_QEMU_10") or unpacked(QEMU_10),
    }


def promtool() -> Path:
    """Prometheus' checker of metrics and rules. Raises SetUpError if it cannot be had."""
    return _named("MIGRD_TEST_PROMTOOL") or unpacked(PROMTOOL)


def etcd() -> Path:
    """The server of a fleet's arbiter. Raises SetUpError if it cannot be had."""
    return _named("MIGRD_TEST_ETCD") or unpacked(ETCD)


def linux_headers() -> Path:
    """Directory of the kernel's headers for programs. Raises SetUpError if it cannot be had."""
    named = os.environ.get("MIGRD_TEST_LINUX_HEADERS")
    return Path(named) if named else unpacked(LINUX_HEADERS).parent.parent


def arm64_compiler() -> Path:
    """GCC's `cc1` for arm64. Raises SetUpError if it cannot be had."""
    return _named("MIGRD_TEST_ARM64_CC1") or unpacked(ARM64_COMPILER)


def _named(variable: str) -> Path | None:
    value = os.environ.get(variable)
    if value and not os.access(value, os.X_OK):
        raise SetUpError(f"{variable} names {value}, which is no executable file")
    return Path(value) if value else None


def _distribution_qemu() -> Path:
    path = Path("/usr/bin/qemu-system-x86_64")
    if not path.exists():
        raise SetUpError(f"{path} is missing: install qemu-system-x86, or run sh tests/run")
    version = _run([str(path), "-version"], "ask QEMU for its version")
    if "version 7.2" not in version:
        raise SetUpError(
            f"{path} is not QEMU 7.2 but: {version.splitlines()[0]}; "
            "name a QEMU 7.2 in MIGRD_TEST_QEMU_7"
        )
    return path


def unpacked(bundle: Bundle) -> Path:
    """The executable of `bundle`, unpacked now if it is not yet.

    Raises SetUpError if it cannot be had. Safe to call from several processes at once.
    """
    key = hashlib.sha256(repr(bundle).encode()).hexdigest()[:12]
    home = cache_dir() / "debian" / f"{bundle.name}-{key}"
    wrapper = home / _entry_of(bundle)
    home.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(home.parent / ".lock"):
        if wrapper.exists() and _runs(wrapper, bundle) is None:
            return wrapper
        # Either absent, or a library it borrowed from the machine has gone since.
        shutil.rmtree(home, ignore_errors=True)
        _build(bundle, home)
    problem = _runs(wrapper, bundle)
    if problem is not None:
        raise SetUpError(f"{bundle.name} was unpacked to {home} but does not run:\n{problem}")
    return wrapper


@contextlib.contextmanager
def downloaded(bundle: Bundle) -> Iterator[list[Path]]:
    """The packages of `bundle` as files, until the block ends. Raises SetUpError."""
    home = cache_dir() / "debian"
    home.mkdir(parents=True, exist_ok=True)
    with _only_one(home / ".lock"):
        yield _download(bundle, home / "apt")
        shutil.rmtree(home / "apt" / "archives", ignore_errors=True)


def _build(bundle: Bundle, home: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{bundle.name}-", dir=home.parent) as aside:
        work = Path(aside) / "bundle"
        root = work / "root"
        root.mkdir(parents=True)
        for package in _download(bundle, home.parent / "apt"):
            _run(["dpkg-deb", "-x", str(package), str(root)], f"unpack {package.name}")
        if not (root / bundle.program).exists():
            raise SetUpError(f"the packages of {bundle.name} contain no {bundle.program}")
        if bundle.is_program:
            wrapper = work / _entry_of(bundle)
            wrapper.parent.mkdir()
            wrapper.write_text(_wrapper_text(bundle, home / "root"))
            wrapper.chmod(0o755)
        work.rename(home)
    shutil.rmtree(home.parent / "apt" / "archives", ignore_errors=True)


def _entry_of(bundle: Bundle) -> Path:
    """Below the bundle's directory: the wrapper of a program, else the file itself."""
    if bundle.is_program:
        return Path("bin") / Path(bundle.program).name
    return Path("root") / bundle.program


def _wrapper_text(bundle: Bundle, root: Path) -> str:
    variables = [("LD_LIBRARY_PATH", f"{root}/{_LIB}"), *bundle.environment]
    lines = [f"export {name}='{value.format(root=root)}'" for name, value in variables]
    arguments = "".join(f" '{argument.format(root=root)}'" for argument in bundle.arguments)
    return "\n".join(["#!/bin/sh", *lines, f"exec '{root}/{bundle.program}'{arguments} \"$@\"", ""])


def _runs(wrapper: Path, bundle: Bundle) -> str | None:
    """Why it does not run, or None if it does."""
    if not bundle.is_program:
        return None
    try:
        done = subprocess.run(
            [str(wrapper), *bundle.try_with], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return None if done.returncode == 0 else done.stdout + done.stderr


def _download(bundle: Bundle, apt_root: Path) -> list[Path]:
    """Fetch the packages and those of their dependencies that this machine lacks."""
    release = _release_name()
    options = _private_apt(apt_root, release)
    archives = apt_root / "archives"
    shutil.rmtree(archives, ignore_errors=True)
    (archives / "partial").mkdir(parents=True)
    _run(["apt-get", *options, "update"], "fetch the package lists")
    target = ["-t", release + BACKPORTS] if bundle.backports else []
    how = ["download"] if bundle.alone else ["install", *_DOWNLOAD]
    _run(
        ["apt-get", *options, *how, *target, *bundle.packages],
        f"download {' '.join(bundle.packages)}",
        directory=archives,  # where "download" puts them
    )
    found = sorted(archives.glob("*.deb"))
    missing = [
        package
        for package in bundle.packages
        if not any(path.name.startswith(f"{package}_") for path in found)
    ]
    if missing:
        raise SetUpError(f"apt downloaded no {', '.join(missing)} for {bundle.name}")
    return found


def _private_apt(apt_root: Path, release: str) -> list[str]:
    """Options that keep apt off the machine's own sources, lists, archives and locks."""
    for name in ("lists/partial", "archives/partial", "etc/parts"):
        (apt_root / name).mkdir(parents=True, exist_ok=True)
    sources = apt_root / "etc" / "sources.list"
    sources.write_text("\n".join(_source_lines(release)) + "\n")
    settings = {
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": apt_root / "etc" / "parts",
        "Dir::Etc::Preferences": "/dev/null",
        "Dir::Etc::PreferencesParts": apt_root / "etc" / "parts",
        "Dir::State::Lists": apt_root / "lists",
        "Dir::State::Extended_States": apt_root / "extended_states",
        "Dir::Cache": apt_root,
        "Dir::Cache::Archives": apt_root / "archives",
        "Debug::NoLocking": "true",  # dpkg's lock is not ours to take: nothing is installed
        "APT::Sandbox::User": "root",  # the cache need not be readable for apt's own user
        "Acquire::Languages": "none",
        "Acquire::Retries": "3",
        "APT::Update::Post-Invoke-Success": "",
    }
    return [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]


def _source_lines(release: str) -> list[str]:
    """The machine's own entries for its release, and backports from the same archive."""
    listed = _run(
        ["apt-get", "indextargets", "--format", _ENTRY, "Created-By: Packages"],
        "read the machine's package sources",
    )
    entries = [line.split() for line in listed.splitlines()]
    keyring = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    option = f"[signed-by={keyring}] " if keyring.exists() else ""
    lines = []
    for entry in entries:
        if len(entry) < 3 or entry[-1] != "main":
            continue
        site, suite = entry[0], entry[1]
        if release not in entry[1:-1] and not suite.startswith(f"{release}-"):
            continue
        if suite.endswith(BACKPORTS):
            continue
        lines.append(f"deb {option}{site} {suite} main")
        if release in entry[1:-1]:  # the archive of the release proper: backports live beside it
            lines.append(f"deb {option}{site} {release}{BACKPORTS} main")
    if not any(line.endswith(f"{BACKPORTS} main") for line in lines):
        raise SetUpError(
            f"none of this machine's package sources carries Debian {release}, so there is no "
            "mirror to take packages from; add the distribution's own to the apt sources"
        )
    return list(dict.fromkeys(lines))


def _release_name() -> str:
    release = {}
    with contextlib.suppress(FileNotFoundError):
        for line in _OS_RELEASE.read_text().splitlines():
            name, _, value = line.partition("=")
            release[name] = value.strip('"')
    if release.get("ID") != "debian" or release.get("VERSION_CODENAME") != "bookworm":
        raise SetUpError(
            "packages are unpacked on Debian 12 (bookworm) only; here, name the programs: "
            "MIGRD_TEST_QEMU_7, MIGRD_TEST_QEMU_10, MIGRD_TEST_PROMTOOL, MIGRD_TEST_ETCD, "
            "MIGRD_TEST_ARM64_CC1 and, for Linux' headers of 6.12 or newer, the directory "
            "MIGRD_TEST_LINUX_HEADERS"
        )
    return release["VERSION_CODENAME"]


def _run(command: Sequence[str], purpose: str, *, directory: Path | None = None) -> str:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=600, cwd=directory
        )

    except (OSError, subprocess.SubprocessError) as error:
        raise SetUpError(f"cannot {purpose}: {error}") from error
    if done.returncode != 0:
        raise SetUpError(f"cannot {purpose}:\n{done.stdout}{done.stderr}")
    return done.stdout


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Have everything the tests need, and say where each program is."""
    try:
        programs = {f"QEMU {name}": path for name, path in qemu_binaries().items()}
        programs["promtool"] = promtool()
        programs["etcd"] = etcd()
        programs["Linux headers"] = linux_headers()
        programs["compiler for arm64"] = arm64_compiler()
    except SetUpError as error:
        sys.stderr.write(f"tests: {error}\n")
        return 1
    for name, path in programs.items():
        sys.stdout.write(f"{name}: {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
