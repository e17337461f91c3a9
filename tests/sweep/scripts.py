"""The migrations that are swept: each asks for one, does its part, and returns its id."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping

from migrd.core.facts import QemuStatus, RunState
from migrd.core.migration import Policy, WhenNotConverging
from migrd.core.phases import Phase
from migrd.errors import MigrdError
from tests.engine.passthrough import DISK, NIC, NIC2
from tests.fakes.virtual_time import now_s
from tests.fakes.wire import MIB
from tests.fakes.world import VM, Pair


async def plain(pair: Pair) -> str:
    """The main job."""
    return await pair.ask()


async def with_devices(pair: Pair) -> str:
    """A guest with two passthrough devices, one of which has another address there."""
    return await pair.ask(destination_devices={"hostdev1": DISK})


async def with_arbiter(pair: Pair) -> str:
    """The main job, of hosts that have an arbiter."""
    return await pair.ask()


async def several_rounds(pair: Pair) -> str:
    """A guest that takes a few rounds, with two channels."""
    _slow_down(pair)
    policy = Policy(downtime_limit_s=0.1)
    return await pair.ask(policy=policy, multifd_channels=2)


async def paused_guest(pair: Pair) -> str:
    """A guest that does not run is moved, and does not run afterwards either."""
    pair.is_paused_guest = True
    pair.hosts["alpha"].qemu(VM).stop(RunState.PAUSED)
    return await pair.ask()


async def cancelled_in_precopy(pair: Pair) -> str:
    """Cancelled while memory is copied."""
    _slow_down(pair)
    migration_id = await pair.ask()
    await _reached(pair, migration_id, "precopy")
    await _insist(pair, migration_id)
    return migration_id


async def postcopy(pair: Pair) -> str:
    """The guest moves first."""
    _never_converge(pair)
    policy = Policy(when_not_converging=WhenNotConverging.POSTCOPY)
    return await pair.ask(policy=policy)


async def throttled(pair: Pair) -> str:
    """The guest has to be slowed."""
    _never_converge(pair)
    policy = Policy(when_not_converging=WhenNotConverging.THROTTLE, max_throttle_percent=95)
    return await pair.ask(policy=policy)


async def stalled_after_continue(pair: Pair) -> str:
    """The link stalls with the guest stopped."""
    pair.ground.load.device_s = 0.02
    migration_id = await pair.ask()
    await _reached(pair, migration_id, "switchover")
    pair.ground.wire.freeze()
    await asyncio.sleep(6.0)
    pair.ground.wire.heal()
    return migration_id


async def destination_dies_in_switchover(pair: Pair) -> str:
    """The destination's QEMU dies while the guest stands still: it goes on at the source."""
    pair.ground.load.device_s = 0.02
    migration_id = await pair.ask()
    await _reached(pair, migration_id, "switchover")
    for qemu in pair.hosts["beta"].living(VM):
        if pair.guest().running_on is not qemu:
            qemu.die("killed by the test")
    return migration_id


async def source_dies_in_switchover(pair: Pair) -> str:
    """The source's QEMU dies after the last byte: the guest is saved at the destination."""
    pair.ground.wire.swallows_ack = True
    migration_id = await pair.ask()
    await _reached(pair, migration_id, "switchover")
    await asyncio.sleep(0.5)
    for qemu in pair.hosts["alpha"].living(VM):
        if qemu.status is QemuStatus.DEVICE and pair.guest().running_on is None:
            qemu.die("killed by the test")
    pair.ground.wire.swallows_ack = False
    return migration_id


async def after_a_round_trip(pair: Pair) -> str:
    """The guest has come here by a migration; its QEMU still says `completed`."""
    return await pair.ask()


async def after_a_cancelled_one(pair: Pair) -> str:
    """Its QEMU still says `cancelled`."""
    return await pair.ask()


async def _there_and_back(pair: Pair) -> None:
    for source in ("alpha", "beta"):
        assert (await pair.migrate(source=source)).phase == Phase.SUCCEEDED
        await pair.settle()


async def _one_cancelled(pair: Pair) -> None:
    assert (await pair.until_over(await cancelled_in_precopy(pair))).phase == Phase.CANCELLED
    await pair.settle()
    pair.ground.calm()


ARBITRATED = frozenset({with_arbiter})
"""Of hosts that have an arbiter."""
DEVICES: Mapping[object, Mapping[str, str]] = {
    with_devices: {"hostdev0": NIC, "hostdev1": NIC2},
}
"""Passthrough devices of the guest, by QEMU id."""
BEFORE: Mapping[object, Callable[[Pair], Awaitable[None]]] = {
    after_a_round_trip: _there_and_back,
    after_a_cancelled_one: _one_cancelled,
}
"""What happens before the sweep of a script begins."""


def _slow_down(pair: Pair) -> None:
    pair.ground.wire.bandwidth_bytes_per_s = 400 * MIB
    pair.ground.load.dirty_bytes_per_s = 150 * MIB
    pair.ground.load.working_set_bytes = 128 * MIB


def _never_converge(pair: Pair) -> None:
    pair.ground.wire.bandwidth_bytes_per_s = 200 * MIB
    pair.ground.load.dirty_bytes_per_s = 1000 * MIB
    pair.ground.load.working_set_bytes = 200 * MIB


async def _reached(pair: Pair, migration_id: str, phase: str) -> None:
    """Until that phase, or the end, or a while has passed; the daemon may be down meanwhile."""
    deadline_s, step_s = now_s() + 30.0, 0.004
    while now_s() < deadline_s:
        at, is_over = pair.stands(migration_id)
        if is_over or at == phase:
            return
        await asyncio.sleep(step_s)
        step_s = min(1.1 * step_s, 0.2)


async def _insist(pair: Pair, migration_id: str) -> None:
    """Cancel; ask again while the daemon is down."""
    for _ in range(100):
        daemon = pair.daemons.get("alpha")
        if daemon is not None and not daemon.gate.is_dead:
            with contextlib.suppress(MigrdError):
                await daemon.service.cancel(migration_id, by="test")
                return
        await asyncio.sleep(0.02)
