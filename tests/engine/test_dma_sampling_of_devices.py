"""Whose rate a page table's is, while devices come and go; and what a sample may not break."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from migrd.engine.device_ports import HwptRef
from migrd.engine.service import PlugRequest
from tests.engine.passthrough import DISK, NIC, NIC2, hardware, hosts, nic, start, untracked
from tests.fakes.hardware import SimOpenDevices
from tests.fakes.world import VM, Pair

INTERVAL_S = 10.0


def of_devices(pair: Pair) -> set[tuple[str, ...]]:
    return {sampled.devices for sampled in pair.alpha.service.vm(VM).dma_rates}


async def _up_to_256_mib(self: SimOpenDevices, hwpt: HwptRef, iova: int, length_bytes: int) -> bool:
    return iova + length_bytes <= 256 << 20


async def test_a_rate_is_told_of_the_devices_that_are_on_its_iommufd_object_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SimOpenDevices, "is_mapped", _up_to_256_mib)
    async with hosts(hardware(nic(NIC), untracked(DISK), nic(NIC2))) as pair:
        await start(pair, NIC, DISK)
        await asyncio.sleep(2 * INTERVAL_S)
        assert of_devices(pair) == {("hostdev0",), ("hostdev1",)}
        await pair.alpha.service.unplug_device(VM, "hostdev0", by="test")
        await asyncio.sleep(2 * INTERVAL_S)
        assert of_devices(pair) == {(), ("hostdev1",)}
        request = PlugRequest(NIC2, "later", "rp0", "00.0")
        await pair.alpha.service.plug_device(VM, request, by="test")
        await asyncio.sleep(2 * INTERVAL_S)
        assert ("later",) in of_devices(pair)
        assert ("hostdev1",) in of_devices(pair)


async def test_a_sample_that_breaks_does_not_end_the_daemon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def broken(self: SimOpenDevices) -> Sequence[HwptRef]:
        raise ValueError("a kernel that answers what nobody has thought of")

    monkeypatch.setattr(SimOpenDevices, "find_hwpts", broken)
    async with hosts(hardware(nic(NIC))) as pair:
        await start(pair, NIC)
        await asyncio.sleep(3 * INTERVAL_S)
        assert not pair.alpha.service.vm(VM).dma_rates
        assert pair.alpha.service.vm(VM).state == "running"
