"""What the kernel offers: KVM, userfaultfd; memory, open files, and the clock."""

import ctypes
import fcntl
import os
import resource
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Final

from migrd.config import Settings
from migrd.core.migration import WhenNotConverging
from migrd.doctor.finding import Check, Finding, fail, ok, warn
from migrd.errors import ConfigError
from migrd.qemu.profile_files import load_profiles

KVM_GET_API_VERSION: Final = 0xAE00
KVM_CREATE_VM: Final = 0xAE01
KVM_API_VERSION: Final = 12
"""linux/kvm.h; KVM's api.rst: anything else must be refused."""
TIME_ERROR: Final = 5
"""adjtimex(2): the clock is not synchronised."""
TIMEX_BYTES: Final = 512
"""More than struct timex has anywhere; modes = 0 (all zero) asks and changes nothing."""
LEAST_AVAILABLE_BYTES: Final = 512 << 20
LEAST_OPEN_FILES: Final = 4096
RELEASED_WALL_S: Final = 1_767_225_600.0
"""2026-01-01: a clock before that is wrong."""


def checks(settings: Settings | None) -> list[Check]:
    """Without settings: what can be said of any host."""
    return [
        Check("kvm", blocking=lambda: look_at_kvm(_wants_kvm(settings))),
        Check("postcopy", blocking=partial(look_at_userfaultfd, _wants_postcopy(settings))),
        Check("memory", blocking=look_at_memory),
        Check("open files", blocking=look_at_open_files),
        Check("clock", blocking=look_at_clock),
    ]


def _wants_kvm(settings: Settings | None) -> bool:
    """Blocking."""
    if settings is None:
        return False
    try:
        profiles = load_profiles(settings.host.profiles_dir).by_name.values()
    except ConfigError:
        return False  # a finding of its own
    return any(profile.accelerator.startswith("kvm") for profile in profiles)


def _wants_postcopy(settings: Settings | None) -> bool:
    if settings is None:
        return False
    return settings.migration.when_not_converging is WhenNotConverging.POSTCOPY


def look_at_kvm(is_wanted: bool, device: Path = Path("/dev/kvm")) -> Finding:
    """Blocking. Opens the device and makes a VM of no memory: that it exists proves little."""
    bad = fail if is_wanted else ok_with_cure
    if not device.exists():
        message = f"{device} is not there: guests can only run under tcg, many times slower"
        return bad(
            "kvm",
            message,
            "enable virtualisation in the firmware; modprobe kvm_intel || modprobe kvm_amd",
        )
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as failure:
        message = f"{device} cannot be opened: {failure.strerror}"
        return bad("kvm", message, "usermod -aG kvm migrd, then restart migrd")
    try:
        version = fcntl.ioctl(fd, KVM_GET_API_VERSION)
        if version != KVM_API_VERSION:
            return bad("kvm", f"API version {version}, not {KVM_API_VERSION}", "use another kernel")
        os.close(fcntl.ioctl(fd, KVM_CREATE_VM, 0))
    except OSError as failure:
        message = f"{device} makes no VM: {failure.strerror}"
        return bad("kvm", message, "in a virtual machine, enable nested virtualisation on its host")
    finally:
        os.close(fd)
    caveat = ": nested (this host is itself a VM), so blackouts vary more" if _is_virtual() else ""
    return ok("kvm", f"{device} works{caveat}")


def ok_with_cure(name: str, message: str, cure: str) -> Finding:
    """Not asked for by this configuration: only said."""
    del cure
    return ok(name, message)


def _is_virtual() -> bool:
    try:
        return " hypervisor " in Path("/proc/cpuinfo").read_text().replace("\n", " \n")
    except OSError:
        return False


def look_at_userfaultfd(is_wanted: bool, root: Path = Path("/"), uid: int | None = None) -> Finding:
    """Blocking. A postcopy destination needs userfaultfd for faults inside the kernel, too."""
    uid = os.geteuid() if uid is None else uid
    bad = warn if is_wanted else ok_with_cure
    switch = root / "proc/sys/vm/unprivileged_userfaultfd"
    try:
        is_open = switch.read_text().strip() == "1"
    except OSError:
        message = "this kernel has no userfaultfd: no postcopy to this host"
        return bad("postcopy", message, "use a kernel with CONFIG_USERFAULTFD")
    device = root / "dev/userfaultfd"
    if uid == 0 or is_open or os.access(device, os.R_OK | os.W_OK):
        return ok("postcopy", "userfaultfd may be used")
    message = "userfaultfd is for root alone: no postcopy to this host"
    cure = "sysctl -w vm.unprivileged_userfaultfd=1, or give migrd access to /dev/userfaultfd"
    return bad("postcopy", message, cure)


def look_at_memory(meminfo: Path = Path("/proc/meminfo")) -> Finding:
    """Blocking."""
    table = {
        line.split(":")[0]: int(line.split()[1]) * 1024
        for line in meminfo.read_text().splitlines()
        if len(line.split()) >= 3
    }
    available_bytes, total_bytes = table.get("MemAvailable", 0), table.get("MemTotal", 0)
    said = f"{available_bytes >> 20} MiB available of {total_bytes >> 20} MiB"
    if available_bytes < LEAST_AVAILABLE_BYTES:
        return warn("memory", said, "there is hardly room for an incoming guest: free -m")
    return ok("memory", said)


def look_at_open_files() -> Finding:
    """A VM takes about six: monitors, pidfd, serial, while it moves a few more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    if soft != resource.RLIM_INFINITY and soft < LEAST_OPEN_FILES and hard < LEAST_OPEN_FILES:
        cure = "LimitNOFILE=65536 in the unit, or: ulimit -n 65536"
        return warn("open files", f"at most {most}", cure)
    return ok("open files", f"at most {most}")


def look_at_clock() -> Iterable[Finding]:
    """Certificates need the right time; so does whoever compares the logs of two hosts."""
    now_wall_s = time.time()
    said = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now_wall_s))
    cure = "timedatectl set-ntp true   (or: systemctl enable --now chrony)"
    if now_wall_s < RELEASED_WALL_S:
        yield fail("clock", f"{said} is in the past: every certificate is not valid yet", cure)
    elif not _is_synchronised():
        yield warn("clock", f"{said}, not synchronised", cure)
    else:
        yield ok("clock", f"{said}, synchronised")


def _is_synchronised() -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    state = libc.adjtimex(ctypes.create_string_buffer(TIMEX_BYTES))
    return bool(state not in (-1, TIME_ERROR))
