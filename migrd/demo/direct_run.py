"""The main job without QEMU: the same demo, with a guest in a plain process that hands over.

What is left out is QEMU; what is put in its place is migrd itself: it harvests the dirty pages and
moves the memory. The proof is the same: count, memory, exactly one process with the guest.

It needs Linux 6.7 (userfaultfd with asynchronous write protection, PAGEMAP_SCAN), and no privilege:
an ordinary user's processes may watch their own writes.
"""

import asyncio
import glob
from pathlib import Path
from typing import Final

from migrd.cli.client import path
from migrd.cli.seen import Json
from migrd.demo import hosts, processes
from migrd.demo.direct_memory import Layout, prove_memory
from migrd.demo.errors import DemoFailed, ProofFailed
from migrd.demo.hosts import Host
from migrd.demo.run import HEARTBEATS_BEFORE, MIB, VM, Demo
from migrd.direct.guest_memory import WriteTracking
from migrd.engine.threads import in_thread

PAGES: Final = MIB // 4096
WORKERS: Final = 2
FILLING_SHARE: Final = 4
"""A quarter of the memory holds something that is never written again."""


class DirectDemo(Demo):
    """One run of it."""

    what = "process"

    async def _check_machine(self) -> None:
        try:
            tracking = await in_thread(WriteTracking)
        except OSError as failure:
            raise DemoFailed(f"the writes of a process cannot be watched here: {failure}") from None
        tracking.close()
        if self._layout.working_set_pages + self._layout.filling_pages > self._layout.memory_pages:
            raise DemoFailed("the working set does not fit into the guest's memory: raise --memory")

    @property
    def _layout(self) -> Layout:
        plan = self._plan
        memory_pages = plan.memory_mib * PAGES
        filling_pages = memory_pages // FILLING_SHARE
        return Layout(memory_pages, plan.working_set_mib * PAGES, filling_pages, WORKERS)

    async def _start_hosts(self) -> None:
        self._say("Laying out two hosts, alpha and beta, in", str(self._directory))
        self._hosts = await in_thread(
            hosts.lay_out,
            self._directory,
            names=("alpha", "beta"),
            profile=hosts.DIRECT_PROFILE,
            tls=self._plan.tls,
        )
        await asyncio.gather(*(hosts.start(host) for host in self._hosts))
        self._say("Two migrd daemons are ready", "mutual TLS between them, a throw-away CA")

    async def _start_guest(self, alpha: Host) -> None:
        plan = self._plan
        definition: dict[str, Json] = {
            "profile": "demo",
            "parameters": {
                "memory_mib": plan.memory_mib,
                "working_set_mib": plan.working_set_mib,
                "filling_mib": self._layout.filling_pages // PAGES,
                "dirty_mib_per_s": round(plan.dirty_mib_per_s),
            },
        }
        async with alpha.client() as client:
            await client.call("PUT", path("vms", VM), body=definition)
            await client.call("POST", path("vms", VM, verb="start"))
        await self._heartbeats(alpha, HEARTBEATS_BEFORE)
        self._say(
            "The guest runs on alpha, in a plain process",
            f"{plan.memory_mib} MiB, {WORKERS} threads dirtying {plan.dirty_mib_per_s:g} MiB/s of "
            f"{plan.working_set_mib} MiB, counting aloud",
        )

    def _logs(self, host: Host) -> list[Path]:
        below = host.directory / "run" / "direct" / VM
        return sorted(Path(found) for found in glob.glob(f"{below}/*/output.log"))

    def _compare_memory(self, pid: int) -> None:
        with processes.standing_still(pid):
            if not prove_memory(pid, self._layout):
                raise ProofFailed("the guest has not written anything")

    def _guests(self) -> list[int]:
        return processes.guests_of(self._directory)
