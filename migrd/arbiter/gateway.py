"""Calls to an etcd cluster by its JSON gateway: several members, and one answer or none.

    call -> preferred member --answer-------------------------> the same cluster, not gone back?
                |  |  '--refused, not applied-> next member               '-> done
                |  '-----not delivered--------> next member
                '--------not known------------> a read: next member
                                                a write: ArbiterUnavailable at once

- A write that may have been delivered is never repeated here: whoever sent it reads first
  (`ownership`).
- The member that failed last is not preferred any more, so a call after it starts elsewhere. Each
  host begins with another one: a fleet's load is spread.
- All answers of one daemon's life come from one cluster, whose revision never goes back. Endpoints
  of two clusters, or a cluster restored from a backup, would let two hosts win one record; that
  is refused until somebody has looked, and started migrd again.

Python's etcd clients bring gRPC's C core along, or are not maintained; a handful of messages in
JSON needs neither.
"""

import asyncio
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from migrd.arbiter.access import Access
from migrd.arbiter.answers import Answer, Header, TokenAnswer, first_fault
from migrd.arbiter.member import UNAUTHENTICATED, Failed, Members, Observe, Op
from migrd.errors import ArbiterUnavailable, ConfigError

RANGE: Final = Op("range", "/v3/kv/range", is_linear=True)
ROSTER: Final = Op("roster", "/v3/kv/range")
TXN: Final = Op("txn", "/v3/kv/txn", is_write=True, is_linear=True)
PUT: Final = Op("put", "/v3/kv/put")
LEASE_GRANT: Final = Op("lease_grant", "/v3/lease/grant")
LEASE_KEEPALIVE: Final = Op("lease_keepalive", "/v3/lease/keepalive")
LEASE_TIMETOLIVE: Final = Op("lease_timetolive", "/v3/lease/timetolive")
LEASE_REVOKE: Final = Op("lease_revoke", "/v3/lease/revoke")
STATUS: Final = Op("status", "/v3/maintenance/status")
AUTHENTICATE: Final = Op("authenticate", "/v3/auth/authenticate")

ATTEMPTS: Final = 3
"""So many members that do not answer fit into the time of a call."""
_AUTH_IS_OFF: Final = 9
_OLD_TOKEN: Final = "revision of auth store is old"

A = TypeVar("A", bound=Answer)
T = TypeVar("T")
Message = Mapping[str, object]


def _whole(answer: A) -> Any:
    return answer


class Gateway:
    """Close it. All calls raise ArbiterUnavailable."""

    def __init__(
        self,
        endpoints: Sequence[str],
        access: Access,
        *,
        within_s: float,
        start_at: str = "",
        observe: Observe | None = None,
    ) -> None:
        """`within_s`: of a call, set by whoever makes it. `start_at`: whoever has another text
        prefers another endpoint at first."""
        self.endpoints = tuple(endpoints)
        self.trouble: dict[str, str] = {}
        """Endpoint -> why it did not answer the last time."""
        self._members = Members(attempt_s=within_s / ATTEMPTS, observe=observe)
        self._access = access
        self._preferred = zlib.crc32(start_at.encode()) % len(self.endpoints)
        self._token: str | None = None
        self._authenticating = asyncio.Lock()
        self._seen: Header | None = None

    async def close(self) -> None:
        await self._members.close()

    async def call(
        self, op: Op, message: Message, answer: type[A], read: Callable[[A], T] = _whole
    ) -> T:
        """What `read` makes of the answer of whichever member gives one; a ValueError of it says
        that this answer cannot be right."""
        body = json.dumps(message).encode()
        first = self._preferred  # others move it meanwhile
        for url in (*self.endpoints[first:], *self.endpoints[:first]):
            found: A | Failed = await self.ask(url, op, body, answer)
            if not isinstance(found, Failed):
                try:
                    result = read(found)
                except ValueError as wrong:
                    found = Failed("odd", f"not an answer to this: {first_fault(wrong)}")
                else:
                    self.trouble.pop(url, None)
                    return result
            self.trouble[url] = found.words
            self._avoid(url)
            if op.is_write and found.may_have_applied:
                raise ArbiterUnavailable(f"{url}: {found.words}: not known whether it took effect")
        raise ArbiterUnavailable(f"no usable answer from etcd: {self.words()}")

    def words(self) -> str:
        """Why the members that do not answer do not, in one line."""
        return "; ".join(f"{url}: {why}" for url, why in self.trouble.items()) or "no answer"

    async def ask(self, url: str, op: Op, body: bytes, answer: type[A]) -> A | Failed:
        """One member alone; authenticates where that is needed. Raises nothing."""
        before = self._seen
        used = await self._authenticated(url)
        if isinstance(used, Failed):
            return used
        found = await self._members.ask(url, op, body, answer, self._access.tls, used)
        if _is_token_stale(found):  # said before anything was done
            if self._token == used:
                self._token = None
            used = await self._authenticated(url)
            if isinstance(used, Failed):
                return used
            found = await self._members.ask(url, op, body, answer, self._access.tls, used)
        if isinstance(found, Failed):
            return found
        return self._checked(found, found.header, op, before)

    async def _authenticated(self, url: str) -> str | Failed | None:
        """A token; None where there is no user, or etcd wants none."""
        if self._access.user is None:
            return None
        async with self._authenticating:
            if self._token is not None:
                return self._token
            try:
                password = await self._access.password()
            except ConfigError as failure:
                return Failed("refused", failure.message)
            body = json.dumps({"name": self._access.user, "password": password}).encode()
            found = await self._members.ask(
                url, AUTHENTICATE, body, TokenAnswer, self._access.tls, None
            )
            if isinstance(found, TokenAnswer):
                self._token = found.token
                return found.token
            if found.code == _AUTH_IS_OFF:
                return None
            return Failed("refused", found.words, found.code)  # the call itself was not sent

    def _checked(self, found: A, header: Header, op: Op, before: Header | None) -> A | Failed:
        if before is not None and header.cluster_id != before.cluster_id:
            return Failed(
                "odd",
                f"it is of cluster {header.cluster_id:x}, and another one, {before.cluster_id:x}, "
                "answered before: all endpoints must be of one cluster; if it was made anew on "
                "purpose, start migrd again",
            )
        if op.is_linear and before is not None and header.revision < before.revision:
            return Failed(
                "odd",
                f"its revision went back from {before.revision} to {header.revision}: it was "
                "restored from a backup, so records may be wrong; once they are known to be right, "
                "start migrd again",
            )
        if op.is_linear and (self._seen is None or header.revision > self._seen.revision):
            self._seen = header
        return found

    def _avoid(self, url: str) -> None:
        """The next call begins with the next one; unless somebody has seen to it already."""
        if self.endpoints[self._preferred] == url:
            self._preferred = (self._preferred + 1) % len(self.endpoints)


def _is_token_stale(found: object) -> bool:
    return isinstance(found, Failed) and (
        found.code == UNAUTHENTICATED or (found.result == "refused" and _OLD_TOKEN in found.words)
    )
