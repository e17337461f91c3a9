"""What migrd relies on in a VFIO device that migrates: run on the fake and on a kernel.

A subclass named Test... gives the fixture `world`. The device is an emulated mdev: it migrates,
with P2P and PRE_COPY, its DMA log is a stub, and it has no IOMMU.
"""

import ctypes
import errno
import itertools
from collections.abc import Iterator
from typing import Protocol

import pytest

from migrd.abi import vfio as abi
from migrd.core.device_state import DeviceState, NoWay, fall_back, opens_session, way
from migrd.core.devices import MigrationFlag
from migrd.errors import KernelBusy, KernelError, KernelGone, KernelRejected
from migrd.kernel.vfio import DmaRange, VfioDevice, split_flags
from migrd.kernel.vfio_calls import (
    DATA_SIZE,
    LOG_REPORT,
    LOG_START,
    LOG_STOP,
    MIGRATION,
    SET_STATE,
    Feature,
    SystemCalls,
)
from migrd.kernel.vfio_data import DataStream, PrecopyLeft

S = DeviceState
MIB = 1 << 20
ALL = frozenset(MigrationFlag)


class VfioWorld(Protocol):
    """Somewhere with mdevs."""

    system: SystemCalls

    def new_mdev(self, ports: int = 2) -> str:
        """Path of the character device of a fresh mdev."""

    def new_iommufd(self) -> int: ...

    def new_ioas(self, iommufd: int) -> int: ...

    def close_iommufd(self, fd: int) -> None: ...

    def set_register(self, device: VfioDevice, value: int) -> None:
        """As the guest's driver would."""

    def register(self, device: VfioDevice) -> int: ...


def whole(stream: DataStream, chunk_bytes: int = 50) -> bytes:
    return b"".join(iter(lambda: stream.read(chunk_bytes), b""))


class VfioContract:
    @pytest.fixture
    def iommufd(self, world: VfioWorld) -> Iterator[int]:
        fd = world.new_iommufd()
        yield fd
        world.close_iommufd(fd)

    @pytest.fixture
    def device(self, world: VfioWorld, iommufd: int) -> Iterator[VfioDevice]:
        with VfioDevice.open(world.new_mdev(), "a", world.system) as device:
            device.bind(iommufd)
            yield device

    @pytest.fixture
    def other(self, world: VfioWorld, iommufd: int) -> Iterator[VfioDevice]:
        with VfioDevice.open(world.new_mdev(), "b", world.system) as device:
            device.bind(iommufd)
            yield device

    @pytest.fixture
    def narrow(self, world: VfioWorld, iommufd: int) -> Iterator[VfioDevice]:
        """Of another type: its data does not fit the others."""
        with VfioDevice.open(world.new_mdev(ports=1), "c", world.system) as device:
            device.bind(iommufd)
            yield device

    # ---- open, bind, attach

    def test_a_device_that_is_not_there_is_named(self, world: VfioWorld) -> None:
        with pytest.raises(KernelGone, match=r"0000:41:00\.2.*VFIO driver") as failed:
            VfioDevice.open("/dev/vfio/devices/vfio4095", "0000:41:00.2", world.system)
        assert failed.value.errno == errno.ENOENT
        assert failed.value.code == "no_vfio_cdev"

    def test_nothing_can_be_asked_before_bind(self, world: VfioWorld) -> None:
        with VfioDevice.open(world.new_mdev(), "a", world.system) as device:
            for ask in (device.migration_flags, device.flags, device.state, device.reset):
                with pytest.raises(KernelRejected) as failed:
                    ask()
                assert failed.value.errno == errno.EINVAL

    def test_a_device_has_one_owner_until_it_closes(self, world: VfioWorld, iommufd: int) -> None:
        path = world.new_mdev()
        with VfioDevice.open(path, "a", world.system) as first:
            assert first.bind(iommufd) > 0
            with pytest.raises(KernelBusy, match="device a") as failed:
                first.bind(iommufd)
            assert failed.value.code == "device_in_use"
            with (
                VfioDevice.open(path, "a", world.system) as second,
                pytest.raises(KernelBusy, match="stop that VM"),
            ):
                second.bind(iommufd)
        with VfioDevice.open(path, "a", world.system) as third:
            third.bind(iommufd)

    def test_it_is_attached_to_an_ioas_and_to_no_page_table(
        self, world: VfioWorld, device: VfioDevice, iommufd: int
    ) -> None:
        ioas = world.new_ioas(iommufd)
        assert device.attach(ioas) == ioas
        device.detach()
        with pytest.raises(KernelGone) as failed:
            device.attach(4095)
        assert failed.value.code == "no_page_table"

    # ---- what it can

    def test_its_features_are_told_apart(self, device: VfioDevice) -> None:
        flags = device.migration_flags()
        assert flags is not None
        assert split_flags(flags) == (ALL, 0)
        for feature in (MIGRATION, DATA_SIZE, LOG_START, LOG_STOP, LOG_REPORT):
            assert device.supports(feature)
        assert not device.supports(Feature("of the future", 63, MIGRATION.access))
        with pytest.raises(KernelRejected):  # no answer, and not taken for one
            device.supports(Feature("MIGRATION, set", MIGRATION.number, SET_STATE.access))

    def test_its_reset_works_though_it_does_not_announce_one(self, device: VfioDevice) -> None:
        assert not device.flags() & abi.vfio_device_flags.RESET
        device.set_state(S.STOP)
        device.reset()
        assert device.state() == S.RUNNING

    # ---- saving

    def test_precopy_and_stop_copy_are_one_stream(
        self, device: VfioDevice, world: VfioWorld
    ) -> None:
        stream = device.set_state(S.PRE_COPY)
        assert stream is not None
        with stream:
            begun = stream.precopy_left()
            assert begun.initial_bytes > 0
            early = stream.read()
            assert len(early) == begun.initial_bytes
            assert stream.precopy_left() == PrecopyLeft(0, 0)
            assert stream.read() == b""  # for now; never an error
            assert device.set_state(S.STOP_COPY) is None  # the session goes on
            with pytest.raises(KernelRejected) as failed:
                stream.precopy_left()
            assert failed.value.code == "not_in_precopy"
            assert len(early + whole(stream)) == device.stop_copy_bytes()

    @pytest.mark.parametrize("end", [S.STOP, S.RUNNING])
    def test_a_session_ends_with_its_state(self, device: VfioDevice, end: S) -> None:
        stream = device.set_state(S.PRE_COPY)
        assert stream is not None
        with stream:
            device.set_state(end)
            assert device.state() == end
            with pytest.raises(KernelGone) as failed:
                stream.read()
            assert failed.value.code == "session_ended"

    def test_a_session_ends_with_its_device_and_the_state_stays(
        self, world: VfioWorld, iommufd: int
    ) -> None:
        path = world.new_mdev()
        with VfioDevice.open(path, "a", world.system) as device:
            device.bind(iommufd)
            stream = device.set_state(S.PRE_COPY)
        assert stream is not None
        with stream, pytest.raises(KernelGone):
            stream.read()
        with VfioDevice.open(path, "a", world.system) as again:
            again.bind(iommufd)
            assert again.state() == S.PRE_COPY
            again.reset()
            assert again.state() == S.RUNNING

    # ---- loading

    def save(self, device: VfioDevice) -> bytes:
        stream = device.move(S.STOP_COPY)
        assert stream is not None
        with stream:
            return whole(stream)

    def test_what_the_guest_left_in_a_device_arrives_in_the_other(
        self, world: VfioWorld, device: VfioDevice, other: VfioDevice
    ) -> None:
        world.set_register(device, 0x5A)
        data = self.save(device)
        stream = other.move(S.RESUMING)
        assert stream is not None
        with stream:
            stream.write(data[:70])
            stream.write(data[70:])
            with pytest.raises(KernelError):
                stream.read()
            other.move(S.RUNNING)
        assert world.register(other) == 0x5A

    @pytest.mark.parametrize("end", [S.STOP, S.RUNNING])
    def test_a_device_with_half_its_data_never_runs_until_it_is_reset(
        self, device: VfioDevice, other: VfioDevice, end: S
    ) -> None:
        data = self.save(device)
        stream = other.move(S.RESUMING)
        assert stream is not None
        with stream:
            stream.write(data[:-1])
            with pytest.raises(KernelRejected) as failed:
                other.set_state(end)
            assert failed.value.code == "device_state_refused"
            assert other.state() == S.RESUMING
            with pytest.raises(KernelError, match="was reset") as reset:
                other.move(end)
            assert reset.value.code == "device_was_reset"
        assert other.state() == S.RUNNING

    def test_data_of_another_kind_of_device_is_refused(
        self, device: VfioDevice, narrow: VfioDevice
    ) -> None:
        data = self.save(device)
        stream = narrow.move(S.RESUMING)
        assert stream is not None
        with stream, pytest.raises(KernelRejected, match="another kind") as failed:
            stream.write(data[:32])
        assert failed.value.errno == errno.EFAULT
        narrow.reset()

    def test_data_beyond_its_size_is_refused(self, other: VfioDevice) -> None:
        stream = other.move(S.RESUMING)
        assert stream is not None
        with stream, pytest.raises(KernelRejected, match="more than") as failed:
            stream.write(bytes(65536))
        assert failed.value.code == "device_data_too_long"
        other.reset()

    # ---- states

    def test_every_move_ends_as_the_table_says(self, device: VfioDevice) -> None:
        """All of them: what the table has no way for, the kernel refuses, and the other way round.
        From RESUMING nothing can be left without data: see above."""
        for start, target in itertools.product(DeviceState, DeviceState):
            if start in (S.ERROR, S.RESUMING):
                continue
            self.bring(device, start)
            try:
                way(start, target, ALL)
            except NoWay:
                with pytest.raises(KernelRejected):
                    device.set_state(target)
                assert device.state() == start
                continue
            stream = device.set_state(target)
            assert device.state() == target, f"{start.name} -> {target.name}"
            assert (stream is not None) == opens_session(start, target, ALL)
            if stream is not None:
                stream.close()

    def test_a_fall_back_is_reached_from_every_state(self, device: VfioDevice) -> None:
        """As if the move had failed there."""
        for start, target in itertools.product(DeviceState, DeviceState):
            if start in (S.ERROR, S.RESUMING):
                continue
            try:
                steps, back = way(start, target, ALL), fall_back(start, target, ALL)
            except NoWay:
                continue
            assert back is not None
            for stopped_at in steps[:-1]:
                self.bring(device, stopped_at)
                assert device.set_state(back) is None
                assert device.state() == back

    def bring(self, device: VfioDevice, state: DeviceState) -> None:
        device.reset()
        stream = device.set_state(state)
        if stream is not None:
            stream.close()

    @pytest.mark.parametrize("number", [S.ERROR, 99])
    def test_a_state_that_cannot_be_asked_for_changes_nothing(
        self, device: VfioDevice, number: int
    ) -> None:
        for way_of_asking in (device.set_state, device.move):
            with pytest.raises(KernelRejected):
                way_of_asking(DeviceState(number))
        assert device.state() == S.RUNNING

    # ---- the DMA log

    def test_the_log_is_read_only_while_it_is_on_and_where_it_is(self, device: VfioDevice) -> None:
        logged = DmaRange(0x1000_0000, 16 * MIB)
        with pytest.raises(KernelRejected) as failed:
            device.read_dma_log(logged.iova, logged.length_bytes, 4096)
        assert failed.value.code == "dma_not_logged"
        assert device.start_dma_log([logged], 4096) > 0
        with pytest.raises(KernelRejected) as failed:
            device.start_dma_log([logged], 4096)
        assert failed.value.code == "dma_log_on"
        found = device.read_dma_log(logged.iova, 2 * MIB, 4096)
        assert (found.pages, found.dirty_pages, len(found.bits)) == (512, 0, 64)
        with pytest.raises(KernelRejected):
            device.read_dma_log(logged.iova + 15 * MIB, 2 * MIB, 4096)
        device.stop_dma_log()
        device.stop_dma_log()
        with pytest.raises(KernelRejected):
            device.read_dma_log(logged.iova, 2 * MIB, 4096)

    def test_the_largest_log_is_taken(self, device: VfioDevice) -> None:
        device.start_dma_log([DmaRange(i * MIB, 4096) for i in range(256)], 4096)
        device.stop_dma_log()

    def test_ranges_may_touch_and_come_in_any_order(self, device: VfioDevice) -> None:
        ranges = [DmaRange(2 * MIB, MIB), DmaRange(0, MIB), DmaRange(MIB, MIB)]
        device.start_dma_log(ranges, 4096)
        device.stop_dma_log()

    @pytest.mark.parametrize(
        ("ranges", "number"),
        [
            ([], errno.EINVAL),
            ([(i * MIB, 4096) for i in range(257)], errno.E2BIG),
            ([(0x1000_0800, 16 * MIB)], errno.EINVAL),
            ([(0, 2 * MIB), (MIB, 2 * MIB)], errno.EINVAL),
            ([((1 << 64) - 4096, 8192)], errno.EOVERFLOW),
            ([((1 << 64) - 4096, 4096)], errno.EOVERFLOW),
        ],
        ids=["none", "too many", "misaligned", "overlapping", "overflowing", "up to the end"],
    )
    def test_ranges_that_the_kernel_refuses_are_never_sent(
        self, device: VfioDevice, ranges: list[tuple[int, int]], number: int
    ) -> None:
        assert start_log_unchecked(device, ranges) == number
        with pytest.raises(KernelRejected) as failed:
            device.start_dma_log([DmaRange(*one) for one in ranges], 4096)
        assert failed.value.code == "bad_dma_ranges"


def start_log_unchecked(device: VfioDevice, ranges: list[tuple[int, int]]) -> int:
    """The kernel's own errno; 0: it takes them."""
    array = (abi.vfio_device_feature_dma_logging_range * max(1, len(ranges)))()
    for entry, (iova, length) in zip(array, ranges, strict=False):
        entry.iova, entry.length = iova, length
    control = abi.vfio_device_feature_dma_logging_control(
        page_size=4096, num_ranges=len(ranges), ranges=ctypes.addressof(array)
    )
    header = abi.vfio_device_feature(argsz=8 + 24, flags=LOG_START.number | LOG_START.access)
    try:
        device._system.ioctl(
            device.fd, abi.VFIO_DEVICE_FEATURE, bytearray(bytes(header) + bytes(control))
        )
    except OSError as error:
        return error.errno or 0
    return 0
