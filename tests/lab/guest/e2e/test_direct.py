"""A process with an I/O page table and a device of its own moves between two daemons, without QEMU.

    alpha   direct_vmm, launched by its profile: memory, HWPT, mtty   ── migrate ──►   beta: another

The daemons harvest the page table themselves (clearing reads), move the memory, and bring the mtty
through the kernel's migration states.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrd.cli.client import path
from migrd.cli.seen import Json
from migrd.demo import hosts, processes
from migrd.kernel.iommufd import pidfd_getfd
from tests.lab.boot import ROOT
from tests.lab.guest import raw
from tests.lab.guest.direct_vmm import REGISTER
from tests.lab.guest.e2e_fleet import VM, Lab
from tests.lab.guest.e2e_hosts import nursery
from tests.lab.guest.e2e_migrd import CLEARING, SWITCHED
from tests.lab.guest.raw import Mtty

MEMORY_MIB = 24
RUNNING = 2
_PROFILE = """\
engine = "direct"
description = "The lab's VMM that hands over"
kind = "lab-1"
command = [
    "{python}", "-S", "-m", "tests.lab.guest.direct_vmm", "{told}", "{node}", "{mib}",
]
memory_mib = {mib}
output = true

[environment]
PYTHONPATH = "{root}"
"""
_PATIENT = """\
stall_s = 60.0
preflight_deadline_s = 90.0
prepare_deadline_s = 120.0
switchover_deadline_s = 90.0
rollback_deadline_s = 90.0
"""


class Direct(Lab):
    """Both hosts, and what the processes with a guest in them told."""

    def story(self) -> list[dict[str, Any]]:
        told = self.directory / "told"
        return [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []

    def last(self, what: str) -> dict[str, Any]:
        return [one for one in self.story() if one["what"] == what][-1]

    async def begin(self, profile: str) -> int:
        """The pid of a guest that runs on alpha and has handed over."""
        await self.call("alpha", "PUT", path("vms", VM), body={"profile": profile})
        await self.call("alpha", "POST", path("vms", VM, verb="start"))
        seen = await self.vm_until("alpha", lambda vm: vm["state"] == "running")
        assert seen["pid"] == self.last("booted")["pid"]
        return int(seen["pid"])

    async def move(self) -> dict[str, Any]:
        policy: Json = {"deadline_s": 240, "downtime_limit_ms": 20_000}
        body: Json = {"vm": VM, "destination": "beta", "policy": policy}
        asked = await self.said("alpha", "POST", path("migrations"), body)
        return await self.ended(str(asked["id"]))

    async def end(self) -> None:
        for host in self.hosts:
            with contextlib.suppress(Exception):
                await self.call(host, "POST", path("vms", VM, verb="stop"))
        for host in self.hosts:
            with contextlib.suppress(Exception):
                await self.call(host, "DELETE", path("vms", VM))


@contextlib.contextmanager
def _laid_out(directory: Path, nodes: dict[str, dict[str, Mtty]]) -> Iterator[Direct]:
    """`nodes`: profile -> host -> the device that a process of it has there."""
    lines = {"migration": _PATIENT}
    pair = hosts.lay_out(
        directory,
        names=("alpha", "beta"),
        profile=hosts.DIRECT_PROFILE,
        tls=False,
        more={"alpha": lines, "beta": lines},
    )
    for host in pair:
        for profile, devices in nodes.items():
            text = _PROFILE.format(
                python=sys.executable,
                told=directory / "told",
                node=devices[host.name].node,
                mib=MEMORY_MIB,
                root=ROOT,
            )
            (host.directory / "profiles" / f"{profile}.toml").write_text(text)
    with nursery() as born:
        two = Direct(directory, {host.name: host for host in pair}, born)
        try:
            for host in pair:
                two.begin_daemon(host.name)
            asyncio.run(_ready(two))
            yield two
        finally:
            for host in pair:
                sys.stdout.write(f"--- {host.name} ---\n{two.words(host.name)}\n")
                two.end_daemon(host.name, signal.SIGTERM)
            for log in directory.glob("*/run/direct/*/*/output.log"):
                sys.stdout.write(f"--- {log} ---\n{log.read_text()}\n")
            # A device is gone only when nobody has it open any more.
            processes.end(processes.guests_of(directory))


async def _ready(two: Direct) -> None:
    for host in two.hosts:
        await two.ready(host)


@pytest.fixture(scope="module")
def two() -> Iterator[Direct]:
    directory = Path(tempfile.mkdtemp(prefix="direct-", dir="/tmp"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        here, there, narrow = (
            stack.enter_context(raw.mtty(kind=kind)) for kind in ("mtty-2", "mtty-2", "mtty-1")
        )
        nodes = {
            "fits": {"alpha": here, "beta": there},
            "misfit": {"alpha": here, "beta": narrow},
        }
        yield stack.enter_context(_laid_out(directory, nodes))


def device_of(pid: int) -> tuple[int, int]:
    """State and scratch register of the device that a process has open."""
    pidfd = os.pidfd_open(pid)
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if os.readlink(entry).startswith("/dev/vfio/devices/"):
                fd = pidfd_getfd(pidfd, int(entry.name))
                try:
                    return raw.state_of(fd), os.pread(fd, 1, 7)[0]
                finally:
                    os.close(fd)
    finally:
        os.close(pidfd)
    raise AssertionError(f"process {pid} has no VFIO device")


async def test_memory_and_device_arrive_as_they_were(two: Direct) -> None:
    left = await two.begin("fits")
    await asyncio.sleep(1.0)  # so that something is written before, too
    seen = await two.move()
    assert seen["phase"] == "succeeded", (seen["cause"], seen["refusals"])
    saved, loaded, resumed = (two.last(what) for what in ("saved", "loaded", "resumed"))
    assert {**loaded, "what": "saved"} | {"register": REGISTER} == saved
    assert min(saved["cpu"], saved["dma"]) > 10
    assert resumed["pid"] != left
    assert (resumed["register"], resumed["state"]) == (REGISTER, RUNNING)
    arrived = await two.vm_until("beta", lambda vm: vm["state"] == "running")
    assert arrived["pid"] == resumed["pid"]
    assert await asyncio.to_thread(device_of, resumed["pid"]) == (RUNNING, REGISTER)
    assert not await asyncio.to_thread(Path(f"/proc/{left}").exists)
    assert {CLEARING, SWITCHED} <= set(two.calls("alpha"))
    await two.end()


async def test_a_device_that_does_not_fit_there_leaves_the_guest_and_its_device_here(
    two: Direct,
) -> None:
    left = await two.begin("misfit")
    told = len(two.story())
    seen = await two.move()
    assert seen["phase"] == "rolled_back"
    assert "another kind of device" in seen["cause"]["message"], seen["cause"]
    assert (await two.vm("alpha"))["state"] == "running"
    assert await asyncio.to_thread(device_of, left) == (RUNNING, REGISTER)
    assert "loaded" not in [one["what"] for one in two.story()[told:]]
    await two.end()
