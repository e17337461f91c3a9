"""Who is there: a key per host, `<prefix>/hosts/<host>`, that lives as long as its lease.

    granted -> put with the lease -> kept alive every third of its time -> revoked at the end
       ^------------------ gone (we were away too long, or etcd forgot) --'

A lease says that a daemon is there and nothing else: no guest starts, stops or moves because of
one. The value is for people (`etcdctl get --prefix /migrd/hosts/`): version and addresses.

Two hosts of one name would share the ownership of all their guests. Each daemon writes a word of
its own into its key; whoever finds another's there says so, for as long as it is there.
"""

import json
import re
import time
from base64 import b64encode
from collections.abc import Mapping
from typing import Final

from migrd.arbiter.answers import Answer, KeepAliveAnswer, LeaseAnswer, RangeAnswer, shown
from migrd.arbiter.etcd import encoded_key
from migrd.arbiter.gateway import (
    LEASE_GRANT,
    LEASE_KEEPALIVE,
    LEASE_REVOKE,
    PUT,
    RANGE,
    ROSTER,
    Gateway,
)

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MOST_HOSTS: Final = 20_000
_LIST_S_PER_HOST: Final = 0.06
"""A list of all hosts costs etcd in proportion to them: so it is asked for less often."""


class Roster:
    """This host's entry, and a look at the others'. All calls: ArbiterUnavailable."""

    def __init__(
        self, gateway: Gateway, prefix: str, host: str, about: Mapping[str, object], *, ttl_s: int
    ) -> None:
        """`about` must be another one for each life of each daemon."""
        self._gateway = gateway
        self._below = f"{prefix}/hosts/"
        self._key = f"{self._below}{host}"
        self._host = host
        self._value = json.dumps({"version": 1, "host": host, **about}).encode()
        self._ttl_s = ttl_s
        self._lease: int | None = None
        self._kept_s = 0.0
        self._listed_s = -1e9
        self.hosts: tuple[str, ...] | None = None
        self.rival: str | None = None
        """What another daemon of our name says of itself, while it is there."""

    async def look(self) -> None:
        """Keep our lease alive, read our entry (linearizable: it proves a quorum), and list."""
        if self._lease is None:
            await self._enter()
        elif time.monotonic() - self._kept_s >= self._ttl_s / 3:
            await self._keep()
        await self._read_back()
        every_s = _LIST_S_PER_HOST * len(self.hosts or ())
        if time.monotonic() - self._listed_s >= every_s:
            await self._list()

    async def leave(self) -> None:
        """Give the lease back, and the entry with it."""
        lease, self._lease = self._lease, None
        if lease is not None:
            await self._gateway.call(LEASE_REVOKE, {"ID": str(lease)}, Answer)

    async def _enter(self) -> None:
        wanted = {"TTL": str(self._ttl_s)}
        granted: LeaseAnswer = await self._gateway.call(LEASE_GRANT, wanted, LeaseAnswer)
        await self._put(granted.id)
        self._lease, self._kept_s = granted.id, time.monotonic()

    async def _put(self, lease: int) -> None:
        entry = {
            "key": encoded_key(self._key),
            "value": b64encode(self._value).decode(),
            "lease": str(lease),
        }
        await self._gateway.call(PUT, entry, Answer)

    async def _keep(self) -> None:
        kept_s, lease = time.monotonic(), {"ID": str(self._lease)}
        answer: KeepAliveAnswer = await self._gateway.call(LEASE_KEEPALIVE, lease, KeepAliveAnswer)
        if answer.result.ttl_s > 0:
            self._kept_s = kept_s
        # else its entry is gone with it, and is found so now

    async def _read_back(self) -> None:
        own = {"key": encoded_key(self._key)}
        entry = await self._gateway.call(RANGE, own, RangeAnswer, lambda a: a.entry(self._key))
        if entry is None:  # expired, or somebody removed it
            self._lease = self.rival = None
            await self._enter()
        else:
            is_ours = entry.value == self._value
            self.rival = None if is_ours else shown(entry.value.decode(errors="replace"))

    async def _list(self) -> None:
        """From whichever member: it need not be the newest."""
        wanted = {
            "key": encoded_key(self._below),
            "range_end": encoded_key(f"{self._below[:-1]}0"),  # "0" comes after "/"
            "keys_only": True,
            "serializable": True,
            "limit": str(MOST_HOSTS),
        }
        names = await self._gateway.call(ROSTER, wanted, RangeAnswer, self._names)
        self.hosts, self._listed_s = names, time.monotonic()

    def _names(self, answer: RangeAnswer) -> tuple[str, ...]:
        """Others' keys may be anything: what is no host's name is passed over."""
        below = self._below.encode()
        if any(not kv.key.startswith(below) for kv in answer.kvs):
            raise ValueError(f"kvs: should be below {self._below}")
        names = (kv.key[len(below) :].decode(errors="replace") for kv in answer.kvs)
        return tuple(sorted(name for name in names if _NAME.fullmatch(name)))
