"""VFIO devices that fail, or that are unlike mtty: on the simulator, which can be made to."""

import errno
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrd.abi import vfio as abi
from migrd.core.device_state import DeviceState, NoWay, fall_back, supported_states, way
from migrd.core.devices import MigrationFlag
from migrd.errors import (
    KernelBusy,
    KernelDenied,
    KernelError,
    KernelGone,
    KernelRejected,
    KernelUnsupported,
)
from migrd.kernel.iommufd import Iommufd
from migrd.kernel.vfio import VfioDevice, split_flags
from migrd.kernel.vfio_calls import LOG_START, MIGRATION
from tests.contract.vfio import whole
from tests.fakes.vfio import Iommu, VfioKernel
from tests.fakes.vfio_device import SimDevice
from tests.kernel.vfio_bench import Bench

S = DeviceState
MIB = 1 << 20
RAW = abi.vfio_device_mig_state
FLAGS = [1, 0b11, 0b101, 0b111]


@pytest.fixture
def kernel() -> Iterator[VfioKernel]:
    kernel = VfioKernel()
    yield kernel
    assert kernel.left_open() == []


@pytest.fixture
def iommufd(kernel: VfioKernel) -> Iterator[Iommufd]:
    with Iommufd(kernel.open(), kernel.ioctl) as iommufd:
        yield iommufd


@pytest.fixture
def bench(kernel: VfioKernel, iommufd: Iommufd) -> Iterator[Bench]:
    bench = Bench(kernel, iommufd)
    yield bench
    for device in bench.opened:
        device.close()


# ---- moving, and what happens when it fails


def test_a_step_that_fails_leaves_the_guests_device_running(bench: Bench) -> None:
    sim = SimDevice(failing={(RAW.STOP, RAW.STOP_COPY): (errno.EIO, None)})
    device = bench.bind(sim)
    with pytest.raises(KernelError, match="it is in RUNNING again") as failed:
        device.move(S.STOP_COPY)
    assert failed.value.code == "device_fell_back"
    assert failed.value.errno == errno.EIO
    cause = failed.value.__cause__
    assert isinstance(cause, KernelError)
    assert isinstance(cause.__cause__, OSError), "the root cause is kept"
    assert sim.state == S.RUNNING
    assert sim.resets == 0


def test_a_session_outlives_a_failed_step_within_it(bench: Bench) -> None:
    sim = SimDevice(failing={(RAW.PRE_COPY_P2P, RAW.STOP_COPY): (errno.EIO, None)})
    device = bench.bind(sim)
    stream = device.move(S.PRE_COPY)
    assert stream is not None
    with stream:
        with pytest.raises(KernelError, match="it is in PRE_COPY again"):
            device.move(S.STOP_COPY)
        sim.failing.clear()
        device.move(S.STOP_COPY)
        assert len(whole(stream)) == 96


def test_a_device_that_went_into_error_is_reset_and_that_is_said(bench: Bench) -> None:
    sim = SimDevice(failing={(RAW.STOP, RAW.STOP_COPY): (errno.EIO, RAW.ERROR)})
    device = bench.bind(sim)
    with pytest.raises(KernelError, match="it was reset, and its state is lost") as failed:
        device.move(S.STOP_COPY)
    assert failed.value.code == "device_was_reset"
    assert (sim.state, sim.resets) == (S.RUNNING, 1)


def test_a_device_that_cannot_be_reset_either_is_lost(bench: Bench) -> None:
    sim = SimDevice(failing={(RAW.STOP, RAW.STOP_COPY): (errno.EIO, RAW.ERROR)}, has_reset=False)
    device = bench.bind(sim)
    with pytest.raises(KernelError, match="no way to be reset") as failed:
        device.move(S.STOP_COPY)
    assert failed.value.code == "device_lost"
    assert device.state() == S.ERROR


def test_from_error_no_way_leads_anywhere(bench: Bench) -> None:
    device = bench.bind(SimDevice(state=RAW.ERROR))
    with pytest.raises(KernelRejected) as failed:
        device.move(S.RUNNING)
    assert failed.value.code == "no_way"
    device.reset()
    assert device.state() == S.RUNNING


@pytest.mark.parametrize("flags", FLAGS)
def test_wherever_a_move_fails_the_device_ends_where_the_table_says(
    bench: Bench, flags: int
) -> None:
    """Every move, failing at each of its steps."""
    known, _ = split_flags(abi.vfio_migration(flags))
    swept = 0
    for start in (S.RUNNING, S.RUNNING_P2P, S.STOP, S.STOP_COPY, S.PRE_COPY, S.PRE_COPY_P2P):
        for target in DeviceState:
            try:
                steps = way(start, target, known)
            except NoWay:
                continue
            for step in itertools.pairwise(steps):
                sim = SimDevice(migration_flags=flags)
                device = bench.bind(sim)
                stream = device.move(start)
                back = fall_back(start, target, known)
                planted = (RAW(step[0]), RAW(step[1]))
                sim.failing[planted] = (errno.EIO, None)
                with pytest.raises(KernelError) as failed:
                    device.move(target)
                if step[1] == back:  # the way back is the step that fails
                    assert failed.value.code == "device_was_reset"
                else:
                    assert failed.value.code == "device_fell_back"
                    assert sim.state == back
                if stream is not None:
                    stream.close()
                device.close()
                swept += 1
    assert swept >= 6


@pytest.mark.parametrize("flags", FLAGS)
def test_devices_with_fewer_states_move_as_the_table_says(bench: Bench, flags: int) -> None:
    """The simulator has the kernel's table, which steps over what a device lacks."""
    known, _ = split_flags(abi.vfio_migration(flags))
    for start, target in itertools.product(supported_states(known), DeviceState):
        if start == target:
            continue
        sim = SimDevice(migration_flags=flags, state=start)
        device = bench.bind(sim)
        try:
            way(start, target, known)
        except NoWay:
            reaches = False
        else:
            reaches = start != S.RESUMING  # there is no data
        try:
            stream = device.set_state(target)
        except KernelRejected:
            assert not reaches, f"{start.name} -> {target.name}"
            assert sim.state == start
        else:
            assert reaches, f"{start.name} -> {target.name}"
            assert sim.state == target
            if stream is not None:
                stream.close()
        device.close()


def test_a_state_of_a_newer_kernel_is_kept_and_left_alone(bench: Bench) -> None:
    device = bench.bind(SimDevice(state=12))
    assert device.state() == 12
    assert device.state().name == "UNKNOWN_12"
    with pytest.raises(KernelRejected, match="UNKNOWN_12"):
        device.move(S.RUNNING)


# ---- the data stream


def test_the_end_of_what_there_is_may_be_said_as_enomsg(bench: Bench) -> None:
    device = bench.bind(SimDevice(says_enomsg=True))
    stream = device.move(S.PRE_COPY)
    assert stream is not None
    with stream:
        assert whole(stream)
        assert stream.read() == b""
        device.move(S.STOP_COPY)
        assert whole(stream)
        assert stream.read() == b""


def test_a_device_that_takes_little_at_a_time_gets_all_of_it(bench: Bench) -> None:
    source = bench.bind(SimDevice(registers=b"guest"))
    stream = source.move(S.STOP_COPY)
    assert stream is not None
    with stream:
        data = whole(stream)
    slow = SimDevice(write_bytes=7)
    device = bench.bind(slow)
    target = device.move(S.RESUMING)
    assert target is not None
    with target:
        target.write(data)
        device.move(S.RUNNING)
    assert slow.registers == b"guest"


def test_a_closed_descriptor_is_never_used_again(bench: Bench) -> None:
    device = bench.bind(SimDevice())
    stream = device.move(S.PRE_COPY)
    assert stream is not None
    for one in (stream, device):
        one.close()
        one.close()
    with pytest.raises(KernelGone) as failed:
        stream.read()
    assert failed.value.errno == errno.EBADF
    with pytest.raises(KernelGone):
        device.state()


def test_a_session_found_on_the_way_back_is_not_left_open(bench: Bench, kernel: VfioKernel) -> None:
    """A device that was reopened in PRE_COPY has lost its session: moving on opens a new one."""
    sim = SimDevice(state=RAW.PRE_COPY_P2P)
    sim.failing[(RAW.PRE_COPY_P2P, RAW.STOP_COPY)] = (errno.EIO, RAW.STOP)
    device = bench.bind(sim)
    with pytest.raises(KernelError) as failed:
        device.move(S.STOP_COPY)
    assert failed.value.code == "device_fell_back"
    assert "device-data" not in kernel.left_open()


# ---- binding and attaching


@pytest.mark.parametrize(
    ("number", "error", "code"),
    [
        (errno.EPERM, KernelDenied, "unsafe_interrupts"),
        (errno.EBUSY, KernelBusy, "device_in_use"),
        (errno.EINVAL, KernelBusy, "device_in_use"),
        (errno.ENODEV, KernelGone, "no_iommu"),
        (errno.EIO, KernelError, "kernel_error"),
    ],
)
def test_why_a_bind_fails_is_told_apart(
    kernel: VfioKernel, iommufd: Iommufd, number: int, error: type[KernelError], code: str
) -> None:
    path = kernel.add(SimDevice())
    kernel.nodes[path].bind_errno = number
    with (
        VfioDevice.open(path, "0000:41:00.2", kernel.system) as device,
        pytest.raises(error, match=r"0000:41:00\.2") as failed,
    ):
        device.bind(iommufd.fileno())
    assert (failed.value.code, failed.value.errno) == (code, number)
    assert isinstance(failed.value.__cause__, OSError)


def test_a_page_table_that_tracks_is_refused_for_a_device_that_cannot(
    bench: Bench, iommufd: Iommufd
) -> None:
    can, cannot = bench.bind(SimDevice(), Iommu.TRACKS), bench.bind(SimDevice(), Iommu.PLAIN)
    dev_id = next(iter(iommufd.find_objects().devices))
    ioas = iommufd.allocate_ioas()
    hwpt = iommufd.allocate_hwpt(dev_id, ioas, dirty_tracking=True)
    assert can.attach(hwpt.id, tracks_dirty=True) == hwpt.id
    with pytest.raises(KernelRejected, match="page table of its own") as failed:
        cannot.attach(hwpt.id, tracks_dirty=True)
    assert failed.value.code == "iommu_no_dirty_tracking_on_attach"
    with pytest.raises(KernelRejected) as failed:
        cannot.attach(hwpt.id)
    assert failed.value.code == "page_table_does_not_fit"
    assert cannot.attach(ioas.id) not in (hwpt.id, ioas.id), "one that the kernel makes"
    cannot.detach()
    with pytest.raises(KernelBusy):
        hwpt.destroy()
    can.detach()
    hwpt.destroy()


# ---- features


def test_only_enotty_says_that_a_feature_is_not_there(bench: Bench, kernel: VfioKernel) -> None:
    device = bench.bind(SimDevice(migration_flags=None, log=None))
    assert device.migration_flags() is None
    assert device.stop_copy_bytes() is None
    assert not device.supports(LOG_START)
    with pytest.raises(KernelUnsupported) as missing:
        device.state()
    assert missing.value.code == "feature_not_supported"
    (path,) = kernel.nodes
    for number in (errno.EOPNOTSUPP, errno.EIO, errno.EPERM, errno.ENODEV):
        kernel.nodes[path].failures = {abi.VFIO_DEVICE_FEATURE: number}
        for ask in (device.migration_flags, device.stop_copy_bytes):
            with pytest.raises(KernelError) as failed:
                ask()
            assert failed.value.errno == number
        with pytest.raises(KernelError):
            device.supports(MIGRATION)


def test_flags_that_nobody_here_knows_are_kept(bench: Bench) -> None:
    device = bench.bind(SimDevice(migration_flags=0b1001 | 1 << 63, device_flags=1 << 31 | 2))
    flags = device.migration_flags()
    assert flags is not None
    assert split_flags(flags) == (frozenset({MigrationFlag.STOP_COPY}), 1 << 63 | 8)
    assert int(device.flags()) == 1 << 31 | 2
    assert abi.vfio_device_flags.PCI in device.flags()


def test_what_is_opened_is_not_inherited_by_children(tmp_path: Path) -> None:
    node = tmp_path / "vfio0"
    node.touch()
    with VfioDevice.open(str(node), "a") as device:
        assert not os.get_inheritable(device.fd)
