"""Two hosts' processes with a guest in them, for the contract that QEMUs fulfil too.

One listener serves both sides, and each process is a VM of its own name: nothing here needs a
daemon. Sources and destinations are the demo's guest, with the dirtying that the others have.
"""

import contextlib
import sys
from pathlib import Path

from migrd.core.facts import Feature, TransferAddress, VmSpec
from migrd.daemon import KERNEL_PARTS
from migrd.demo import hosts
from migrd.direct.handoff_listener import HandoffListener
from migrd.direct.launcher import DirectLauncher
from migrd.direct.profile_files import load_direct_profiles
from migrd.direct.vmm import DirectOptions, DirectVmm
from migrd.engine.ports import Vmm
from migrd.engine.threads import in_thread
from migrd.errors import VmmError
from tests.contract.vmm_world import GUEST_DIRTIES_BYTES_PER_S, MIB, Link, World
from tests.lab.freezing_proxy import freezing_proxy

MEMORY_MIB = 64
WORKING_SET_MIB = 8


class DirectWorld(World[Vmm]):
    version = "direct"
    machine_type = "demo-1"

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self._launcher: DirectLauncher | None = None
        self._started = 0

    @property
    def later_features(self) -> frozenset[Feature]:
        return frozenset({Feature.AVAIL_SWITCHOVER_BANDWIDTH})

    async def source(self) -> Vmm:
        return await self._start(incoming=False)

    async def destination(self) -> Vmm:
        return await self._start(incoming=True)

    def kill(self, vmm: Vmm) -> None:
        assert isinstance(vmm, DirectVmm)
        vmm.guest.process.kill()

    async def link(self, address: TransferAddress) -> Link:
        target = (address.host, address.port)
        proxy = await self._stack.enter_async_context(freezing_proxy(("127.0.0.1", 0), target))
        assert isinstance(proxy.address, tuple)

        async def freeze() -> None:
            proxy.freeze()

        return Link(TransferAddress(*proxy.address), freeze)

    async def nothing_is_left_behind(self, source: Vmm) -> None:
        await source.clean_outgoing()
        await source.clean_outgoing()  # and once more does no harm

    async def _start(self, *, incoming: bool) -> Vmm:
        launcher = self._launcher or await self._begin()
        self._started += 1
        spec = VmSpec(
            f"vm{self._started}",
            "demo",
            {
                "memory_mib": MEMORY_MIB,
                "working_set_mib": WORKING_SET_MIB,
                "filling_mib": MEMORY_MIB // 2,
                "dirty_mib_per_s": GUEST_DIRTIES_BYTES_PER_S // MIB,
            },
        )
        vmm = await launcher.launch(spec, "1", incoming=incoming)
        self._stack.push_async_callback(_end, vmm)
        return vmm

    async def _begin(self) -> DirectLauncher:
        profiles = self._directory / "profiles"
        await in_thread(profiles.mkdir)
        text = hosts.DIRECT_PROFILE.format(python=sys.executable)
        await in_thread((profiles / "demo.toml").write_text, text)
        launcher = DirectLauncher(
            await in_thread(load_direct_profiles, profiles),
            self._directory,
            self._directory / "direct.sock",
            KERNEL_PARTS,
            DirectOptions(),
        )
        listener = HandoffListener(self._directory / "direct.sock", on_client=launcher.take)
        await self._stack.enter_async_context(listener)
        self._stack.push_async_callback(launcher.close)
        self._launcher = launcher
        return launcher


async def _end(vmm: Vmm) -> None:
    with contextlib.suppress(VmmError):
        await vmm.quit()
