"""The third party, simulated: one store for all hosts, and a way to it for each.

    store = FakeArbiterStore()          outlives every daemon
    arbiter = FakeArbiter(store, "alpha")    fulfils `engine.arbiter_port.Arbiter`

The rules of a record are the real ones (`migrd.arbiter.ownership`); what is simulated is the store
and the network: a request takes half of `latency_s` to the store, the answer the other half. What
was sent arrives, also after its sender was killed. `faults` is asked for each request, by host and
call ("get" or "swap"), what becomes of it; `down` are the hosts that have no connection, and
`is_stalled` says that the store has no quorum: a request is taken and not answered, and a write
takes effect once there is one again (or never, if `is_stalled` stays).

Every request counts (`log`), and every write that took effect (`writes`).
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from migrd.arbiter.ownership import Ownerships
from migrd.arbiter.store import Entry, Swapped, revision_of
from migrd.engine.arbiter_port import ArbiterState
from migrd.errors import ArbiterUnavailable

LATENCY_S = 0.002
LATE_S = 40.0
"""A late write takes effect after every deadline of its sender."""
WITHIN_S = 3.0
ATTEMPTS = 3
"""So many requests without an answer fit into the time of a call."""
PREFIX = "/migrd"


class Trouble(Enum):
    """What may become of a request."""

    REQUEST_LOST = "request_lost"
    ANSWER_LOST = "answer_lost"
    REQUEST_LATE = "request_late"
    """The caller has given up when it arrives."""
    REPEATED = "repeated"
    """Delivered twice, the second time late."""
    UNREACHABLE = "unreachable"
    """No connection: certainly not delivered."""
    BROKEN = "broken"
    """Delivered, and the connection breaks at once instead of an answer."""


Faults = Callable[[str, str], Trouble | None]
"""(host, call) -> what becomes of this request."""


@dataclass(frozen=True)
class Write:
    """One that took effect."""

    host: str
    key: str
    value: bytes | None
    revision: int


class FakeArbiterStore:
    """Keys, and the network to them."""

    def __init__(self, *, latency_s: float | Callable[[], float] = LATENCY_S) -> None:
        self.entries: dict[str, Entry] = {}
        self.revision = 1
        self.hosts: set[str] = set()
        """Whose lease lives."""
        self.down: set[str] = set()
        self.is_stalled = False
        self.faults: Faults = lambda host, call: None
        self.log: list[tuple[str, str]] = []
        self.writes: list[Write] = []
        self.asked: dict[str, bytes | None] = {}
        """By host: what it last wanted to be written, which may happen at any time."""
        self._latency_s = latency_s
        self._waiting: list[Callable[[], None]] = []

    def heal(self) -> None:
        """All can reach it, it has its quorum, and nothing more goes wrong."""
        self.down.clear()
        self.faults = lambda host, call: None
        self.is_stalled = False
        waiting, self._waiting = self._waiting, []
        for take_effect in waiting:
            take_effect()

    def writes_of(self, key_end: str) -> int:
        """How many writes of keys that end so took effect."""
        return sum(write.key.endswith(key_end) for write in self.writes)

    def requests(self) -> Counter[tuple[str, str]]:
        """(host, call) -> how many there were."""
        return Counter(self.log)

    def latency_s(self) -> float:
        """Of the next request, there and back."""
        return self._latency_s() if callable(self._latency_s) else self._latency_s

    def swap(self, host: str, key: str, expected: int, value: bytes | None) -> Swapped:
        """Take effect now, if the revision is the expected one."""
        found = self.entries.get(key)
        if revision_of(found) != expected:
            return Swapped(is_applied=False, entry=found)
        if value is None and found is None:
            return Swapped(is_applied=True, entry=None)
        self.revision += 1
        self.writes.append(Write(host, key, value, self.revision))
        if value is None:
            del self.entries[key]
            return Swapped(is_applied=True, entry=None)
        entry = self.entries[key] = Entry(value, self.revision)
        return Swapped(is_applied=True, entry=entry)

    def deliver(self, after_s: float, work: Callable[[], None]) -> None:
        """`work` takes effect then, whoever still waits; with the quorum's return if it is lost."""

        def arrive() -> None:
            if self.is_stalled:
                self._waiting.append(work)
            else:
                work()

        asyncio.get_running_loop().call_later(after_s, arrive)


class _Way:
    """One host's connection: `migrd.arbiter.store.Store`."""

    def __init__(self, store: FakeArbiterStore, host: str, attempt_s: float) -> None:
        self._store = store
        self._host = host
        self._attempt_s = attempt_s

    async def get(self, key: str) -> Entry | None:
        entries = self._store.entries
        found = await self._request("get", lambda: Swapped(False, entries.get(key)))
        return found.entry

    async def swap(self, key: str, expected: int, value: bytes | None) -> Swapped:
        store, host = self._store, self._host
        store.asked[host] = value
        return await self._request("swap", lambda: store.swap(host, key, expected, value))

    async def _request(self, call: str, work: Callable[[], Swapped]) -> Swapped:
        try:
            async with asyncio.timeout(self._attempt_s):
                return await self._exchange(call, work)
        except TimeoutError:
            raise ArbiterUnavailable(f"{self._host}: no answer from the arbiter") from None

    async def _exchange(self, call: str, work: Callable[[], Swapped]) -> Swapped:
        store = self._store
        store.log.append((self._host, call))
        trouble, half_s = store.faults(self._host, call), store.latency_s() / 2
        if self._host in store.down or trouble is Trouble.UNREACHABLE:
            await asyncio.sleep(half_s)
            raise ArbiterUnavailable(f"{self._host}: no connection to the arbiter")
        answer: asyncio.Future[Swapped] = asyncio.get_running_loop().create_future()

        def arrive() -> None:
            result = work()
            if not answer.done():
                answer.set_result(result)

        if trouble in (Trouble.REQUEST_LATE, Trouble.REPEATED):
            store.deliver(LATE_S, arrive)
        if trouble not in (Trouble.REQUEST_LOST, Trouble.REQUEST_LATE):
            store.deliver(half_s, arrive)
        if trouble is Trouble.BROKEN:
            await asyncio.sleep(2 * half_s)
            raise ArbiterUnavailable(f"{self._host}: the connection broke before the answer")
        result = await answer
        await asyncio.sleep(half_s if trouble is not Trouble.ANSWER_LOST else LATE_S)
        if self._host in store.down:
            raise ArbiterUnavailable(f"{self._host}: cut off while waiting for the answer")
        return result


class FakeArbiter(Ownerships):
    """`engine.arbiter_port.Arbiter` of one host; its lease lives from now on."""

    is_present = True

    def __init__(self, store: FakeArbiterStore, host: str, *, within_s: float = WITHIN_S) -> None:
        way = _Way(store, host, within_s / ATTEMPTS)
        super().__init__(way, prefix=PREFIX, within_s=within_s)
        self._fake = store
        self._host = host
        store.hosts.add(host)

    @property
    def state(self) -> ArbiterState:
        is_reachable = self._host not in self._fake.down and not self._fake.is_stalled
        return ArbiterState(
            "etcd",
            is_reachable,
            problem=None if is_reachable else "the arbiter does not answer",
            endpoints=("simulated",),
            hosts=tuple(sorted(self._fake.hosts)) if is_reachable else None,
        )


def seeded_troubles(seed: int, *, share: float = 0.3) -> Faults:
    """For `faults`: of all requests, `share` meets some trouble; the same ones for one seed."""
    chance = random.Random(seed)

    def fault(host: str, call: str) -> Trouble | None:
        return chance.choice(list(Trouble)) if chance.random() < share else None

    return fault
