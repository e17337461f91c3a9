"""One member of three cut off by a pulled cable, with a host on its side.

    namespace            this machine
    m0, "alpha"  ======  m1, m2, "beta"

What the cut-off side is told must be "not known": its member still has the old record, and a read
of it there would say that alpha may run a guest that beta was given since.
"""

import asyncio
import contextlib
import secrets
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from migrd.arbiter.arbiter import EtcdArbiter, EtcdOptions, connect_arbiter
from migrd.engine.arbiter_port import Ownership
from migrd.engine.threads import in_thread
from migrd.errors import ArbiterUnavailable
from tests.arbiter.etcd_server import PATIENCE_S, Cluster
from tests.lab.netns import _run

pytestmark = pytest.mark.netns
VM = "web-1"


@dataclass
class Place:
    """A namespace on a cable."""

    name: str
    near: str
    """Address of this machine's end."""
    far: str
    cable: str

    async def pull(self) -> None:
        await _run("ip", "link", "set", self.cable, "down")

    async def plug(self) -> None:
        await _run("ip", "link", "set", self.cable, "up")

    async def outcomes(self, url: str) -> list[str]:
        """What a host in there is told; see `cut_off`."""
        command = [sys.executable, "-m", "tests.arbiter.cut_off", url, VM]
        child = await asyncio.create_subprocess_exec(
            *("ip", "netns", "exec", self.name, *command), stdout=asyncio.subprocess.PIPE
        )
        output, _ = await asyncio.wait_for(child.communicate(), PATIENCE_S)
        return output.decode().split()


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    mark, number = secrets.token_hex(3), secrets.randbelow(250) + 1
    place = Place(f"migrd-{mark}", f"10.98.{number}.1", f"10.98.{number}.2", f"mgr{mark}")
    await _run("ip", "netns", "add", place.name)
    try:
        await _run(
            *("ip", "link", "add", place.cable, "type", "veth"),
            *("peer", "name", "eth0", "netns", place.name),
        )
        await _run("ip", "addr", "add", f"{place.near}/24", "dev", place.cable)
        await _run("ip", "-n", place.name, "addr", "add", f"{place.far}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            await _run("ip", "-n", place.name, "link", "set", link, "up")
        await place.plug()
        yield place
    finally:
        await _run("ip", "netns", "del", place.name)


@pytest.fixture
async def divided(place: Place, etcd_binary: Path, tmp_path: Path) -> AsyncIterator[Cluster]:
    """m0 in the namespace, the others here; all see each other yet."""
    cluster = Cluster(etcd_binary, tmp_path, members=3)
    for member, address in zip(cluster.members, (place.far, place.near, place.near), strict=True):
        member.address = address
    cluster.members[0].enter = ("ip", "netns", "exec", place.name)
    try:
        await in_thread(cluster.start)
        yield cluster
    finally:
        await in_thread(cluster.close)


@contextlib.asynccontextmanager
async def beta_of(cluster: Cluster) -> AsyncIterator[EtcdArbiter]:
    options = EtcdOptions("beta", cluster.urls, within_s=3.0, check_s=3600.0)
    async with connect_arbiter(options) as arbiter:
        yield arbiter


async def _answered(arbiter: EtcdArbiter) -> Ownership | None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(ArbiterUnavailable):
                return await arbiter.read(VM)


async def test_a_member_that_is_cut_off_answers_nothing_and_takes_nothing(
    divided: Cluster, place: Place
) -> None:
    url = divided.urls[0]
    async with beta_of(divided) as beta:
        claimed = await beta.claim(VM, "alpha", 1, "m")
        assert await place.outcomes(url) == ["alpha"] * 4
        record = await beta.read(VM)
        assert record is not None
        assert record.revision > claimed.revision
        await place.pull()
        await _answered(beta)  # a leader on this side
        given = await beta.assign(record, "beta", epoch=3, started=True, migration_id="m-2")
        assert await place.outcomes(url) == ["alpha"] + ["unavailable"] * 3
        assert await beta.read(VM) == given
        await place.plug()
        async with asyncio.timeout(PATIENCE_S):
            while (outcomes := await place.outcomes(url))[1] == "unavailable":
                pass
        assert outcomes[1:] == ["beta", "conflict", "alpha"]
        assert await beta.read(VM) == given
