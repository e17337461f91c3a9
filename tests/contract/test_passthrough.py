"""Passthrough devices through the Vmm port: the fake keeps the rules of real QEMUs.

The real ones have stand-ins for devices (tests/lab/vfio_shim). QEMU 7.2 takes no descriptors, so
there it is the refusal that both have in common.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from migrd.core.facts import QemuStatus, RunState
from migrd.engine.threads import in_thread
from migrd.errors import VmmRefused, VmmTimedOut
from migrd.qemu.machine import Machine
from tests.contract.conftest import REAL
from tests.contract.test_machine import FAST, seen, state_reached, status_seen
from tests.contract.vmm_world import MIB, FakeWorld, RealWorld, dirtying_guest
from tests.lab import vfio_shim
from tests.qemu.vfio import SECOND, device, plugged

PLENTY_S = 30.0


@dataclass
class VfioWorld:
    """A world, and the faults that its devices can have."""

    world: FakeWorld | RealWorld
    fault: Path | None
    """Of real ones: while this file exists, their state cannot be saved."""

    @property
    def takes_descriptors(self) -> bool:
        return self.world.version != "7.2"

    def break_saving(self, machine: Machine) -> None:
        if isinstance(self.world, FakeWorld):
            self.world.vms[machine].vfio.cannot_be_saved = True
        elif self.fault is not None:
            self.fault.touch()


@pytest.fixture(
    params=[
        "fake 7.2",
        "fake 10.0",
        pytest.param("real 7.2", marks=pytest.mark.real),
        pytest.param("real 10.0", marks=pytest.mark.real),
    ]
)
async def vfio(request: pytest.FixtureRequest, short_tmp_path: Path) -> AsyncIterator[VfioWorld]:
    kind, version = request.param.split()
    fault = short_tmp_path / "fault"
    if kind == "fake":
        world: FakeWorld | RealWorld = FakeWorld(version, short_tmp_path)
    else:
        binary = request.getfixturevalue("qemu_binaries")[REAL[version]]
        rom = await in_thread(dirtying_guest().write_rom, short_tmp_path / "guest.rom")
        shim = await in_thread(vfio_shim.build)
        environment = vfio_shim.environment(
            shim, fail="STOP_COPY", fail_if=str(fault), precopy=MIB, stopcopy=MIB
        )
        world = RealWorld(version, binary, short_tmp_path, rom, environment)
    try:
        yield VfioWorld(world, fault)
    finally:
        await world.close()


async def with_device(machine: Machine) -> Machine:
    with plugged() as fds:
        await machine.plug_device(device(), fds)
    return machine


async def guest_lets_go(machine: Machine) -> None:
    """Of what it was asked to: for a guest without a driver that is when the machine is reset."""
    await machine.monitor.execute("system_reset")


async def test_a_device_comes_and_goes_while_the_guest_runs(vfio: VfioWorld) -> None:
    machine = await vfio.world.source()
    if not vfio.takes_descriptors:
        with plugged() as fds, pytest.raises(VmmRefused, match="does not offer") as refused:
            await machine.plug_device(device(), fds)
        assert refused.value.code == "passthrough_unsupported"
        assert (await machine.facts()).devices == ()
        return
    await with_device(machine)
    await with_device(machine)  # said again
    (found,) = (await machine.facts()).devices
    assert (found.id, found.iommufd, found.migrates) == ("hostdev0", "iommufd0", True)
    assert found.guest_bus == "pci.0"
    assert found.guest_address is not None
    with pytest.raises(VmmTimedOut) as late:
        await machine.unplug_device("hostdev0", within_s=0.1)
    assert late.value.code == "unplug_timed_out"
    with pytest.raises(VmmRefused, match="is being unplugged"):
        await with_device(machine)
    unplugging = asyncio.create_task(machine.unplug_device("hostdev0", within_s=PLENTY_S))
    await asyncio.sleep(0.05)
    await guest_lets_go(machine)
    await unplugging
    assert (await machine.facts()).devices == ()
    await machine.unplug_device("hostdev0", within_s=0.1)  # said again
    await with_device(machine)  # and it may come back
    assert [found.id for found in (await machine.facts()).devices] == ["hostdev0"]


async def test_what_qemu_does_not_take_leaves_nothing_and_may_be_tried_again(
    vfio: VfioWorld,
) -> None:
    machine = await vfio.world.source()
    if not vfio.takes_descriptors:
        return  # told above: there is nothing that it would take
    for wrong, words in (
        (replace(device(), guest_bus="nowhere"), "Bus 'nowhere' not found"),
        (replace(device(), properties={"no-such-thing": "on"}), "no-such-thing"),
    ):
        with plugged() as fds, pytest.raises(VmmRefused, match=words) as refused:
            await machine.plug_device(wrong, fds)
        assert refused.value.code == "plug_refused"
        rows = await machine.monitor.execute("qom-list", {"path": "/objects"})
        assert "iommufd0" not in {row["name"] for row in rows}
    await with_device(machine)
    with plugged() as fds, pytest.raises(VmmRefused, match="has devices on it already"):
        await machine.plug_device(device("hostdev1", SECOND), fds)
    with plugged(new_iommufd=False) as fds:
        await machine.plug_device(device("hostdev1", SECOND), fds)
    assert {found.id for found in (await machine.facts()).devices} == {"hostdev0", "hostdev1"}


async def test_a_device_tells_its_states_on_the_way_and_neither_comes_nor_goes_meanwhile(
    vfio: VfioWorld,
) -> None:
    if not vfio.takes_descriptors:
        return
    source = await with_device(await vfio.world.source())
    destination = await with_device(await vfio.world.destination())
    address = await destination.prepare_incoming(FAST, None, "127.0.0.1")
    await source.prepare_outgoing(FAST, None)
    states: list[str] = []
    async with source.feed() as feed:
        await source.start_outgoing(address)
        while True:
            sample = await feed.newer(within_s=PLENTY_S)
            assert sample is not None, "nothing new is told"
            states += [state for _, state in sample.device_states if state not in states]
            if sample.qemu_status is QemuStatus.PRE_SWITCHOVER:
                break
        with plugged() as fds, pytest.raises(VmmRefused, match="not allowed while migrating"):
            await source.plug_device(device("hostdev1", SECOND, "iommufd1"), fds)
        with pytest.raises(VmmRefused, match="not allowed while migrating"):
            await source.unplug_device("hostdev0", within_s=0.1)
        await source.continue_switchover()
        completed = await status_seen(feed, QemuStatus.COMPLETED)
    assert [s for s in states if not s.startswith("running")] == [
        "pre-copy",
        "pre-copy-p2p",
        "stop-copy",
    ]
    assert completed.reset_devices == ()
    await state_reached(destination, RunState.PAUSED)
    await destination.run_guest()
    (there,) = (await destination.facts()).devices
    assert (there.id, there.device_state, there.was_reset) == ("hostdev0", "running", False)


async def test_a_device_that_was_reset_is_told_though_the_guest_runs_on(vfio: VfioWorld) -> None:
    if not vfio.takes_descriptors:
        return
    source = await with_device(await vfio.world.source())
    destination = await with_device(await vfio.world.destination())
    vfio.break_saving(source)
    address = await destination.prepare_incoming(FAST, None, "127.0.0.1")
    await source.prepare_outgoing(FAST, None)
    async with source.feed() as feed:
        await source.start_outgoing(address)
        await status_seen(feed, QemuStatus.PRE_SWITCHOVER)
        await source.continue_switchover()
        failed = await seen(feed, lambda sample: bool(sample.reset_devices), "which was reset")
    assert failed.qemu_status is QemuStatus.FAILED
    await state_reached(source, RunState.RUNNING)
    assert "Resetting device" in (failed.error or "")
