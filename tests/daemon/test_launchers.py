"""Two engines' launchers as one: a profile decides at the start, and who found it ever after."""

import pytest

from migrd.core.facts import VmSpec
from migrd.engine.ports import Launcher
from migrd.errors import Invalid, NotFound
from migrd.launchers import EngineLauncher, Launchers
from tests.fakes.launcher import FakeHost, FakeLauncher, Ground


@pytest.fixture
def hosts() -> tuple[FakeHost, FakeHost]:
    ground = Ground()
    return FakeHost("a", ground), FakeHost("b", ground)


def both(hosts: tuple[FakeHost, FakeHost]) -> tuple[Launchers, Launcher, Launcher]:
    one, two = (FakeLauncher(host) for host in hosts)
    return Launchers([EngineLauncher({"big"}, one), EngineLauncher({"tiny"}, two)]), one, two


async def test_the_profile_says_who_launches_and_who_is_asked_afterwards(
    hosts: tuple[FakeHost, FakeHost],
) -> None:
    launchers, one, two = both(hosts)
    vmm = await launchers.launch(VmSpec("vm", "tiny"), "i", incoming=False)
    assert [qemu.instance for qemu in hosts[1].qemus] == ["i"]
    assert hosts[0].qemus == []
    assert launchers.is_managed(vmm)
    assert launchers.spec_of(vmm) == VmSpec("vm", "tiny")
    await vmm.quit()
    await launchers.forget(vmm)
    for launcher in (one, two):
        assert isinstance(launcher, FakeLauncher)
        launcher.close()


async def test_what_either_of_them_finds_is_found_once_and_stays_its_own(
    hosts: tuple[FakeHost, FakeHost],
) -> None:
    hosts[0].adopted.add(hosts[0].boot("left").instance)
    hosts[1].adopted.add(hosts[1].boot("right").instance)
    launchers, one, two = both(hosts)
    found = {vmm.vm: vmm for vmm in await launchers.find()}
    assert set(found) == {"left", "right"}
    assert await launchers.find() == []
    assert not any(launchers.is_managed(vmm) for vmm in found.values())
    for vmm in found.values():
        await vmm.quit()
        await launchers.forget(vmm)
    for launcher in (one, two):
        assert isinstance(launcher, FakeLauncher)
        launcher.close()


def test_a_profile_of_neither_is_told_with_those_there_are(
    hosts: tuple[FakeHost, FakeHost],
) -> None:
    launchers, *_ = both(hosts)
    with pytest.raises(NotFound, match="there are: big, tiny") as missing:
        launchers.check(VmSpec("vm", "none"))
    assert missing.value.code == "unknown_profile"
    with pytest.raises(Invalid):
        launchers.check(VmSpec("vm", None))
