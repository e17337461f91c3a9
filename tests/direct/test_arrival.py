"""A guest that comes, by a session that is lost and another one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn, cast

from migrd.core.facts import TransferSettings
from migrd.core.memory_map import MemoryMap
from migrd.direct.arrival import Arrival
from migrd.direct.guest import About, Guest
from migrd.direct.manifest import Manifest
from migrd.direct.parts import KernelParts
from migrd.direct.stream_limits import StreamLimits
from tests.direct.device_rig import Rig

MEMORY = MemoryMap.of([(0, 0, 1 << 20)])
SETTINGS = TransferSettings(0.3, 0, tls=False, migration_id="move", epoch=1)


class Waiting:
    """A process that waits for its guest, and has handed over devices."""

    about = About("guest", "1")
    features = frozenset({"devices"})

    def __init__(self, rig: Rig) -> None:
        self.devices = tuple(rig.offered)
        self.holders = 0

    async def connected(self, *, within_s: float = 0.0) -> Waiting:
        return self

    @contextlib.contextmanager
    def held(self) -> Iterator[Waiting]:
        self.holders += 1
        yield self
        self.holders -= 1


def none(*_: object) -> NoReturn:
    raise AssertionError("no source is asked for where a guest comes")


async def test_devices_of_a_lost_session_are_given_back_and_cleared_for_the_next(rig: Rig) -> None:
    rig.add("a")
    process = Waiting(rig)
    held: list[int] = []

    def open_device(fd: int) -> Any:
        held.append(process.holders)
        return rig.open_device(fd)

    parts = KernelParts(none, none, none, open_device)
    guest = cast(Guest, process)
    arrival = Arrival(guest, SETTINGS, None, parts, StreamLimits(), lambda: None)
    for _ in range(3):
        await arrival.rebuild(Manifest(MEMORY, ("a",)), {})
        assert rig.states() == ["RESUMING"]
    assert held == [1, 1, 1]  # else its number might be another file's by the time it is opened
    await arrival.rebuild(Manifest(MEMORY), {})
    await arrival.close()
