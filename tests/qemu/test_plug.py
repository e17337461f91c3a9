"""Plugging and unplugging when things go wrong on the way."""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from migrd.engine.ports import PluggedFds
from migrd.errors import VmmDied, VmmRefused, VmmTimedOut, VmmUnreachable
from migrd.qemu.machine import Machine
from tests.contract.vmm_world import FakeWorld
from tests.fakes.qmp_server import Fault
from tests.qemu.vfio import device, plugged

PLENTY_S = 30.0


@pytest.fixture
async def world(short_tmp_path: Path) -> AsyncIterator[FakeWorld]:
    made = FakeWorld("10.0", short_tmp_path)
    yield made
    await made.close()


async def ids(machine: Machine) -> list[str]:
    return [found.id for found in (await machine.facts()).devices]


@pytest.mark.parametrize("answers", range(9))
async def test_a_plug_whose_answer_is_lost_at_any_point_is_said_again_and_holds(
    world: FakeWorld, answers: int
) -> None:
    machine = await world.source()
    vm = world.vms[machine]
    vm.qmp.faults = [*[None] * answers, Fault.EOF_MID_REPLY]
    with plugged() as fds:
        try:
            await machine.plug_device(device(), fds)
        except VmmUnreachable:
            await machine.wait_connected(within_s=PLENTY_S)
            await machine.plug_device(device(), fds)
    vm.qmp.faults = []
    await machine.wait_connected(within_s=PLENTY_S)
    assert await ids(machine) == ["hostdev0"]
    assert list(vm.objects) == ["iommufd0"]
    assert vm.qmp.fds == {}


@pytest.mark.parametrize("answers", range(3))
async def test_an_unplug_whose_answer_is_lost_at_any_point_is_said_again_and_holds(
    world: FakeWorld, answers: int
) -> None:
    machine = await world.source()
    vm = world.vms[machine]
    with plugged() as fds:
        await machine.plug_device(device(), fds)
    vm.qmp.faults = [*[None] * answers, Fault.EOF_MID_REPLY]
    with pytest.raises(VmmUnreachable):
        await machine.unplug_device("hostdev0", within_s=PLENTY_S)
    await machine.wait_connected(within_s=PLENTY_S)
    await until_unplugged(machine)
    assert vm.objects == {}


async def until_unplugged(machine: Machine) -> None:
    unplugging = asyncio.create_task(machine.unplug_device("hostdev0", within_s=PLENTY_S))
    while not unplugging.done():
        await asyncio.sleep(0.01)
        await machine.monitor.execute("system_reset")
    await unplugging


async def test_a_guest_that_says_no_keeps_its_device(world: FakeWorld) -> None:
    machine = await world.source()
    with plugged() as fds:
        await machine.plug_device(device(), fds)
    world.vms[machine].vfio.guest_keeps = True
    with pytest.raises(VmmRefused) as refused:
        await machine.unplug_device("hostdev0", within_s=PLENTY_S)
    assert refused.value.code == "unplug_refused_by_guest"
    assert await ids(machine) == ["hostdev0"]


async def test_a_device_that_is_gone_is_seen_though_the_event_was_lost(world: FakeWorld) -> None:
    machine = await world.source()
    world.vms[machine].qmp.lost_events = {"DEVICE_DELETED"}
    with plugged() as fds:
        await machine.plug_device(device(), fds)
    await until_unplugged(machine)
    assert await ids(machine) == []


async def test_a_device_let_go_of_when_nobody_waited_any_more_leaves_nothing(
    world: FakeWorld,
) -> None:
    machine = await world.source()
    with plugged() as fds:
        await machine.plug_device(device(), fds)
    with pytest.raises(VmmTimedOut):
        await machine.unplug_device("hostdev0", within_s=0.05)
    with plugged() as fds, pytest.raises(VmmRefused) as refused:
        await machine.plug_device(device(), fds)  # it is there, and yet on its way out
    assert refused.value.code == "unplug_pending"
    await machine.monitor.execute("system_reset")
    await machine.unplug_device("hostdev0", within_s=PLENTY_S)
    assert world.vms[machine].objects == {}
    with plugged() as fds:
        await machine.plug_device(device(), fds)
    assert await ids(machine) == ["hostdev0"]


async def test_a_qemu_that_dies_while_the_guest_is_asked_is_told(world: FakeWorld) -> None:
    machine = await world.source()
    with plugged() as fds:
        await machine.plug_device(device(), fds)
    unplugging = asyncio.create_task(machine.unplug_device("hostdev0", within_s=PLENTY_S))
    await asyncio.sleep(0.05)
    world.kill(machine)
    with pytest.raises(VmmDied):
        await unplugging


async def test_descriptors_that_do_not_fit_are_refused_before_qemu_hears_of_them(
    world: FakeWorld,
) -> None:
    machine = await world.source()
    for fds in (PluggedFds(), PluggedFds(iommufd=0)):
        with pytest.raises(VmmRefused) as refused:
            await machine.plug_device(device(), fds)
        assert refused.value.code == "bad_descriptors"
    assert world.vms[machine].objects == {}


async def test_what_is_no_passthrough_device_is_left_alone(world: FakeWorld) -> None:
    machine = await world.source()
    world.vms[machine].others = ("net0",)
    with pytest.raises(VmmRefused, match="no passthrough device") as refused:
        await machine.unplug_device("net0", within_s=1.0)
    assert refused.value.code == "no_passthrough_device"
    with plugged() as fds, pytest.raises(VmmRefused, match="no passthrough device"):
        await machine.plug_device(device("net0"), fds)


async def test_two_devices_plugged_at_once_both_arrive(world: FakeWorld) -> None:
    machine = await world.source()
    other = replace(device("hostdev1", "0000:41:00.2"), iommufd="iommufd1")
    before = len(os.listdir("/proc/self/fd"))
    with plugged() as fds, plugged() as more:
        await asyncio.gather(machine.plug_device(device(), fds), machine.plug_device(other, more))
    assert sorted(await ids(machine)) == ["hostdev0", "hostdev1"]
    assert len(os.listdir("/proc/self/fd")) <= before + 4  # the fake QEMU's own copies
