"""What the engine counts on in a Launcher when a VM has passthrough devices: one body, on the
simulated host and on a real QEMU with stand-ins for devices."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from migrd.core.facts import SpecDevice, VmSpec
from migrd.core.vfio_launch import QemuVfioFeature, VfioLaunch
from migrd.engine.ports import Launcher, Vmm
from migrd.engine.threads import in_thread
from migrd.errors import Invalid, VmmRefused
from tests.contract.test_launcher import FakeWorld, RealWorld
from tests.lab import vfio_shim
from tests.qemu.hosts import Host, host_of
from tests.qemu.vfio import FIRST, SECOND, add_vfio_profile, device, passed

ALLOWED = f'[passthrough]\nallowed = true\naddresses = ["{FIRST}"]'


@dataclass
class World:
    """One host whose profile allows one device, and another profile that allows none."""

    spec: VmSpec
    plain: VmSpec
    daemon: Callable[[], AbstractAsyncContextManager[Launcher]]


def fake_world(*, is_old: bool) -> World:
    world = FakeWorld()
    world.host.profiles["plain"] = "pc, 256 MiB"
    world.host.allowed_devices = {"tiny": frozenset({FIRST}), "plain": frozenset()}
    if is_old:
        world.host.make.vfio_features = frozenset()
    return World(world.spec(), VmSpec("vm", "plain"), world.daemon)


def real_world(host: Host) -> World:
    add_vfio_profile(host, "dev", vfio_shim.build(), allowed=ALLOWED)
    world = RealWorld(host)
    return World(host.spec(profile="dev"), host.spec(), world.daemon)


@pytest.fixture(
    params=[
        "fake 10",
        "fake 7.2",
        pytest.param("real 10", marks=pytest.mark.real),
        pytest.param("real 7.2", marks=pytest.mark.real),
    ]
)
async def world(request: pytest.FixtureRequest, short_tmp_path: Path) -> AsyncIterator[World]:
    kind, version = request.param.split()
    if kind == "fake":
        yield fake_world(is_old=version == "7.2")
        return
    binary = request.getfixturevalue("qemu_binaries")[version]
    with ExitStack() as stack:
        host = await in_thread(stack.enter_context, host_of(short_tmp_path, binary))
        yield await in_thread(real_world, host)


async def takes_devices(world: World, launcher: Launcher) -> bool:
    """Whether this QEMU offers all that is needed; some offer nothing of it."""
    offered = await launcher.vfio_features(world.spec)
    assert offered in (frozenset(), frozenset(QemuVfioFeature))
    return bool(offered)


async def ended(launcher: Launcher, vmm: Vmm) -> None:
    await vmm.quit()
    await launcher.forget(vmm)


async def test_a_qemu_is_given_devices_or_refuses_them_before_it_is_started(world: World) -> None:
    async with world.daemon() as launcher:
        if not await takes_devices(world, launcher):
            with passed(device()) as given, pytest.raises(VmmRefused) as refused:
                await launcher.launch(world.spec, "one", incoming=False, devices=given)
            assert refused.value.code == "passthrough_unsupported"
            assert await launcher.find() == []
            return
        with passed(device()) as given:
            vmm = await launcher.launch(world.spec, "one", incoming=False, devices=given)
        assert launcher.devices_of(vmm) == given.launch
        (found,) = (await vmm.facts()).devices
        assert (found.id, found.address, found.migrates) == ("hostdev0", FIRST, True)
        assert (await vmm.facts()).passthrough_devices == ("hostdev0",)
        await ended(launcher, vmm)


async def test_the_next_daemon_knows_the_devices_as_they_were_noted_last(world: World) -> None:
    async with world.daemon() as launcher:
        if not await takes_devices(world, launcher):
            return
        with passed(device()) as given:
            vmm = await launcher.launch(world.spec, "one", incoming=False, devices=given)
    async with world.daemon() as another:
        (vmm,) = await another.find()
        assert another.devices_of(vmm) == given.launch
        more = replace(given.launch, devices=(device(), device("hostdev1", SECOND)))
        await another.note_devices(vmm, more)
    async with world.daemon() as third:
        (vmm,) = await third.find()
        assert third.devices_of(vmm) == more
        await third.note_devices(vmm, VfioLaunch())
        assert third.devices_of(vmm) is None
        await ended(third, vmm)


async def test_a_vm_without_devices_has_none(world: World) -> None:
    async with world.daemon() as launcher:
        vmm = await launcher.launch(world.spec, "one", incoming=True)
        assert launcher.devices_of(vmm) is None
        assert (await vmm.facts()).devices == ()
        await ended(launcher, vmm)


async def test_devices_that_a_profile_does_not_allow_are_refused(world: World) -> None:
    async with world.daemon() as launcher:
        for spec, address, code in (
            (world.plain, FIRST, "passthrough_forbidden"),
            (world.spec, SECOND, "device_not_allowed"),
        ):
            wanted = replace(spec, devices=(SpecDevice("hostdev0", address),))
            with pytest.raises(Invalid) as refused:
                await in_thread(launcher.check, wanted)
            assert [violation.code for violation in refused.value.violations] == [code]
            with passed(device(address=address)) as given, pytest.raises(Invalid):
                await launcher.launch(spec, "one", incoming=False, devices=given)
        assert await launcher.find() == []


async def test_descriptors_that_do_not_fit_the_devices_are_refused(world: World) -> None:
    async with world.daemon() as launcher:
        with passed(device()) as given:
            for wrong in (replace(given, iommufds=()), replace(given, device_fds={})):
                with pytest.raises(Invalid) as refused:
                    await launcher.launch(world.spec, "one", incoming=False, devices=wrong)
                assert {v.code for v in refused.value.violations} == {"bad_descriptors"}
        assert await launcher.find() == []


async def test_a_spec_and_the_plan_made_for_it_have_one_digest(world: World) -> None:
    asked = replace(world.spec, devices=(SpecDevice("hostdev0", FIRST),))
    planned = VfioLaunch(("iommufd0",), True, (device(),))
    async with world.daemon() as launcher:
        of_spec = await in_thread(launcher.check, asked)
        assert of_spec == await in_thread(launcher.check, world.spec, planned)
        assert of_spec != await in_thread(launcher.check, world.spec)
