"""Two hosts on one machine: two network namespaces joined by a cable that can be pulled.

    namespace `left`            namespace `right`
    10.99.0.1  [veth] ========= [veth]  10.99.0.2      each end shaped by a token bucket (TBF)

Only the network is split: files and unix sockets are shared, so the monitors of two QEMUs stay
reachable while the link between them is gone - "management network up, migration network down".
netem is not there on every kernel; delay and loss belong to the freezing proxy.

Needs root. Start a process in a namespace with `command_in(namespace, [...])`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

LEFT_ADDRESS = "10.99.0.1"
RIGHT_ADDRESS = "10.99.0.2"


class NetnsError(Exception):
    """A namespace or its link could not be set up; the text is that of `ip` or `tc`."""


@dataclass(frozen=True)
class TwoHosts:
    """The namespaces' names; addresses are LEFT_ADDRESS and RIGHT_ADDRESS."""

    left: str
    right: str

    @staticmethod
    def command_in(namespace: str, command: Sequence[str]) -> list[str]:
        """The same command, run inside: `ip` becomes it, so the process id stays."""
        return ["ip", "netns", "exec", namespace, *command]

    async def limit_rate(self, bytes_per_s: int) -> None:
        """Shape both directions to so many bytes per second."""
        for namespace in (self.left, self.right):
            shape = f"root tbf rate {bytes_per_s * 8}bit burst 256kb latency 50ms"
            await _run("tc", "-n", namespace, "qdisc", "replace", "dev", "eth0", *shape.split())

    async def partition(self) -> None:
        """Pull the cable: nothing passes, nobody is told."""
        for namespace in (self.left, self.right):
            await _run("ip", "-n", namespace, "link", "set", "eth0", "down")

    async def heal(self) -> None:
        for namespace in (self.left, self.right):
            await _run("ip", "-n", namespace, "link", "set", "eth0", "up")

    async def give_up_after_retries(self, retries: int) -> None:
        """How soon TCP in both namespaces gives up on a dead link (`tcp_retries2`)."""
        write = f"echo {retries} >/proc/sys/net/ipv4/tcp_retries2"
        for namespace in (self.left, self.right):
            await _run(*self.command_in(namespace, ["sh", "-c", write]))


@contextlib.asynccontextmanager
async def two_hosts() -> AsyncIterator[TwoHosts]:
    """Two namespaces of unique names; removed at the end, whatever happened."""
    if os.geteuid() != 0:
        raise NetnsError("network namespaces need root: run these tests as root")
    mark = secrets.token_hex(3)
    hosts = TwoHosts(f"migrd-{mark}-l", f"migrd-{mark}-r")
    try:
        for namespace in (hosts.left, hosts.right):
            await _run("ip", "netns", "add", namespace)
        await _run(
            *("ip", "link", "add", "eth0", "netns", hosts.left, "type", "veth"),
            *("peer", "name", "eth0", "netns", hosts.right),
        )
        for namespace, address in ((hosts.left, LEFT_ADDRESS), (hosts.right, RIGHT_ADDRESS)):
            await _run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
            await _run("ip", "-n", namespace, "link", "set", "lo", "up")
        await hosts.heal()
        yield hosts
    finally:
        for namespace in (hosts.left, hosts.right):
            with contextlib.suppress(NetnsError):  # the first failure may be that it never was
                await _run("ip", "netns", "del", namespace)


async def _run(*command: str) -> None:
    child = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(20):
        output, _ = await child.communicate()
    if child.returncode != 0:
        raise NetnsError(f"{' '.join(command)}: {output.decode().strip()}")
