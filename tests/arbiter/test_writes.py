"""What a migration costs etcd: at most six writes, by the contract with whoever runs the cluster.

The engine's calls, as `engine.arbiter_port` draws them; a counter stands before the store.
"""

from typing import Any

from migrd.arbiter.ownership import Ownerships
from migrd.arbiter.store import Entry, Swapped
from tests.fakes.arbiter import FakeArbiterStore

MOST = 6


class Counted:
    """`arbiter.store.Store` that counts what is sent, not what takes effect."""

    def __init__(self) -> None:
        self.store = FakeArbiterStore()
        self.swaps = 0

    async def get(self, key: str) -> Entry | None:
        return self.store.entries.get(key)

    async def swap(self, key: str, expected: int, value: bytes | None) -> Swapped:
        self.swaps += 1
        return self.store.swap("", key, expected, value)


async def test_a_migration_sends_three_writes_the_first_time_and_after() -> None:
    counted = Counted()
    arbiter = Ownerships(counted, prefix="/migrd", within_s=1.0)
    hosts = ["alpha", "beta"]
    for epoch in range(1, 5):
        source, destination = hosts
        migration = f"m-{epoch}"
        before = counted.swaps
        record = await arbiter.claim("vm", source, epoch, migration)
        granted = await arbiter.assign(
            record, destination, epoch=epoch, started=False, migration_id=migration
        )
        assert await arbiter.read("vm") == granted
        await arbiter.assign(
            granted, destination, epoch=epoch, started=True, migration_id=migration
        )
        assert counted.swaps - before == 3 <= MOST
        hosts.reverse()


async def test_a_migration_that_is_rolled_back_after_its_grant_sends_three() -> None:
    counted = Counted()
    arbiter = Ownerships(counted, prefix="/migrd", within_s=1.0)
    record = await arbiter.claim("vm", "alpha", 1, "m")
    granted = await arbiter.assign(record, "beta", epoch=1, started=False, migration_id="m")
    kept = await arbiter.assign(granted, "alpha", epoch=1, started=True, migration_id="m")
    assert await arbiter.read("vm") == kept
    assert counted.swaps == 3 <= MOST


async def test_every_step_said_twice_sends_no_more_than_six() -> None:
    """A daemon that is started again says its last step once more."""
    counted = Counted()
    arbiter = Ownerships(counted, prefix="/migrd", within_s=1.0)
    record = await arbiter.claim("vm", "alpha", 1, "m")
    assert await arbiter.claim("vm", "alpha", 1, "m") == record
    grant: dict[str, Any] = {"epoch": 1, "started": False, "migration_id": "m"}
    granted = await arbiter.assign(record, "beta", **grant)
    assert await arbiter.assign(record, "beta", **grant) == granted
    start: dict[str, Any] = {"epoch": 1, "started": True, "migration_id": "m"}
    started = await arbiter.assign(granted, "beta", **start)
    assert await arbiter.assign(granted, "beta", **start) == started
    assert counted.swaps <= MOST
    assert len(counted.store.writes) == 3
