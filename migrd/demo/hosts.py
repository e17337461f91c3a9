"""Two hosts on one machine: each its own migrd, configuration, state, sockets and certificate.

    <directory>/
      ca.pem                      a throw-away authority, gone with the directory
      alpha/ beta/
        migrd.toml  profiles/demo.toml  tls/  state/  run/  log

Nothing is shared between the two but the authority and the loopback. Ports are asked of the kernel.
"""

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trustme

from migrd.cli.address import Address
from migrd.cli.client import Client
from migrd.cli.exits import CommandError
from migrd.demo.dh import dh_params_pem
from migrd.demo.errors import DemoFailed
from migrd.engine.threads import in_thread

PROGRAM: Final = (sys.executable, "-m", "migrd")
READY_S: Final = 30.0
STOP_S: Final = 10.0
PROFILE: Final = """\
description = "The demo's guest: one boot image, a serial line, software emulation"
binary = "{binary}"
machine = "{machine}"
accelerator = "tcg"
cpu = "qemu64"
memory_mib = "{{memory_mib}}"
serial = true
arguments = [
    "-nodefaults",
    "-display", "none",
    "-bios", "{{firmware}}",
]

[parameters.firmware]
type = "path"
description = "Boot image of the guest"
below = "{firmware_dir}"

[parameters.memory_mib]
type = "integer"
description = "Memory of the guest"
min = 16
max = 8192
unit = "MiB"
"""
DIRECT_PROFILE: Final = """\
engine = "direct"
description = "The direct demo's guest: threads that write memory and count aloud"
kind = "demo-1"
command = [
    "{python}", "-m", "migrd.demo.direct_guest",
    "--memory-mib", "{{memory_mib}}",
    "--working-set-mib", "{{working_set_mib}}",
    "--filling-mib", "{{filling_mib}}",
    "--dirty-mib-per-s", "{{dirty_mib_per_s}}",
]
memory_mib = "{{memory_mib}}"
output = true

[parameters.memory_mib]
type = "integer"
description = "Memory of the guest"
min = 1
max = 1048576
unit = "MiB"

[parameters.working_set_mib]
type = "integer"
description = "How much of it is written again and again"
min = 1
max = 1048576
unit = "MiB"

[parameters.filling_mib]
type = "integer"
description = "How much of the rest is not zero"
min = 0
max = 1048576
unit = "MiB"

[parameters.dirty_mib_per_s]
type = "integer"
description = "How fast the working set is written"
min = 0
max = 1048576
unit = "MiB/s"
"""
CONFIG: Final = """\
[host]
name = "{name}"
state_dir = "{dir}/state"
runtime_dir = "{dir}/run"
profiles_dir = "{dir}/profiles"

[peer]
listen_host = "127.0.0.1"
listen_port = {port}
cert = "{dir}/tls/server-cert.pem"
key = "{dir}/tls/server-key.pem"
ca = "{dir}/tls/ca-cert.pem"

[peers.{other}]
url = "https://127.0.0.1:{other_port}"
{roster}
[migration]
tls = "{tls}"
tls_dir = "{dir}/tls"
{migration}
[log]
level = "info"
format = "json"
"""


@dataclass
class Host:
    """One of the two."""

    name: str
    directory: Path
    port: int
    process: asyncio.subprocess.Process | None = field(default=None, repr=False)

    @property
    def socket(self) -> Path:
        return self.directory / "run" / "api.sock"

    @property
    def config(self) -> Path:
        return self.directory / "migrd.toml"

    @property
    def log(self) -> Path:
        return self.directory / "log"

    def client(self) -> Client:
        return Client(Address(socket=self.socket))


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on at this moment."""
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(count):
            sock = stack.enter_context(socket.socket())
            sock.bind(("127.0.0.1", 0))
            ports.append(int(sock.getsockname()[1]))
        return ports


def lay_out(
    directory: Path,
    *,
    names: tuple[str, str],
    binaries: tuple[str, str] = ("", ""),
    machine: str = "",
    profile: str = PROFILE,
    tls: bool,
    more: Mapping[str, Mapping[str, str]] | None = None,
) -> tuple[Host, Host]:
    """Write everything both daemons need. Blocking (keys are made).

    `profile`: the text of demo.toml, with places for what this knows. `more` are further lines of
    TOML by host name: for [migration] ("migration"), for the other host's entry in the roster
    ("roster"), and at the end ("end").
    """
    authority = trustme.CA(organization_name="migrd demo")
    ports = free_ports(2)
    hosts = [Host(name, directory / name, port) for name, port in zip(names, ports, strict=True)]
    for host, other, binary in zip(hosts, reversed(hosts), binaries, strict=True):
        for part in ("tls", "profiles", "state", "run", "firmware"):
            (host.directory / part).mkdir(parents=True, mode=0o700)
        _write_identity(authority, host)
        _write_profile(host, profile, binary=binary, machine=machine)
        lines = (more or {}).get(host.name, {})
        values = {
            "name": host.name,
            "dir": host.directory,
            "port": host.port,
            "other": other.name,
            "other_port": other.port,
            "tls": "required" if tls else "off",
            "migration": lines.get("migration", ""),
            "roster": lines.get("roster", ""),
        }
        host.config.write_text(CONFIG.format(**values) + lines.get("end", ""))
    (directory / "firmware").mkdir(mode=0o700)
    return hosts[0], hosts[1]


def _write_profile(host: Host, profile: str, *, binary: str, machine: str) -> None:
    text = profile.format(
        binary=binary,
        machine=machine,
        firmware_dir=host.directory.parent / "firmware",
        dir=host.directory,
        python=sys.executable,
    )
    (host.directory / "profiles" / "demo.toml").write_text(text)


def _write_identity(authority: trustme.CA, host: Host) -> None:
    """One certificate serves migrd (both directions) and QEMU (under the names it wants)."""
    issued = authority.issue_cert(host.name, "127.0.0.1", common_name=host.name)
    tls = host.directory / "tls"
    chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
    for role in ("server", "client"):
        (tls / f"{role}-cert.pem").write_bytes(chain)
        key = tls / f"{role}-key.pem"
        key.touch(mode=0o600)
        key.write_bytes(issued.private_key_pem.bytes())
    (tls / "ca-cert.pem").write_bytes(authority.cert_pem.bytes())
    (tls / "dh-params.pem").write_text(dh_params_pem())


async def start(host: Host, program: Sequence[str] = PROGRAM) -> None:
    """Start its daemon and wait until it is ready. Raises DemoFailed with its last words.

    `program` is what is run with the arguments of `migrd`.
    """
    log = await in_thread(open, host.log, "ab")
    try:
        host.process = await asyncio.create_subprocess_exec(
            *program,
            "serve",
            "--config",
            str(host.config),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the demo, which then ends its daemons itself
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    finally:
        log.close()
    await _until_ready(host, host.process)


async def _until_ready(host: Host, process: asyncio.subprocess.Process) -> None:
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + READY_S
    while loop.time() < give_up_at:
        if process.returncode is not None:
            words = await in_thread(_last_words, host.log)
            raise DemoFailed(f"migrd on {host.name} ended at its start:\n{words}")
        try:
            async with host.client() as client:
                await client.call("GET", "/readyz", deadline_s=2.0)
                return
        except CommandError:
            await asyncio.sleep(0.05)
    words = await in_thread(_last_words, host.log)
    raise DemoFailed(f"migrd on {host.name} was not ready within {READY_S:.0f} s:\n{words}")


def _last_words(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


async def stop(host: Host) -> None:
    """End its daemon: asked, then killed."""
    process = host.process
    if process is None or process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(STOP_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
