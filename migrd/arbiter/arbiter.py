"""etcd as the arbiter: the rules of records, the roster, and how it is, in one object.

    EtcdArbiter = Ownerships (ownership.py) over EtcdStore (etcd.py) over Gateway (gateway.py)
                + a task of its own: Roster (roster.py) -> state, told when it changes

Nothing waits for the task, and nothing is concluded from it: `state` is for people, for readiness
and for metrics. Every call asks etcd itself.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import structlog

from migrd.arbiter.access import Access, AccessFiles
from migrd.arbiter.etcd import EtcdStore
from migrd.arbiter.gateway import Gateway
from migrd.arbiter.member import Observe
from migrd.arbiter.ownership import Ownerships
from migrd.arbiter.roster import Roster
from migrd.engine.arbiter_port import ArbiterState
from migrd.errors import ArbiterUnavailable

log = structlog.get_logger(__name__)

T = TypeVar("T")

CHECK_S: Final = 5.0
AGAIN_S: Final = 1.0
"""Between two looks while it is not reachable."""
_CHECK_S_PER_HOST: Final = 0.004
"""250 looks a second of all hosts together."""
_TLS_RELOAD_S: Final = 60.0
_LEAVE_S: Final = 1.0
_CURE: Final = "look at it with etcdctl endpoint health, and from this host with migrd doctor"


@dataclass(frozen=True)
class EtcdOptions:
    """The configuration's part."""

    host: str
    endpoints: tuple[str, ...]
    prefix: str = "/migrd"
    files: AccessFiles = field(default_factory=AccessFiles)
    within_s: float = 3.0
    """Deadline of each call, whatever it takes."""
    lease_ttl_s: int = 15
    about: Mapping[str, object] = field(default_factory=dict)
    """What the roster says of this host."""
    check_s: float = CHECK_S


class EtcdArbiter(Ownerships):
    """`engine.arbiter_port.Arbiter`. Made by `connect_arbiter`."""

    is_present: Final = True

    def __init__(
        self,
        gateway: Gateway,
        options: EtcdOptions,
        *,
        on_look: Callable[[ArbiterState], None] | None = None,
        on_change: Callable[[ArbiterState], None] | None = None,
    ) -> None:
        """`on_look` after each look, `on_change` when it could be reached, or could not, anew."""
        super().__init__(EtcdStore(gateway), prefix=options.prefix, within_s=options.within_s)
        self._gateway = gateway
        self._options = options
        about = {**options.about, "life": secrets.token_hex(8)}
        self._roster = Roster(
            gateway, options.prefix, options.host, about, ttl_s=options.lease_ttl_s
        )
        self._on_look, self._on_change = on_look, on_change
        self._look_now = asyncio.Event()
        self._state = ArbiterState(
            "etcd",
            is_reachable=False,
            problem="it has not been asked yet",
            endpoints=options.endpoints,
        )

    @property
    def state(self) -> ArbiterState:
        return self._state

    async def watch(self, access: Access) -> None:
        """For ever: our lease, and `state`. The caller owns the task."""
        reloaded_s = time.monotonic()
        while True:
            self._look_now.clear()
            try:
                await self._look()
                if time.monotonic() - reloaded_s >= _TLS_RELOAD_S:
                    reloaded_s = time.monotonic()
                    await access.reload_if_changed()
            except Exception as exc:  # what is only looked at must not end the daemon
                log.error("looking at the arbiter failed", exc_info=exc)
            pause_s = self._pause_s()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._look_now.wait()
                await asyncio.sleep(min(AGAIN_S, self._options.check_s) / 10)  # many at once: one

    def _pause_s(self) -> float:
        """Until the next look: longer with many hosts, as they all look; never so long that the
        lease would end. Shorter while it is not reachable."""
        if not self._state.is_reachable:
            return min(AGAIN_S, self._options.check_s)
        among_many_s = _CHECK_S_PER_HOST * len(self._state.hosts or ())
        return max(self._options.check_s, min(among_many_s, self._options.lease_ttl_s / 3))

    async def leave(self) -> None:
        """Off the roster, if etcd answers at once; else the lease ends by itself."""
        with contextlib.suppress(ArbiterUnavailable, TimeoutError):
            async with asyncio.timeout(_LEAVE_S):
                await self._roster.leave()

    async def _look(self) -> None:
        problem = None
        try:
            async with asyncio.timeout(self._options.within_s):
                await self._roster.look()
        except (ArbiterUnavailable, TimeoutError):
            problem = f"no usable answer: {self._gateway.words()}; {_CURE}"
        self._seen(problem)

    def _seen(self, problem: str | None) -> None:
        before, is_reachable = self._state, problem is None
        if is_reachable and self._roster.rival is not None:
            problem = (
                f"another migrd is on the roster as {self._options.host}: {self._roster.rival}; "
                "host.name must be another one on each host"
            )
        is_new = before.since_wall_s is None or before.is_reachable is not is_reachable
        self._state = ArbiterState(
            "etcd",
            is_reachable,
            since_wall_s=time.time() if is_new else before.since_wall_s,
            problem=problem,
            endpoints=self._options.endpoints,
            hosts=self._roster.hosts if is_reachable else None,
        )
        if is_new or (is_reachable and problem != before.problem):
            self._log(problem)
        if self._on_look is not None:
            self._on_look(self._state)
        if is_new and self._on_change is not None:
            self._on_change(self._state)

    def _log(self, problem: str | None) -> None:
        if problem is None:
            log.info("arbiter reachable", endpoints=list(self._options.endpoints))
        else:
            log.warning("arbiter", reachable=self._state.is_reachable, problem=problem)

    async def _in_time(self, what: str, work: Coroutine[Any, Any, T]) -> T:
        try:
            return await super()._in_time(what, work)
        except ArbiterUnavailable:
            self._look_now.set()
            raise


@contextlib.asynccontextmanager
async def connect_arbiter(
    options: EtcdOptions,
    *,
    observe: Observe | None = None,
    on_look: Callable[[ArbiterState], None] | None = None,
    on_change: Callable[[ArbiterState], None] | None = None,
) -> AsyncIterator[EtcdArbiter]:
    """On the roster for as long as the context lasts. etcd need not be up.

    Raises ConfigError for files that cannot be used.
    """
    access = await Access.load(options.files)
    gateway = Gateway(
        options.endpoints,
        access,
        within_s=options.within_s,
        start_at=options.host,
        observe=observe,
    )
    arbiter = EtcdArbiter(gateway, options, on_look=on_look, on_change=on_change)
    watching = asyncio.create_task(arbiter.watch(access), name="arbiter")
    try:
        yield arbiter
    finally:
        watching.cancel()
        try:
            await asyncio.wait([watching])
            await arbiter.leave()
        finally:
            await gateway.close()
