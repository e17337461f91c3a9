"""A failure at every call to the kernel, before and after its effect: nothing is lost by it."""

from collections.abc import Awaitable, Callable

import pytest

from migrd.direct.devices import SourceDevices
from migrd.errors import DeviceError, DeviceRefused, MigrdError
from tests.contract.device_moving import Frames, load, save
from tests.direct.device_rig import Rig, Strike, destination_of, source_of, strikes


async def there_is_an_end(
    call: Callable[[], Awaitable[object]], tries: int = 2
) -> list[MigrdError]:
    """Ask until it is done, as the engine does; the failures before."""
    failures = []
    for _ in range(tries):
        try:
            await call()
        except MigrdError as failure:
            failures.append(failure)
        else:
            return failures
    raise AssertionError(failures)


async def sweep_source(rig: Rig, other: Rig, strike: Strike, *, refuse_end: bool) -> None:
    """`refuse_end`: the other side fails at the very end, so that strikes meet the way back."""
    source, frames = source_of(rig), Frames()

    async def emit(device_id: str, frame: bytes) -> None:
        await frames(device_id, frame)
        if refuse_end and device_id == "b" and len(frame) == 16:
            raise DeviceError("the other side gave up")

    rig.strike = strike
    try:
        await source.begin()
        await source.precopy(emit)
        await source.stop(emit)
    except MigrdError:
        await there_is_an_end(source.abandon)
        assert rig.states() == ["RUNNING", "RUNNING"], strike
        with pytest.raises(DeviceRefused):
            await source.stop(emit)
    rig.strike = None
    assert [sim.resets for sim in rig.sims.values()] == [0, 0], strike
    assert [sim.registers for sim in rig.sims.values()] == [b"net", b"disk"], strike
    ended = {one for one, frame in frames.frames if len(frame) == 16}
    if strike.struck is not None and rig.states() == ["STOP_COPY"] * 2:
        assert ended == {"a", "b"}, strike
    await arrive_whole_or_not_at_all(other, frames, strike)
    await source.abandon()
    if not refuse_end:
        await arrive_whole_or_not_at_all(other, await again(source), None)
    await source.close()


async def again(source: SourceDevices) -> Frames:
    frames = Frames()
    frames.frames = await save(source)
    return frames


async def arrive_whole_or_not_at_all(other: Rig, frames: Frames, strike: Strike | None) -> None:
    destination = destination_of(other)
    try:
        await load(destination, frames.frames)
    except MigrdError:
        assert strike is not None
        await destination.abandon()
    else:
        await destination.run()
        assert [sim.registers for sim in other.sims.values()] == [b"net", b"disk"], strike
    assert other.states() == ["RUNNING", "RUNNING"], strike
    await destination.close()


@pytest.mark.parametrize("refuse_end", [False, True])
async def test_a_source_struck_at_any_call_runs_again_whole(
    rig: Rig, other: Rig, refuse_end: bool
) -> None:
    rig.add("a", registers=b"net")
    rig.add("b", registers=b"disk")
    other.add("a")
    other.add("b")
    swept = set()
    for strike in strikes():
        await sweep_source(rig, other, strike, refuse_end=refuse_end)
        if strike.struck is None:
            break
        swept.add(strike.struck)
    assert strike.number > 30, "the sweep really swept"
    assert {"read", "feature 2"} <= swept


async def test_a_destination_struck_at_any_call_is_whole_or_empty(rig: Rig, other: Rig) -> None:
    for one in (rig, other):
        one.add("a", registers=b"net" if one is rig else b"")
        one.add("b", registers=b"disk" if one is rig else b"")
    source = source_of(rig)
    frames = await save(source)
    for strike in strikes():
        destination = destination_of(other)
        other.strike = strike
        try:
            await load(destination, frames)
        except MigrdError:
            await there_is_an_end(destination.abandon)
            with pytest.raises(DeviceRefused):
                await destination.run()
        else:
            await there_is_an_end(destination.run)
            assert [sim.registers for sim in other.sims.values()] == [b"net", b"disk"], strike
        assert other.states() == ["RUNNING", "RUNNING"], strike
        other.strike = None
        await destination.close()
        for sim in other.sims.values():
            sim.registers = b""
        if strike.struck is None:
            break
    assert strike.number > 30
    await source.close()
