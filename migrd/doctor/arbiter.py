"""The arbiter: can each member be reached, is there a quorum, may we write, do leases run on time?

Nothing is changed in etcd: the write that is tried is one whose condition never holds (etcd judges
the permission all the same), and the lease that is tried carries no key and is given back.
"""

import asyncio
import re
import time
from collections.abc import Iterable
from functools import partial
from typing import Final
from urllib.parse import urlsplit

from migrd.arbiter.access import Access
from migrd.arbiter.answers import Answer, LeaseAnswer, StatusAnswer, shown
from migrd.arbiter.etcd import EtcdStore
from migrd.arbiter.gateway import LEASE_GRANT, LEASE_REVOKE, LEASE_TIMETOLIVE, STATUS, Gateway
from migrd.arbiter.member import Failed
from migrd.config import ArbiterKind, Settings
from migrd.config.checks import is_loopback
from migrd.doctor.finding import Check, Finding, fail, ok, warn
from migrd.engine_settings import etcd_options
from migrd.errors import ArbiterUnavailable, ConfigError

OLDEST: Final = (3, 4)
LEASE_TTL_S: Final = 10
LOOK_AGAIN_S: Final = 2.0
SLACK_S: Final = 2.0
"""etcd tells whole seconds, and both looks take their time."""
_NEVER: Final = 2**62
"""A revision that no key has."""


def checks(settings: Settings) -> list[Check]:
    return [Check("arbiter", waiting=partial(look_at_arbiter, settings))]


async def look_at_arbiter(settings: Settings) -> Iterable[Finding]:
    if settings.arbiter.kind is ArbiterKind.JOURNAL:
        return [ok("arbiter", "none: the journals of both hosts decide who runs a VM")]
    options = etcd_options(settings)
    try:
        access = await Access.load(options.files)
    except ConfigError as error:
        return [fail("arbiter", error.message, "mend the files named in [arbiter]")]
    gateway = Gateway(options.endpoints, access, within_s=options.within_s, start_at=options.host)
    try:
        members = await _members(gateway)
        if not any(isinstance(status, StatusAnswer) for status in members.values()):
            return _each(members)
        return [
            *_each(members),
            *_together(members),
            *_in_the_clear(options.endpoints),
            await _permission(gateway, options.prefix, options.within_s),
            await _lease(gateway, options.within_s),
        ]
    finally:
        await gateway.close()


Members = dict[str, StatusAnswer | Failed]


async def _members(gateway: Gateway) -> Members:
    asked = [gateway.ask(url, STATUS, b"{}", StatusAnswer) for url in gateway.endpoints]
    return dict(zip(gateway.endpoints, await asyncio.gather(*asked), strict=True))


def _each(members: Members) -> list[Finding]:
    is_any_up = any(isinstance(status, StatusAnswer) for status in members.values())
    return [_member(url, status, is_any_up) for url, status in members.items()]


def _member(url: str, status: StatusAnswer | Failed, is_any_up: bool) -> Finding:
    name = f"arbiter {url}"
    if isinstance(status, Failed):
        cure = f"is etcd up there, and does a firewall let {urlsplit(url).netloc} through?"
        return (warn if is_any_up else fail)(name, status.words, cure)
    version = shown(status.version)
    found = re.match(r"(\d+)\.(\d+)\.", version)
    if found is None or (int(found[1]), int(found[2])) < OLDEST:
        return fail(name, f"etcd {version} is too old", "upgrade it to 3.4 or newer")
    if status.errors:
        return fail(name, shown("; ".join(status.errors)), "etcdctl alarm list; etcdctl defrag")
    if not status.leader:
        return warn(name, f"etcd {version} knows no leader", "etcdctl endpoint status --cluster")
    return ok(name, f"etcd {version}")


def _together(members: Members) -> list[Finding]:
    ids = {s.header.cluster_id for s in members.values() if isinstance(s, StatusAnswer)}
    if len(ids) < 2:
        return []
    told = ", ".join(f"{one:x}" for one in sorted(ids))
    cure = "name members of one cluster in [arbiter] endpoints"
    return [fail("arbiter", f"the endpoints are of different clusters: {told}", cure)]


def _in_the_clear(endpoints: Iterable[str]) -> list[Finding]:
    far = [
        url
        for url in endpoints
        if url.startswith("http://") and not is_loopback(urlsplit(url).hostname or "")
    ]
    if not far:
        return []
    message = f"{far[0]}: whoever is on that network could give guests away"
    return [warn("arbiter", message, "use https://, with client certificates")]


async def _permission(gateway: Gateway, prefix: str, within_s: float) -> Finding:
    """A quorum, too: the write goes through the cluster's log."""
    try:
        async with asyncio.timeout(within_s):
            await EtcdStore(gateway).swap(f"{prefix}/vms/-", _NEVER, b"-")
    except (ArbiterUnavailable, TimeoutError):
        cure = "etcdctl endpoint health --cluster; look at [arbiter] user and its role"
        return fail("arbiter writes", gateway.words(), cure)
    return ok("arbiter writes", f"there is a quorum, and keys below {prefix} may be written")


async def _lease(gateway: Gateway, within_s: float) -> Finding:
    """Does a lease shrink by as much as our clock moves on?"""
    try:
        async with asyncio.timeout(2 * within_s + LOOK_AGAIN_S):
            wanted = {"TTL": str(LEASE_TTL_S)}
            lease: LeaseAnswer = await gateway.call(LEASE_GRANT, wanted, LeaseAnswer)
            granted_s = time.monotonic()
            await asyncio.sleep(LOOK_AGAIN_S)
            name = {"ID": str(lease.id)}
            left: LeaseAnswer = await gateway.call(LEASE_TIMETOLIVE, name, LeaseAnswer)
            passed_s = time.monotonic() - granted_s
            await gateway.call(LEASE_REVOKE, name, Answer)
    except (ArbiterUnavailable, TimeoutError):
        return fail("arbiter leases", gateway.words(), "etcdctl endpoint health --cluster")
    off_s = lease.ttl_s - left.ttl_s - passed_s
    if abs(off_s) > SLACK_S:
        message = f"a lease lost {lease.ttl_s - left.ttl_s} s in {passed_s:.1f} s of this host"
        return warn("arbiter leases", message, "look at the clocks here and there: timedatectl")
    return ok("arbiter leases", "run at the pace of this host's clock")
