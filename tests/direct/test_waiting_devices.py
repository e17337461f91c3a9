"""A process that waits for a guest hands over the devices that the guest is to find here."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrd.direct.descriptors import DescriptorKinds
from migrd.direct.handoff import HandedOver
from migrd.direct.handoff_listener import HandoffListener
from migrd.direct.messages import ClientState, DeviceMessage, Features, Hello, OfferEnd, Welcome
from tests.direct.raw_client import RawClient, memory, offer

REGION, _, _ = offer()
WAITING = Hello(ClientState.INCOMING, int(Features.DEVICES), "guest", "token")


@pytest.fixture
def kinds(tmp_path: Path) -> DescriptorKinds:
    """To which /dev/zero is a VFIO device."""
    device = os.stat("/dev/zero").st_rdev
    number = tmp_path / f"sys/dev/char/{os.major(device)}:{os.minor(device)}"
    number.mkdir(parents=True)
    (tmp_path / "sys/class/vfio-dev").mkdir(parents=True)
    (number / "subsystem").symlink_to(tmp_path / "sys/class/vfio-dev")
    return DescriptorKinds(tmp_path)


@pytest.fixture
def device() -> Iterator[int]:
    fd = os.open("/dev/zero", os.O_RDWR)
    yield fd
    os.close(fd)


async def test_its_devices_are_there_before_its_guest(
    short_tmp_path: Path, kinds: DescriptorKinds, device: int
) -> None:
    came: list[HandedOver] = []
    path = short_tmp_path / "direct.sock"
    async with HandoffListener(path, on_client=came.append, kinds=kinds):
        raw = RawClient(path)
        raw.say(WAITING)
        raw.say(DeviceMessage("nic"), fds=[device])
        raw.say(OfferEnd(0, 0, 1))
        heard = await raw.hear()
        assert heard is not None
        assert isinstance(heard[1], Welcome)
        [client] = came
        assert [one.id for one in client.devices] == ["nic"]
        assert os.fstat(client.devices[0].device_fd).st_rdev == os.fstat(device).st_rdev
        assert not client.has_offered, "it has no memory yet"
        raw.close()


async def test_memory_is_not_taken_from_who_waits_for_it(
    short_tmp_path: Path, kinds: DescriptorKinds
) -> None:
    path = short_tmp_path / "direct.sock"
    async with HandoffListener(path, on_client=lambda client: None, kinds=kinds):
        raw = RawClient(path)
        raw.say(WAITING)
        with memory() as memfd:
            raw.say(REGION, fds=[memfd])
        raw.say(OfferEnd(1, 0, 0))
        assert "devices, and nothing else" in (await raw.error()).text
        raw.close()
