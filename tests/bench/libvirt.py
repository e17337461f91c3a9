"""Two libvirt 11 hosts on this machine, and `virsh migrate` between them, as a driver.

    unshare --mount --uts ─► /usr, /etc, /var  overlays: Debian's packages, unpacked, above the
                             /run              machine's own; a directory of each host's own
                          ─► libvirtd (host_uuid and host name of its own)

Nothing is installed: the overlays are seen inside the two mount namespaces alone, and are gone with
the last process in them. Needs root, overlayfs, and a mirror that carries bookworm-backports.

Two things are hidden from them. /dev/kvm (their /dev is their own): the guests run under TCG, and
libvirt's look at what KVM could do ends QEMU where KVM is not complete. The modules of the
machine's own QEMU: another build that is made to load all modules, as libvirt does, ends at them.

libvirt rounds a guest's memory to whole MiB. Its guest is therefore a little smaller than the
others', and spared what QEMU spends under TCG on memory that is no multiple of 256 KiB.
"""

import asyncio
import contextlib
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.sax.saxutils import quoteattr

from tests.bench.figures import Move
from tests.bench.guest import Guest
from tests.setup.debian import Bundle, unpacked

VM: Final = "bench"
START_S: Final = 30.0
MOVE_S: Final = 60.0
BUNDLE: Final = Bundle(
    name="libvirt-11",
    packages=(
        "libvirt-daemon",
        "libvirt-clients",
        "libvirt-daemon-driver-qemu",
        "libvirt-daemon-common",
        "libvirt-daemon-log",
        "libvirt-common",
        "libvirt0",
    ),
    program="usr/sbin/libvirtd",
    backports=True,
)
ENTER: Final = """\
set -eu
root=$1 dir=$2 name=$3
mount -t overlay overlay -o "lowerdir=$root/usr:/usr" /usr
mount -t overlay overlay -o "lowerdir=$dir/etc:$root/etc:/etc" /etc
mount -t overlay overlay \\
    -o "lowerdir=$root/var:/var,upperdir=$dir/var/upper,workdir=$dir/var/work" /var
mount --bind "$dir/run" /run
modules=/usr/lib/x86_64-linux-gnu/qemu
[ ! -d $modules ] || mount -t tmpfs none $modules
mknod "$dir/dev/null" c 1 3; mknod "$dir/dev/zero" c 1 5; mknod "$dir/dev/urandom" c 1 9
mknod "$dir/dev/random" c 1 8; mknod "$dir/dev/ptmx" c 5 2; mkdir "$dir/dev/pts" "$dir/dev/shm"
mount --bind "$dir/dev" /dev
mount -t devpts none /dev/pts
mount -t tmpfs none /dev/shm
hostname "$name"
exec libvirtd
"""
LIBVIRTD: Final = """\
host_uuid = "{uuid}"
auth_unix_rw = "none"
auth_unix_ro = "none"
unix_sock_group = "root"
"""
QEMU: Final = """\
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
"""
DOMAIN: Final = """\
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='pc-i440fx-7.2'>hvm</type>
    <loader readonly='yes' type='rom'>{rom}</loader>
  </os>
  <cpu mode='custom' match='exact' check='none'><model fallback='forbid'>qemu64</model></cpu>
  <devices>
    <emulator>{binary}</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
  <qemu:commandline>{arguments}</qemu:commandline>
</domain>
"""


class LibvirtMissing(Exception):
    """It cannot be had here; the text says why."""


@dataclass
class LibvirtHost:
    """One of the two."""

    name: str
    directory: Path
    daemon: "subprocess.Popen[bytes]"

    @property
    def uri(self) -> str:
        return f"qemu+unix:///system?socket={self.directory}/run/libvirt/libvirt-sock"

    def pid(self) -> int:
        """Of the guest's QEMU. Raises FileNotFoundError."""
        return int((self.directory / "run" / "libvirt" / "qemu" / f"{VM}.pid").read_text())

    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")[-1500:]


@dataclass
class VirshRig:
    """Moves one guest to and fro. Make it with `virsh_rig`."""

    name = "virsh"
    root: Path
    directory: Path
    hosts: tuple[LibvirtHost, LibvirtHost]
    moves: int = 0

    async def virsh(self, host: LibvirtHost, *words: str) -> str:
        """Raises LibvirtMissing with its own words when it fails."""
        program = await asyncio.create_subprocess_exec(
            str(self.root / "usr/bin/virsh"),
            *("-c", host.uri, *words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "LD_LIBRARY_PATH": f"{self.root}/usr/lib/x86_64-linux-gnu"},
        )
        async with asyncio.timeout(MOVE_S):
            told, words_of_error = await program.communicate()
        if program.returncode:
            raise LibvirtMissing(f"virsh {' '.join(words)}: {words_of_error.decode().strip()}")
        return told.decode()

    async def move(self) -> Move:
        """`virsh migrate --live`, from its start to its end."""
        here, there = self.hosts if self.moves % 2 == 0 else self.hosts[::-1]
        source_pid = here.pid()
        began_s = time.monotonic()
        await self.virsh(
            here, "migrate", "--live", VM, there.uri, "--migrateuri", "tcp://127.0.0.1"
        )
        ended_s = time.monotonic()
        self.moves += 1
        return Move(began_s, ended_s, source_pid, there.pid())


@contextlib.asynccontextmanager
async def virsh_rig(
    directory: Path, binary: Path, guest: Guest, rom: Path, arguments: list[str]
) -> AsyncIterator[VirshRig]:
    """Two libvirt hosts with the guest running on the first. Raises LibvirtMissing, SetUpError."""
    if os.geteuid() != 0:
        raise LibvirtMissing("private mounts need root")
    root = (await asyncio.to_thread(unpacked, BUNDLE)).parent.parent / "root"
    await asyncio.to_thread(directory.mkdir)
    with contextlib.ExitStack() as stack:
        first, second = (
            stack.enter_context(_libvirtd(root, directory / name, f"bench-{name}"))
            for name in ("a", "b")
        )
        rig = VirshRig(root, directory, (first, second))
        for host in rig.hosts:
            await _until_ready(rig, host)
        words = [*arguments, "-D", f"{directory}/%d.trace"]
        domain = DOMAIN.format(
            name=VM,
            memory_mib=guest.memory_mib,
            rom=rom,
            binary=binary,
            arguments="".join(f"<qemu:arg value={quoteattr(word)}/>" for word in words),
        )
        path = directory / "domain.xml"
        await asyncio.to_thread(path.write_text, domain)
        try:
            await rig.virsh(first, "create", str(path))
        except LibvirtMissing as failure:
            raise LibvirtMissing(f"{failure}; {first.log()}") from failure
        try:
            yield rig
        finally:
            for host in rig.hosts:
                with contextlib.suppress(LibvirtMissing):  # it runs on one of them
                    await rig.virsh(host, "destroy", VM)


@contextlib.contextmanager
def _libvirtd(root: Path, directory: Path, name: str) -> Iterator[LibvirtHost]:
    for part in ("etc/libvirt", "run", "dev", "var/upper", "var/work"):
        (directory / part).mkdir(parents=True)
    etc = directory / "etc"
    (etc / "libvirt" / "libvirtd.conf").write_text(LIBVIRTD.format(uuid=uuid.uuid4()))
    (etc / "libvirt" / "qemu.conf").write_text(QEMU)
    for file, line in (
        ("hosts", f"127.0.0.1 {name}\n"),  # else it waits for a name server to give up
        # it looks this user up, though it is told to take another
        ("passwd", "libvirt-qemu:x:64055:64055::/nonexistent:/usr/sbin/nologin\n"),
        ("group", "libvirt-qemu:x:64055:\n"),
    ):
        (etc / file).write_text(Path("/etc", file).read_text() + line)
    for program in ("unshare", "mount", "hostname"):
        if shutil.which(program) is None:
            raise LibvirtMissing(f"there is no {program}(1) here")
    command = ["unshare", "--mount", "--uts", "--propagation", "private"]
    enter = ["sh", "-c", ENTER, "sh", str(root), str(directory), name]
    with (directory / "log").open("wb") as log:
        daemon = subprocess.Popen(
            [*command, *enter], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield LibvirtHost(name, directory, daemon)
    finally:
        daemon.terminate()
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


async def _until_ready(rig: VirshRig, host: LibvirtHost) -> None:
    give_up_at_s = time.monotonic() + START_S
    last = "it made no socket"
    while time.monotonic() < give_up_at_s:
        if host.daemon.poll() is not None:
            raise LibvirtMissing(f"libvirtd on {host.name} ended at its start: {host.log()}")
        try:
            await rig.virsh(host, "list")
        except LibvirtMissing as failure:
            last = str(failure)
            await asyncio.sleep(0.2)
        else:
            return
    raise LibvirtMissing(f"libvirtd on {host.name} is not ready within {START_S:.0f} s: {last}")
