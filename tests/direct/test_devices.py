"""Order among peers, devices that can less, devices that fail, hang, or never end; simulated.

Longer than 400 lines because it is one list of cases.

What holds of every device, on the real kernel too: tests/contract/device_moving.py.
"""

import asyncio
import errno
import time

import pytest

from migrd.abi.vfio import vfio_device_mig_state as S
from migrd.core.device_state import DeviceState
from migrd.direct.devices import (
    DeviceLimits,
    SourceDevices,
    run_devices,
)
from migrd.direct.offer import OfferedDevice
from migrd.engine.threads import in_thread
from migrd.errors import (
    DeviceError,
    DeviceNeedsReset,
    DeviceRefused,
    DeviceTimedOut,
    KernelGone,
)
from tests.contract.device_moving import load, save
from tests.direct.device_rig import (
    SMALL,
    Hold,
    Rig,
    Strike,
    destination_of,
    in_order,
    sets_state,
    source_of,
)

NO_P2P = 1 | 4
STOP_COPY_ONLY = 1
NO_PRE_COPY = 1 | 2
HURRIED = DeviceLimits(arc_s=0.2, call_s=0.2)
P2P = {"RUNNING_P2P", "PRE_COPY_P2P"}


async def drop(device_id: str, frame: bytes) -> None:
    """Takes a frame."""


# ---- peers


async def test_all_peers_are_quiet_before_any_is_stopped_and_before_any_is_started(
    rig: Rig, other: Rig
) -> None:
    rig.add("a")
    rig.add("b", migration_flags=NO_PRE_COPY)
    rig.add("c")
    for name in "abc":
        other.add(name)
    source, destination = source_of(rig), destination_of(other)
    frames = await save(source)
    assert rig.states() == ["STOP_COPY"] * 3
    assert in_order(rig.trace, early=P2P, late={"STOP", "STOP_COPY"})
    rig.trace.clear()
    await source.abandon()
    assert rig.states() == ["RUNNING"] * 3
    assert in_order(rig.trace, early={"RUNNING_P2P"}, late={"RUNNING"})
    await load(destination, frames)
    other.trace.clear()
    await destination.run()
    assert in_order(other.trace, early={"RUNNING_P2P"}, late={"RUNNING"})
    await source.close()
    await destination.close()


async def test_no_device_can_write_memory_after_quiesce_and_no_data_is_read_before(
    rig: Rig,
) -> None:
    rig.add("a")
    rig.add("b", migration_flags=NO_PRE_COPY)
    source = source_of(rig)
    await source.begin()
    assert rig.states() == ["PRE_COPY", "RUNNING"]
    await source.quiesce()
    await source.quiesce()
    assert rig.states() == ["STOP_COPY", "STOP_COPY"]
    assert rig.reads == 0
    await source.close()


@pytest.mark.parametrize("flags", [NO_P2P, STOP_COPY_ONLY, NO_PRE_COPY])
async def test_one_device_that_can_less_is_moved(rig: Rig, other: Rig, flags: int) -> None:
    rig.add("a", migration_flags=flags, registers=b"kept")
    other.add("a", migration_flags=flags)
    source, destination = source_of(rig), destination_of(other)
    await load(destination, await save(source))
    await destination.run()
    assert other.states() == ["RUNNING"]
    assert other.sims["a"].registers == b"kept"
    await source.close()
    await destination.close()


async def test_peers_without_p2p_are_refused_before_anything_is_touched(rig: Rig) -> None:
    rig.add("a")
    rig.add("b", migration_flags=NO_P2P)
    for devices in (source_of(rig), destination_of(rig)):
        with pytest.raises(DeviceRefused, match=r"device b .*no P2P") as failed:
            await devices.begin()
        assert failed.value.code == "device_no_p2p"
        await devices.close()
    assert rig.trace == []


@pytest.mark.parametrize("flags", [None, 0])
async def test_a_device_that_cannot_migrate_is_refused_before_anything_is_touched(
    rig: Rig, flags: int | None
) -> None:
    rig.add("a")
    rig.add("b", migration_flags=flags)
    source = source_of(rig)
    with pytest.raises(DeviceRefused, match=r"device b .*cannot migrate") as failed:
        await source.begin()
    assert failed.value.code == "device_cannot_migrate"
    assert rig.trace == []
    await source.close()


async def test_a_guest_without_devices_has_nothing_to_wait_for(rig: Rig) -> None:
    source, destination = source_of(rig), destination_of(rig)
    await load(destination, await save(source))
    await destination.run()
    await source.abandon()
    assert await source.sizes() == []
    assert await source.close()


async def test_two_devices_of_one_name_are_refused(rig: Rig) -> None:
    rig.add("a")
    with pytest.raises(DeviceRefused):
        SourceDevices(rig.offered * 2, rig.open_device)


async def test_a_descriptor_that_is_closed_is_said_to_be_gone(rig: Rig) -> None:
    source = SourceDevices([OfferedDevice("a", 1 << 20)], rig.open_device)
    with pytest.raises(KernelGone):
        await source.begin()
    await source.close()


async def test_flags_of_a_newer_kernel_change_nothing(rig: Rig) -> None:
    rig.add("a", migration_flags=7 | 1 << 9)
    source = source_of(rig)
    assert await save(source)
    await source.close()


# ---- how much, and how fast


async def test_precopy_of_a_device_that_never_ends_ends(rig: Rig) -> None:
    rig.add("a", grows_by=b"more" * 8)
    source = source_of(rig)
    await source.begin()
    assert await source.precopy(drop) == 32, "the header, in two reads; what came since is next"
    assert await source.precopy(drop) > 0
    [size] = await source.sizes()
    assert size.initial_bytes
    await source.abandon()
    assert rig.states() == ["RUNNING"]
    await source.close()


async def test_a_device_that_says_enomsg_has_nothing_for_now(rig: Rig) -> None:
    rig.add("a", says_enomsg=True)
    source = source_of(rig)
    await save(source)
    await source.close()


async def test_a_device_that_cannot_tell_its_size_is_told_as_unknown(rig: Rig) -> None:
    rig.add("a", has_data_size=False)
    source = source_of(rig)
    await source.begin()
    [size] = await source.sizes()
    assert size.stop_copy_bytes is None
    assert size.initial_bytes == 24
    await source.abandon()
    await source.close()


async def test_no_more_is_read_than_what_the_other_side_keeps_up_with(rig: Rig) -> None:
    rig.add("a", ports=100)  # 3624 bytes: 227 chunks
    source = source_of(rig)
    await source.begin()
    taken, go_on = asyncio.Event(), asyncio.Event()

    async def slow(device_id: str, frame: bytes) -> None:
        taken.set()
        await go_on.wait()

    stopping = asyncio.create_task(source.stop(slow))
    await taken.wait()
    for _ in range(20):
        await asyncio.sleep(0.005)
    assert rig.reads <= 2
    go_on.set()
    assert await stopping == 24 + 3600
    await source.close()


# ---- failures


@pytest.mark.parametrize(
    ("step", "lands", "stands"),
    [
        ((S.RUNNING, S.PRE_COPY), None, "RUNNING"),
        ((S.PRE_COPY, S.PRE_COPY_P2P), None, "PRE_COPY"),
        ((S.PRE_COPY_P2P, S.STOP_COPY), None, "PRE_COPY_P2P"),
    ],
)
async def test_a_failed_arc_falls_back_and_says_so_and_all_run_again(
    rig: Rig, step: tuple[S, S], lands: S | None, stands: str
) -> None:
    rig.add("a")
    rig.add("b", failing={step: (errno.EIO, lands)}, registers=b"kept")
    source = source_of(rig)
    with pytest.raises(DeviceError, match=f"in {stands} again") as failed:
        await save(source)
    assert failed.value.code == "device_fell_back"
    assert rig.states()[1] == stands
    await source.abandon()
    assert rig.states() == ["RUNNING", "RUNNING"]
    assert rig.sims["b"].registers == b"kept"
    await source.close()


@pytest.mark.parametrize("step", [(S.RUNNING, S.PRE_COPY), (S.PRE_COPY_P2P, S.STOP_COPY)])
async def test_a_device_in_error_is_told_and_never_reset_and_the_others_run(
    rig: Rig, step: tuple[S, S]
) -> None:
    rig.add("a")
    rig.add("b", failing={step: (errno.EIO, S.ERROR)})
    source = source_of(rig)
    with pytest.raises(DeviceNeedsReset, match=r"device b .*ERROR"):
        await save(source)
    for _ in range(2):
        with pytest.raises(DeviceNeedsReset, match=r"device b .*ERROR"):
            await source.abandon()
    assert rig.states() == ["RUNNING", "ERROR"]
    assert rig.sims["b"].resets == 0
    await source.close()


async def test_a_state_that_this_version_has_not_met_is_told(rig: Rig) -> None:
    rig.add("a").state = 99
    source = source_of(rig)
    with pytest.raises(DeviceNeedsReset, match="UNKNOWN_99"):
        await source.begin()
    assert source.states["a"] == DeviceState(99)
    await source.close()


@pytest.mark.parametrize("found", [S.ERROR, S.STOP, S.RESUMING, S.STOP_COPY])
async def test_a_destination_device_is_cleared_before_it_is_loaded(
    rig: Rig, other: Rig, found: S
) -> None:
    rig.add("a", registers=b"kept")
    other.add("a").state = found
    source, destination = source_of(rig), destination_of(other)
    await load(destination, await save(source))
    await destination.run()
    assert (other.sims["a"].resets, other.sims["a"].registers) == (1, b"kept")
    await source.close()
    await destination.close()


async def test_a_destination_device_that_cannot_be_reset_is_told(rig: Rig, other: Rig) -> None:
    other.add("a", has_reset=False)
    other.add("b")
    destination = destination_of(other)
    await destination.begin()
    with pytest.raises(DeviceNeedsReset, match=r"device a .*RESUMING"):
        await destination.abandon()
    assert other.states() == ["RESUMING", "RUNNING"]
    await destination.close()


async def test_a_device_that_does_not_start_does_not_keep_the_others_from_it(
    rig: Rig, other: Rig
) -> None:
    for name in "ab":
        rig.add(name)
        other.add(name)
    source, destination = source_of(rig), destination_of(other)
    await load(destination, await save(source))
    other.sims["a"].failing = {(S.RUNNING_P2P, S.RUNNING): (errno.EIO, None)}
    with pytest.raises(DeviceError, match="device a"):
        await destination.run()
    assert other.states() == ["RUNNING_P2P", "RUNNING"]
    other.sims["a"].failing = {}
    await destination.run()
    assert other.states() == ["RUNNING", "RUNNING"]
    await source.close()
    await destination.close()


async def test_a_device_that_stopped_half_way_falls_back_on_its_way(rig: Rig) -> None:
    rig.add("a", migration_flags=NO_PRE_COPY, failing={(S.STOP, S.STOP_COPY): (errno.EIO, None)})
    source = source_of(rig)
    with pytest.raises(DeviceError, match="stands in RUNNING_P2P again"):
        await save(source)
    assert rig.steps_of("a") == ["RUNNING_P2P", "STOP", "RUNNING_P2P"]
    await source.close()


async def test_who_resumes_a_guest_that_another_daemon_stopped_finds_its_devices_stopped(
    rig: Rig,
) -> None:
    rig.add("a", state=S.STOP)
    rig.add("b", state=S.STOP_COPY)
    await run_devices(rig.offered, rig.open_device, SMALL)
    assert in_order(rig.trace, early={"RUNNING_P2P"}, late={"RUNNING"})
    assert rig.states() == ["RUNNING", "RUNNING"]
    rig.trace.clear()
    await run_devices(rig.offered, rig.open_device, SMALL)
    assert rig.trace == []


async def test_a_passing_failure_on_the_way_back_needs_no_second_order(rig: Rig) -> None:
    rig.add("a")
    source = source_of(rig)
    await source.begin()
    rig.strike = Strike(2, after_effect=False)  # after it was looked at
    await source.abandon()
    assert rig.strike.struck is not None
    assert rig.states() == ["RUNNING"]
    await source.close()


async def test_a_session_that_is_over_leaves_no_descriptor(rig: Rig) -> None:
    rig.add("a")
    source = source_of(rig)
    await source.begin()
    assert "device-data" in await in_thread(rig.kernel.left_open)
    await source.abandon()
    assert "device-data" not in await in_thread(rig.kernel.left_open)
    await source.close()


async def test_frames_are_emitted_one_at_a_time(rig: Rig) -> None:
    for name in "abc":
        rig.add(name)
    source = source_of(rig)
    await source.begin()
    under_way = []

    async def emit(device_id: str, frame: bytes) -> None:
        under_way.append(device_id)
        assert len(under_way) == 1
        await asyncio.sleep(0)
        under_way.clear()

    await source.stop(emit)
    await source.close()


# ---- a call that hangs


async def test_a_device_that_hangs_is_told_and_the_others_are_not_held_up(rig: Rig) -> None:
    rig.add("a")
    rig.add("b")
    source = source_of(rig, HURRIED)
    await source.begin()
    hold = Hold(sets_state(S.STOP_COPY))
    rig.hold = hold
    with pytest.raises(DeviceTimedOut, match=r"has not ended bringing to STOP_COPY within"):
        await source.quiesce()
    with pytest.raises(DeviceTimedOut, match="still bringing"):
        await source.abandon()
    assert sorted(rig.states()) == ["PRE_COPY_P2P", "RUNNING"]
    assert not await source.close(), "its descriptor stays open until the call ends"
    left = await in_thread(rig.kernel.left_open)
    assert len([name for name in left if name.startswith("vfio")]) == 3
    hold.let_go()
    assert await source.close()


async def test_a_device_that_hung_is_brought_back_when_it_answers_again(rig: Rig) -> None:
    rig.add("a")
    source = source_of(rig, HURRIED)
    await source.begin()
    hold = Hold(sets_state(S.STOP_COPY))
    rig.hold = hold
    with pytest.raises(DeviceTimedOut):
        await source.quiesce()
    hold.let_go()
    await source.abandon()
    assert rig.states() == ["RUNNING"]
    await source.close()


async def test_a_cancelled_call_is_waited_for(rig: Rig) -> None:
    """What it did is known when the cancellation goes on: nobody acts on a device in motion."""
    rig.add("a")
    source = source_of(rig)
    await source.begin()
    hold = Hold(sets_state(S.STOP_COPY))
    rig.hold = hold
    stopping = asyncio.create_task(source.quiesce())
    await in_thread(hold.reached.wait)
    stopping.cancel()
    await asyncio.sleep(0.05)
    assert not stopping.done()
    hold.let_go()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert rig.states() == ["STOP_COPY"]
    await source.abandon()
    await source.close()


async def test_the_loop_stays_free_while_a_device_takes_its_time(rig: Rig) -> None:
    rig.add("a")
    source = source_of(rig)
    hold = Hold(sets_state(S.PRE_COPY))
    rig.hold = hold
    beginning = asyncio.create_task(source.begin())
    await in_thread(hold.reached.wait)
    before_s = time.monotonic()
    ticks = 0
    while time.monotonic() - before_s < 0.2:
        await asyncio.sleep(0.005)
        ticks += 1
    assert ticks >= 5
    hold.let_go()
    await beginning
    await source.abandon()
    await source.close()
