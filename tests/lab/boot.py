"""Boots the lab's kernel under QEMU's software emulation and runs pytest in it.

    .venv/bin/python -m tests.lab.boot TIER [arguments for pytest]      as root, from the checkout

    .venv/bin/python -m tests.lab.boot mock
    .venv/bin/python -m tests.lab.boot vfio -k reset -x
    .venv/bin/python -m tests.lab.boot e2e tests/lab/guest/e2e/test_holes.py
    .venv/bin/python -m tests.lab.boot vfio --command 'ls /sys/class/iommu; dmesg | tail'

The guest has the machine's own file system as its root, read-only over 9p, and with it this very
Python, environment and checkout at their paths, and QEMU 10 for guests within the guest. A
second share, writable, takes in what is to be run and gives back what came of it:

    settings, command  --> guest/init.sh --> up, log, reports, status, dmesg
    console            <-- the serial port: all there is when the kernel panics

Rules:
1. Always TCG, never KVM: the same everywhere, and no access to the machine's own hardware.
2. Every boot ends: a panic ends QEMU, and so do the time limits and the death of this process.
3. What the guest needs and the machine lacks fails here (SetUpError), with the reason.

Traps: mock devices and an emulated VT-d cannot live in one boot of Linux 6.12 (the mock device is
matched with the first IOMMU there is), hence separate tiers. No IOMMU that QEMU 10.0 emulates
tracks dirty pages. Under TCG `intremap=on` goes with plain q35; a split irqchip is KVM's.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from migrd.demo.image import cache_dir
from tests.lab.kernel.build import kernel_image
from tests.setup.debian import SetUpError, qemu_binaries

ROOT = Path(__file__).parent.parent.parent
GUEST = Path(__file__).parent / "guest"
SHARE_IN_GUEST = Path("/dev/lab/share")
TIER_VARIABLE = "MIGRD_LAB_TIER"
UP_LIMIT_S = 240.0
RUN_LIMIT_S = 1500.0
_POLL_S = 0.2
_WRITABLE = ("/tmp", "/var/tmp", "/run")


@dataclass(frozen=True)
class Tier:
    """One kind of guest."""

    memory_mib: int
    devices: tuple[str, ...] = ()
    kernel_arguments: tuple[str, ...] = ()


TIERS: Mapping[str, Tier] = {
    "mock": Tier(memory_mib=1024),
    "vfio": Tier(
        memory_mib=2048,
        devices=(
            "intel-iommu,intremap=on,aw-bits=48",
            "e1000e,addr=10.0,romfile=",
            # Two functions that cannot be told apart, so one IOMMU group: behind a port, for of
            # those in the root complex Linux believes that Intel keeps them apart.
            "pcie-root-port,id=port0,addr=11.0,chassis=1",
            "e1000e,bus=port0,addr=00.0,multifunction=on,romfile=",
            "e1000e,bus=port0,addr=00.1,romfile=",
            "pcie-root-port,id=port1,addr=12.0,chassis=2",
            "igb,bus=port1,romfile=",
        ),
        # The kernel counts ticks of the emulated timer and panics when a busy machine gives it few.
        kernel_arguments=("vfio_pci.enable_sriov=1", "no_timer_check"),
    ),
    "e2e": Tier(
        memory_mib=3072,
        # Mock devices have no interrupt remapping, which is why VFIO calls them unsafe.
        kernel_arguments=("mtty.mock_iommu=1", "iommufd.allow_unsafe_interrupts=1"),
    ),
}


@dataclass(frozen=True)
class Outcome:
    """What came of one boot."""

    status: int | None
    """Exit status of the command; None if the guest did not get that far."""
    seconds: float
    log: str
    """Output of the command."""
    console: str
    """What the kernel wrote there, and QEMU's own complaints."""
    kernel_log: str
    """At the end; empty if the guest did not get that far."""
    reports: str
    """What inside.py wrote, one JSON object a line."""

    def story(self) -> str:
        """All there is to see when it went wrong."""
        how = "did not finish" if self.status is None else f"ended with status {self.status}"
        return (
            f"the guest {how} after {self.seconds:.0f} s\n"
            f"--- its output ---\n{_last_lines(self.log, 60)}\n"
            f"--- its kernel ---\n{_last_lines(self.kernel_log, 20)}\n"
            f"--- its console ---\n{_last_lines(self.console, 40)}"
        )


def run_pytest(
    tier: str, arguments: Sequence[str], *, limit_s: float = RUN_LIMIT_S, live: bool = False
) -> Outcome:
    """Boot `tier` and run pytest with `arguments` in it. Raises SetUpError."""
    command = [
        *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider"),
        # Only these: loading all that is installed takes longer than most tests here.
        *("-p", "pytest_asyncio.plugin", "-p", "pytest_timeout", "-p", "tests.lab.guest.inside"),
        *arguments,
    ]
    return run_command(tier, f"exec {shlex.join(command)}", limit_s=limit_s, live=live)


def run_command(
    tier: str, command: str, *, limit_s: float = RUN_LIMIT_S, live: bool = False
) -> Outcome:
    """Boot `tier` and run the shell command `command` in it. Raises SetUpError."""
    if os.geteuid() != 0:
        raise SetUpError("the lab's guests read the whole file system, so run them as root")
    qemus, kernel = qemu_binaries(), kernel_image()
    with tempfile.TemporaryDirectory(prefix="migrd-lab-") as name:
        share = Path(name)
        (share / "writable").write_text("".join(f"{path}\n" for path in _writable()))
        (share / "python").symlink_to(sys.executable)
        (share / "command").write_text(_environment(tier, qemus) + command + "\n")
        return _boot(_qemu_command(TIERS[tier], qemus["10"], kernel, share), share, limit_s, live)


def _boot(qemu: Sequence[str], share: Path, limit_s: float, live: bool) -> Outcome:
    started_s = time.monotonic()
    with (share / "qemu.err").open("wb") as errors:
        # setpriv: should this process be killed, QEMU goes with it.
        guest = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *qemu],
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
        )
    shown = 0
    try:
        while guest.poll() is None:
            spent_s = time.monotonic() - started_s
            if spent_s > limit_s or (spent_s > UP_LIMIT_S and not (share / "up").exists()):
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                guest.wait(_POLL_S)
            if live:
                shown += _show(share / "log", shown)
    finally:
        guest.kill()
        guest.wait()
    status = _text(share / "status").strip()
    return Outcome(
        status=int(status) if status.isdigit() else None,
        seconds=time.monotonic() - started_s,
        log=_text(share / "log"),
        kernel_log=_text(share / "dmesg"),
        console=_text(share / "console") + _text(share / "qemu.err"),
        reports=_text(share / "reports"),
    )


def _qemu_command(tier: Tier, qemu: Path, kernel: Path, share: Path) -> list[str]:
    kernel_arguments = [
        # One-shot timers get lost now and then under TCG on a busy machine, and an idle guest then
        # sleeps for ever (RCU says "timer wakeup didn't happen"). Periodic ones come again, and a
        # clock that is not compared with others is not given up for one that loses time meanwhile.
        *("nohz=off", "highres=off", "tsc=reliable"),
        *("console=ttyS0", "quiet", "panic=-1", "root=host", "rootfstype=9p", "ro"),
        "rootflags=trans=virtio,version=9p2000.L,msize=512000,cache=loose",
        f'init="{GUEST / "init.sh"}"',
        *tier.kernel_arguments,
    ]
    return [
        *(str(qemu), "-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", "max", "-smp", "2"),
        *("-m", str(tier.memory_mib), "-nodefaults", "-display", "none", "-no-reboot"),
        *("-serial", f"file:{share / 'console'}", "-kernel", str(kernel)),
        *("-append", " ".join(kernel_arguments), "-device", "virtio-rng-pci"),
        *("-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"),
        *("-device", "virtio-9p-pci,fsdev=host,mount_tag=host"),
        *("-fsdev", f"local,id=share,path={share},security_model=none"),
        *("-device", "virtio-9p-pci,fsdev=share,mount_tag=share"),
        *(word for device in tier.devices for word in ("-device", device)),
    ]


def _environment(tier: str, qemus: Mapping[str, Path]) -> str:
    """What the command is run with: this process' surroundings, and what the tests look for."""
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    values = {
        "PATH": path,
        "HOME": os.path.expanduser("~"),
        "LANG": "C.UTF-8",
        TIER_VARIABLE: tier,
        # Named, so that nobody in the guest has to look for them.
        "MIGRD_TEST_QEMU_7": str(qemus["7.2"]),
        "MIGRD_TEST_QEMU_10": str(qemus["10"]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        # The limit of each test, in the place of the one in pyproject.toml: here all is slower.
        "PYTEST_TIMEOUT": "300",
    }
    if "XDG_CACHE_HOME" in os.environ:
        values["XDG_CACHE_HOME"] = os.environ["XDG_CACHE_HOME"]
    lines = [f"export {name}={shlex.quote(value)}" for name, value in values.items()]
    return "\n".join([*lines, f"cd {shlex.quote(str(ROOT))}", ""])


def _writable() -> Iterator[str]:
    """Directories that tests write to; none lies within another."""
    yield from _WRITABLE
    cache = cache_dir().resolve()
    if not any(cache.is_relative_to(path) for path in _WRITABLE):
        yield str(cache)


def _show(log: Path, shown: int) -> int:
    with contextlib.suppress(OSError), log.open("rb") as output:
        output.seek(shown)
        new = output.read()
        sys.stdout.write(new.decode(errors="replace"))
        sys.stdout.flush()
        return len(new)
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _last_lines(text: str, count: int) -> str:
    return "\n".join(text.splitlines()[-count:])


def main(arguments: Sequence[str]) -> int:
    """Run one tier with its output as it comes; the exit status is that of pytest."""
    if not arguments or arguments[0] not in TIERS:
        sys.stderr.write(f"usage: python -m tests.lab.boot {'|'.join(TIERS)} [pytest arguments]\n")
        return 2
    tier, *rest = arguments
    try:
        if rest[:1] == ["--command"]:
            outcome = run_command(tier, " ".join(rest[1:]), live=True)
        else:
            is_path = [Path(word.partition("::")[0]).exists() for word in rest]
            where = [] if any(is_path) else [f"tests/lab/guest/{tier}"]
            outcome = run_pytest(tier, ["-v", *rest, *where], live=True)
    except SetUpError as error:
        sys.stderr.write(f"lab: {error}\n")
        return 1
    if outcome.status is None:
        sys.stderr.write(outcome.story() + "\n")
        return 1
    sys.stderr.write(f"lab: {tier} took {outcome.seconds:.1f} s\n")
    return outcome.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
