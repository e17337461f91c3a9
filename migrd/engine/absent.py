"""A QEMU that the journal knows and nobody has found: not proven dead, so it is asked for again.

Every call raises VmmUnreachable. It stands in for a process whose directory was lost; migrations
with it wait for an operator instead of ending on a guess.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NoReturn

from migrd.core.facts import (
    RunState,
    TransferAddress,
    TransferSample,
    TransferSettings,
    VmFacts,
)
from migrd.core.rate_reading import MeasuredRate, RateMode, RateOffer
from migrd.core.vfio_launch import VfioLaunchDevice
from migrd.engine.ports import PluggedFds, PortRange, TlsIdentity, TransferFeed
from migrd.errors import VmmDied, VmmUnreachable


class AbsentVmm:
    """Fulfils `ports.Vmm` by saying that nothing is known."""

    pid = None
    is_reachable = False

    def __init__(self, vm: str, instance: str, *, is_dead: bool = False) -> None:
        """`is_dead`: proven so, since its host has been booted anew."""
        self.vm = vm
        self.instance = instance
        self.is_dead = is_dead

    def _nothing_known(self) -> NoReturn:
        if self.is_dead:
            raise VmmDied(f"the QEMU of {self.vm} ended with an earlier boot of this host")
        raise VmmUnreachable(
            f"the QEMU of {self.vm} (instance {self.instance or '?'}) was not found on this host; "
            "whether it still runs is not known"
        )

    async def facts(self) -> VmFacts:
        self._nothing_known()

    async def run_state(self) -> RunState:
        self._nothing_known()

    async def sample(self) -> TransferSample:
        self._nothing_known()

    @asynccontextmanager
    async def feed(self) -> AsyncIterator[TransferFeed]:
        self._nothing_known()
        yield  # pragma: no cover - makes this a generator

    async def prepare_outgoing(self, settings: TransferSettings, tls: TlsIdentity | None) -> None:
        self._nothing_known()

    async def start_outgoing(self, address: TransferAddress) -> None:
        self._nothing_known()

    async def clean_outgoing(self) -> None:
        self._nothing_known()

    async def prepare_incoming(
        self,
        settings: TransferSettings,
        tls: TlsIdentity | None,
        listen_host: str,
        ports: PortRange | None = None,
    ) -> TransferAddress:
        self._nothing_known()

    async def set_limits(
        self,
        *,
        max_bandwidth_bytes_per_s: int | None = None,
        downtime_limit_s: float | None = None,
        switchover_bandwidth_bytes_per_s: int | None = None,
    ) -> None:
        self._nothing_known()

    async def set_throttle(self, percent: int) -> None:
        self._nothing_known()

    async def start_postcopy(self) -> None:
        self._nothing_known()

    async def continue_switchover(self) -> None:
        self._nothing_known()

    async def cancel_transfer(self) -> None:
        self._nothing_known()

    async def free_stalled(self) -> None:
        self._nothing_known()

    async def pause_postcopy(self) -> None:
        self._nothing_known()

    async def listen_for_recovery(
        self, listen_host: str, ports: PortRange | None = None
    ) -> TransferAddress:
        self._nothing_known()

    async def resume_postcopy(self, address: TransferAddress) -> None:
        self._nothing_known()

    async def run_guest(self) -> None:
        self._nothing_known()

    async def pause_guest(self) -> None:
        self._nothing_known()

    async def plug_device(self, device: VfioLaunchDevice, fds: PluggedFds) -> None:
        self._nothing_known()

    async def unplug_device(self, id: str, *, within_s: float) -> None:
        self._nothing_known()

    async def rate_offer(self) -> RateOffer:
        self._nothing_known()

    async def measure_rate(
        self, window_s: float, mode: RateMode, *, pages_per_gib: int
    ) -> MeasuredRate:
        self._nothing_known()

    async def quit(self) -> None:
        if not self.is_dead:
            self._nothing_known()
