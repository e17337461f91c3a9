"""What a guest relies on when migrd moves the state of its devices: on the fake and on a kernel.

A subclass named Test... gives the fixture `world`. The devices are those of contract.vfio: emulated
mdevs that migrate, with P2P and PRE_COPY. A register stands for all that a guest leaves in one.

    leaving, arriving      two devices each, opened and bound as by their processes
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest

from migrd.core.device_state import DeviceState
from migrd.direct.device_frames import FrameWriter
from migrd.direct.devices import DestinationDevices, SourceDevices
from migrd.direct.offer import OfferedDevice
from migrd.engine.device_state_ports import MigratableDevice
from migrd.engine.threads import in_thread
from migrd.errors import DeviceError, DeviceNeedsReset, DeviceRefused, KernelRejected
from migrd.kernel.vfio import VfioDevice
from tests.contract.vfio import VfioWorld

S = DeviceState
REGISTERS = {"net0": 0x5A, "net1": 0xC3}
FRAME_HEADER_BYTES = 16
Frame = tuple[str, bytes]


class Frames:
    """Everything that a source has emitted."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    async def __call__(self, device_id: str, frame: bytes) -> None:
        self.frames.append((device_id, frame))


async def save(source: SourceDevices) -> list[Frame]:
    frames = Frames()
    await source.begin()
    await source.precopy(frames)
    await source.stop(frames)
    return frames.frames


async def take_all(destination: DestinationDevices, frames: list[Frame]) -> None:
    for device_id, frame in frames:
        await destination.take(device_id, frame)


async def load(destination: DestinationDevices, frames: list[Frame]) -> None:
    await destination.begin()
    await take_all(destination, frames)
    await destination.finish()


async def states(devices: dict[str, VfioDevice]) -> list[S]:
    """As the kernel tells."""
    return await in_thread(lambda: [one.state() for one in devices.values()])


async def registers(world: VfioWorld, devices: dict[str, VfioDevice]) -> dict[str, int]:
    return await in_thread(lambda: {name: world.register(one) for name, one in devices.items()})


def half_load(device: VfioDevice) -> None:
    stream = device.set_state(S.RESUMING)
    assert stream is not None
    with stream:
        stream.write(b"half")


def all_in(devices: SourceDevices | DestinationDevices, state: S) -> bool:
    return set(devices.states.values()) == {state}


class DeviceMovingContract:
    @pytest.fixture
    def iommufd(self, world: VfioWorld) -> Iterator[int]:
        fd = world.new_iommufd()
        yield fd
        world.close_iommufd(fd)

    @pytest.fixture
    def opener(self, world: VfioWorld) -> Callable[[int], MigratableDevice]:
        return lambda fd: VfioDevice.adopt(fd, world.system)

    def opened(
        self, world: VfioWorld, iommufd: int, ports: int = 2
    ) -> Iterator[dict[str, VfioDevice]]:
        devices = {}
        for name in REGISTERS:
            devices[name] = VfioDevice.open(world.new_mdev(ports), name, world.system)
            devices[name].bind(iommufd)
        yield devices
        for device in devices.values():
            device.close()

    @pytest.fixture
    def leaving(self, world: VfioWorld, iommufd: int) -> Iterator[dict[str, VfioDevice]]:
        for devices in self.opened(world, iommufd):
            for name, device in devices.items():
                world.set_register(device, REGISTERS[name])
            yield devices

    @pytest.fixture
    def arriving(self, world: VfioWorld, iommufd: int) -> Iterator[dict[str, VfioDevice]]:
        yield from self.opened(world, iommufd)

    @pytest.fixture
    def narrow(self, world: VfioWorld, iommufd: int) -> Iterator[dict[str, VfioDevice]]:
        """Of another type: what the others save does not fit."""
        yield from self.opened(world, iommufd, ports=1)

    @staticmethod
    def offered(devices: dict[str, VfioDevice]) -> list[OfferedDevice]:
        return [OfferedDevice(name, device.fd) for name, device in devices.items()]

    @pytest.fixture
    def source(
        self, leaving: dict[str, VfioDevice], opener: Callable[[int], MigratableDevice]
    ) -> SourceDevices:
        return SourceDevices(self.offered(leaving), opener)

    @pytest.fixture
    def destination(
        self, arriving: dict[str, VfioDevice], opener: Callable[[int], MigratableDevice]
    ) -> DestinationDevices:
        return DestinationDevices(self.offered(arriving), opener)

    # ---- it arrives

    async def test_what_the_guest_left_in_its_devices_is_in_the_others(
        self,
        world: VfioWorld,
        source: SourceDevices,
        destination: DestinationDevices,
        arriving: dict[str, VfioDevice],
    ) -> None:
        frames = await save(source)
        assert all_in(source, S.STOP_COPY)
        await load(destination, frames)
        assert all_in(destination, S.STOP), "nothing runs before the grant"
        await destination.run()
        await destination.run()  # as when the first answer was lost
        assert all_in(destination, S.RUNNING)
        assert await registers(world, arriving) == REGISTERS
        assert await source.close()
        assert await destination.close()

    async def test_the_estimate_is_what_is_sent(self, source: SourceDevices) -> None:
        before = await source.sizes()
        assert [one.initial_bytes for one in before] == [None, None], "not begun"
        await source.begin()
        sizes = await source.sizes()
        assert all(one.initial_bytes for one in sizes)
        frames = Frames()
        early = await source.precopy(frames)
        assert early == sum(one.initial_bytes or 0 for one in sizes)
        assert await source.precopy(frames) == 0
        late = await source.stop(frames)
        assert early + late == sum(one.stop_copy_bytes or 0 for one in sizes)
        await source.close()

    # ---- it stays

    @pytest.mark.parametrize("reached", ["begin", "precopy", "quiesce", "stop"])
    @pytest.mark.parametrize("daemon", ["this", "the next"])
    async def test_devices_that_stay_run_as_they_were_and_can_leave_again(
        self,
        world: VfioWorld,
        leaving: dict[str, VfioDevice],
        source: SourceDevices,
        opener: Callable[[int], MigratableDevice],
        reached: str,
        daemon: str,
    ) -> None:
        steps: dict[str, Callable[[], Awaitable[object]]] = {
            "begin": source.begin,
            "precopy": lambda: source.precopy(Frames()),
            "quiesce": source.quiesce,
            "stop": lambda: source.stop(Frames()),
        }
        for name, step in steps.items():
            await step()
            if name == reached:
                break
        if daemon == "the next":  # it knows nothing of what this one did
            await source.close()
            source = SourceDevices(self.offered(leaving), opener)
        await source.abandon()
        await source.abandon()
        assert all_in(source, S.RUNNING)
        assert await states(leaving) == [S.RUNNING] * 2
        assert await registers(world, leaving) == REGISTERS
        with pytest.raises(DeviceRefused) as failed:
            await source.stop(Frames())
        assert failed.value.code == "device_session_broken"
        assert len({one for one, _ in await save(source)}) == 2
        await source.close()

    async def test_a_source_whose_frames_are_not_taken_goes_no_further(
        self, source: SourceDevices, leaving: dict[str, VfioDevice]
    ) -> None:
        async def refuse(device_id: str, frame: bytes) -> None:
            raise ConnectionResetError("the other side is gone")

        await source.begin()
        with pytest.raises(ConnectionResetError):
            await source.precopy(refuse)
        with pytest.raises(DeviceRefused, match="other side is gone"):
            await source.stop(Frames())
        await source.abandon()
        assert await states(leaving) == [S.RUNNING] * 2
        await source.close()

    async def test_a_cancelled_stop_is_brought_back(
        self, source: SourceDevices, leaving: dict[str, VfioDevice]
    ) -> None:
        begun = asyncio.Event()

        async def hang(device_id: str, frame: bytes) -> None:
            begun.set()
            await asyncio.Event().wait()

        await source.begin()
        stopping = asyncio.create_task(source.stop(hang))
        await begun.wait()
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        await source.abandon()
        assert await states(leaving) == [S.RUNNING] * 2
        await source.close()

    # ---- what must not be loaded

    async def test_half_a_state_never_runs(
        self, source: SourceDevices, destination: DestinationDevices
    ) -> None:
        frames = await save(source)
        await destination.begin()
        await take_all(destination, frames[:-1])
        with pytest.raises(DeviceRefused, match="did not arrive whole") as failed:
            await destination.finish()
        assert failed.value.code == "device_state_incomplete"
        with pytest.raises(DeviceRefused):
            await destination.run()
        await destination.abandon()
        assert all_in(destination, S.RUNNING)
        await source.close()
        await destination.close()

    async def test_a_state_that_its_device_finds_incomplete_never_runs(
        self, source: SourceDevices, destination: DestinationDevices
    ) -> None:
        """Its end is told, but the device knows better."""
        frames = await save(source)
        writers = {name: FrameWriter() for name in REGISTERS}
        await destination.begin()
        for name, writer in writers.items():
            whole = b"".join(frame[FRAME_HEADER_BYTES:] for one, frame in frames if one == name)
            await destination.take(name, writer.pack(whole[:-1]))
        for one, writer in writers.items():
            await destination.take(one, writer.end())
        with pytest.raises(DeviceNeedsReset, match="only a reset"):
            await destination.finish()
        with pytest.raises(DeviceRefused):
            await destination.run()
        await destination.abandon()
        assert all_in(destination, S.RUNNING)
        await source.close()
        await destination.close()

    async def test_a_lost_a_repeated_and_a_strange_frame_are_refused(
        self, source: SourceDevices, destination: DestinationDevices
    ) -> None:
        frames = await save(source)
        wrong = {
            "lost": [frames[-1]],
            "repeated": [frames[0], frames[0]],
            "of a device that is not there": [("net7", frames[0][1])],
            "cut": [(frames[0][0], frames[0][1][:7])],
        }
        for what, some in wrong.items():
            await destination.begin()
            with pytest.raises(DeviceRefused):
                await take_all(destination, some)
            with pytest.raises(DeviceRefused):
                await destination.finish()
            await destination.abandon()
            assert all_in(destination, S.RUNNING), what
        await load(destination, frames)
        await destination.run()
        await source.close()
        await destination.close()

    async def test_the_state_of_another_kind_of_device_is_refused_by_the_device(
        self,
        source: SourceDevices,
        narrow: dict[str, VfioDevice],
        opener: Callable[[int], MigratableDevice],
    ) -> None:
        frames = await save(source)
        destination = DestinationDevices(self.offered(narrow), opener)
        await destination.begin()
        with pytest.raises(KernelRejected, match="another kind"):
            await take_all(destination, frames)
        await destination.abandon()
        assert all_in(destination, S.RUNNING)
        await source.close()
        await destination.close()

    async def test_a_device_left_half_loaded_is_reset_before_it_is_loaded(
        self,
        world: VfioWorld,
        source: SourceDevices,
        destination: DestinationDevices,
        arriving: dict[str, VfioDevice],
    ) -> None:
        await in_thread(half_load, arriving["net1"])
        await load(destination, await save(source))
        await destination.run()
        assert await registers(world, arriving) == REGISTERS
        await source.close()
        await destination.close()

    async def test_a_half_loaded_device_is_no_source_and_is_not_reset_for_it(
        self, source: SourceDevices, leaving: dict[str, VfioDevice]
    ) -> None:
        await in_thread(half_load, leaving["net1"])
        for ask in (source.begin, source.abandon):
            with pytest.raises(DeviceNeedsReset, match=r"net1.*RESUMING"):
                await ask()
        assert await states(leaving) == [S.RUNNING, S.RESUMING]
        await in_thread(leaving["net1"].reset)
        await source.close()

    async def test_closing_them_lets_go_of_the_devices_and_nothing_else(
        self, source: SourceDevices, leaving: dict[str, VfioDevice]
    ) -> None:
        await source.begin()
        assert await source.close()
        assert await source.close()
        with pytest.raises(DeviceError):
            await source.abandon()
        assert await states(leaving) == [S.PRE_COPY] * 2
        for device in leaving.values():
            await in_thread(device.reset)
