"""The rules of an arbiter, kept by a real etcd of one member, through a network that fails."""

import asyncio
import contextlib
import itertools
from base64 import b64encode
from collections.abc import AsyncIterator

import pytest

from migrd.arbiter.arbiter import EtcdArbiter, EtcdOptions, connect_arbiter
from migrd.engine.arbiter_port import Arbiter
from tests.arbiter.etcd_server import Cluster
from tests.arbiter.rules import Rules
from tests.lab.freezing_proxy import FreezingProxy, freezing_proxy

WITHIN_S = 1.5
_NUMBERS = itertools.count()


class EtcdParty:
    """Hosts that reach one etcd through a proxy each."""

    def __init__(self, cluster: Cluster, prefix: str) -> None:
        self.cluster = cluster
        self.prefix = prefix
        self.proxies: dict[str, FreezingProxy] = {}
        self._arbiters: dict[str, EtcdArbiter] = {}
        self._stack = contextlib.AsyncExitStack()
        self.requests: list[tuple[str, str, str]] = []
        """(host, op, result) of each."""

    def host(self, name: str) -> Arbiter:
        return self._arbiters[name]

    async def join(self, name: str) -> None:
        target = ("127.0.0.1", self.cluster.members[0].client_port)
        proxy = await self._stack.enter_async_context(freezing_proxy(("127.0.0.1", 0), target))
        self.proxies[name] = proxy
        assert isinstance(proxy.address, tuple)
        options = EtcdOptions(
            name,
            (f"http://127.0.0.1:{proxy.address[1]}",),
            prefix=self.prefix,
            within_s=WITHIN_S,
            check_s=3600.0,
        )
        self._arbiters[name] = await self._stack.enter_async_context(
            connect_arbiter(
                options, observe=lambda op, result, s: self.requests.append((name, op, result))
            )
        )

    def lose_answers(self, host: str) -> None:
        self.proxies[host].to_client.freeze()

    def cut(self, host: str) -> None:
        self.proxies[host].refuse = True
        self.proxies[host].cut()

    def heal(self) -> None:
        for proxy in self.proxies.values():
            proxy.refuse = False
            proxy.cut()
            proxy.resume()

    async def writes(self, vm: str) -> int:
        """etcd counts them itself: the version of a key grows with each put."""
        reader = self._arbiters["alpha"]
        record = await reader.read(vm)
        assert record is not None
        loop = asyncio.get_running_loop()
        key = b64encode(f"{self.prefix}/vms/{vm}".encode()).decode()
        member = self.cluster.members[0]
        found = await loop.run_in_executor(None, member.ask, "/v3/kv/range", {"key": key})
        return int(found["kvs"][0]["version"])

    async def close(self) -> None:
        self.heal()
        await self._stack.aclose()


@pytest.fixture
async def party(single: Cluster) -> AsyncIterator[EtcdParty]:
    party = EtcdParty(single, f"/test{next(_NUMBERS)}")
    try:
        for name in ("alpha", "beta"):
            await party.join(name)
        yield party
    finally:
        await party.close()


class TestRules(Rules):
    pass
