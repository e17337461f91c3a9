"""The lab's kernel: Debian's source, a configuration of ours, one image for all boots.

    linux-source-6.12 --(apt, private)--> tree --(patch_tree.py)--> patched tree
    tinyconfig + fragment.config --(olddefconfig, nothing lost)--> .config
    make bzImage --(renamed into place)--> cache/lab-kernel/<recipe>-<version>/bzImage

    python -m tests.lab.kernel.build     have it, and say where it is

Rules:
1. The recipe is the hash of the fragment, the patch and the compiler. An image of the same recipe
   is used again whatever version the archive has meanwhile: a run without a network works, and a
   security update does not cost ten minutes unasked. A new machine gets the newest.
2. An image is complete or absent: it is built aside and renamed. One builder at a time; others
   wait for it. What an interrupted builder left is removed by the next.
3. The source tree (1.7 GB) goes as soon as the image is there. Of a failed build the log stays.
4. What is missing fails here, with the reason; no caller may skip for it.

Debian's own kernels do not serve: they have no iommufd, and its test devices need symbols of the
core that exist only where they are configured, so no module built beside can bring them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from migrd.demo.image import cache_dir
from tests.setup.debian import Bundle, SetUpError, downloaded

LIMIT_S = 45 * 60
PROGRESS_EVERY_S = 30
FRAGMENT = Path(__file__).with_name("fragment.config")
PATCH = Path(__file__).with_name("patch_tree.py")
SOURCE = Bundle(
    name="lab-kernel-source",
    packages=("linux-source-6.12",),
    program="usr/src/linux-source-6.12.tar.xz",
    alone=True,
)
_TOOLS = {
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "make": "make",
    "gcc": "gcc",
    "xz": "xz-utils",
}
_LIBELF = Path("/usr/include/gelf.h")
_ABOUT_OBJECTS = 1300


def kernel_image() -> Path:
    """The bzImage, built now if it is not yet. Raises SetUpError if it cannot be had.

    Safe to call from several processes at once. Takes about eighteen minutes of processor time.
    """
    home = cache_dir() / "lab-kernel"
    found = cached_image(home)
    if found is not None:
        return found
    deadline_s = time.monotonic() + LIMIT_S
    home.mkdir(parents=True, exist_ok=True)
    with _only_one(home / ".lock", deadline_s):
        return cached_image(home) or _Build(home, deadline_s).run()


def cached_image(home: Path) -> Path | None:
    """The newest image of this recipe, if there is one."""
    images = list(home.glob(f"{recipe()}-*/bzImage"))
    return max(images, key=lambda image: image.stat().st_mtime_ns, default=None)


def recipe() -> str:
    """Identifies what is built but for the version of the source. Raises SetUpError."""
    if platform.machine() != "x86_64":
        raise SetUpError(f"the lab's kernel is for x86_64 machines, not {platform.machine()}")
    missing = [package for tool, package in _TOOLS.items() if shutil.which(tool) is None]
    missing += [] if _LIBELF.exists() else ["libelf-dev"]
    if missing:
        raise SetUpError(
            f"the lab's kernel cannot be built; missing here (names of Debian packages): "
            f"{' '.join(missing)}; sh tests/run installs them"
        )
    compiler = subprocess.run(["gcc", "--version"], capture_output=True, timeout=60).stdout
    parts = (FRAGMENT.read_bytes(), PATCH.read_bytes(), compiler)
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


class _Build:
    """One build, in a directory of its own that is gone afterwards."""

    def __init__(self, home: Path, deadline_s: float) -> None:
        self._home = home
        self._deadline_s = deadline_s
        self._log = home / "build.log"

    def run(self) -> Path:
        for left in self._home.glob(".build-*"):
            shutil.rmtree(left)
        self._log.write_bytes(b"")
        with tempfile.TemporaryDirectory(prefix=".build-", dir=self._home) as aside:
            work = Path(aside)
            _say("unpacking Debian's kernel source")
            version = self._unpack(work)
            [tree] = (work / "source").iterdir()
            self._step([sys.executable, str(PATCH), str(tree)])
            objects = work / "objects"
            self._configure(tree, objects)
            _say(f"building Linux {version}: about 18 minutes of processor time, once")
            jobs = len(os.sched_getaffinity(0))
            self._step(_make(tree, objects, f"-j{jobs}", "bzImage"), with_progress=True)
            done = work / "done"
            done.mkdir()
            shutil.copy(objects / "arch/x86/boot/bzImage", done)
            shutil.copy(objects / ".config", done / "config")
            home = self._home / f"{recipe()}-{version}"
            done.rename(home)
        self._log.unlink()
        _say("the kernel is built")
        return home / "bzImage"

    def _unpack(self, work: Path) -> str:
        with downloaded(SOURCE) as [package]:
            show = ["dpkg-deb", "-f", str(package), "Version"]
            version = subprocess.run(show, capture_output=True, text=True, timeout=60).stdout
            self._step(["dpkg-deb", "-x", str(package), str(work / "package")])
        (work / "source").mkdir()
        archive = work / "package" / SOURCE.program
        self._step(["tar", "-C", str(work / "source"), "-xf", str(archive)])
        return version.strip()

    def _configure(self, tree: Path, objects: Path) -> None:
        objects.mkdir()
        self._step(_make(tree, objects, "tinyconfig"))
        merge = [str(tree / "scripts/kconfig/merge_config.sh"), "-m", "-O", str(objects)]
        self._step([*merge, str(objects / ".config"), str(FRAGMENT)], directory=tree)
        self._step(_make(tree, objects, "olddefconfig"))
        lost = lost_lines(FRAGMENT.read_text(), (objects / ".config").read_text())
        if lost:
            raise SetUpError(
                f"this kernel's configuration does not take, from {FRAGMENT}:\n" + "\n".join(lost)
            )

    def _step(
        self, command: Sequence[str], *, directory: Path | None = None, with_progress: bool = False
    ) -> None:
        """Run one command, its output into the log; it and all it started end with us."""
        with self._log.open("ab") as log:
            running = subprocess.Popen(
                command,
                cwd=directory,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,
            )
        try:
            self._watch(running, with_progress=with_progress)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
            running.wait()
        if running.returncode != 0:
            raise SetUpError(
                f"building the lab's kernel failed; {self._log} ends with:\n{self._tail()}"
            )

    def _watch(self, running: subprocess.Popen[bytes], *, with_progress: bool) -> None:
        started_s = time.monotonic()
        while True:
            left_s = self._deadline_s - time.monotonic()
            if left_s <= 0:
                raise SetUpError(
                    f"the lab's kernel was not built within {LIMIT_S // 60} minutes; "
                    f"{self._log} ends with:\n{self._tail()}"
                )
            try:
                running.wait(min(PROGRESS_EVERY_S, left_s))
            except subprocess.TimeoutExpired:
                if with_progress:
                    minutes = (time.monotonic() - started_s) / 60
                    objects = self._log.read_bytes().count(b"\n  CC ")
                    _say(f"{objects} of about {_ABOUT_OBJECTS} objects after {minutes:.1f} min")
            else:
                return

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-30:])


def lost_lines(fragment: str, config: str) -> list[str]:
    """Lines of the fragment that the configuration does not have."""
    has = set(config.splitlines())
    is_set = {line.partition("=")[0] for line in has if line.startswith("CONFIG_")}

    def is_lost(line: str) -> bool:
        words = line.split()
        if words[:1] == ["#"] and words[2:] == ["is", "not", "set"]:
            return words[1] in is_set
        return line.startswith("CONFIG_") and line not in has

    return [line for line in fragment.splitlines() if is_lost(line)]


def _make(tree: Path, objects: Path, *targets: str) -> list[str]:
    return ["make", "-C", str(tree), f"O={objects}", *targets]


def _environment() -> dict[str, str]:
    """Nothing of the caller's that would change the kernel: MAKEFLAGS, ARCH, KCONFIG_... ."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": os.environ.get("HOME", "/"),
        "LC_ALL": "C",
        "KBUILD_BUILD_USER": "migrd",
        "KBUILD_BUILD_HOST": "lab",
        "KBUILD_BUILD_TIMESTAMP": "1970-01-01",
    }


@contextlib.contextmanager
def _only_one(path: Path, deadline_s: float) -> Iterator[None]:
    with path.open("w") as lock:
        has_waited = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise SetUpError(f"another build of the lab's kernel holds {path}") from None
            if not has_waited:
                _say("waiting for the build that is going on")
                has_waited = True
            time.sleep(0.5)
        yield


def _say(text: str) -> None:
    sys.stderr.write(f"lab kernel: {text}\n")
    sys.stderr.flush()


def main() -> int:
    """Have the kernel, and say where it is."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    try:
        image = kernel_image()
    except SetUpError as error:
        _say(str(error))
        return 1
    sys.stdout.write(f"lab kernel: {image}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
