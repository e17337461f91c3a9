"""Run inside the network namespace of a member that is cut off, as the daemon of a host there:

    python -m tests.arbiter.cut_off URL VM

Prints what the member itself has for the record's owner (a read that asks no other member, which
migrd never does), then what each call of the arbiter came to: `unavailable`, `conflict`, or the
owner; one a line.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable

from migrd.arbiter.access import Access, AccessFiles
from migrd.arbiter.answers import RangeAnswer
from migrd.arbiter.etcd import EtcdStore, encoded_key
from migrd.arbiter.gateway import ROSTER, Gateway
from migrd.arbiter.ownership import Ownerships
from migrd.arbiter.records import key_of
from migrd.engine.arbiter_port import Ownership
from migrd.errors import ArbiterConflict, ArbiterUnavailable

WITHIN_S = 2.0


async def main(url: str, vm: str) -> None:
    gateway = Gateway([url], await Access.load(AccessFiles()), within_s=WITHIN_S)
    arbiter = Ownerships(EtcdStore(gateway), prefix="/migrd", within_s=WITHIN_S)
    try:
        local = {"key": encoded_key(key_of("/migrd", vm)), "serializable": True}
        answer: RangeAnswer = await gateway.call(ROSTER, local, RangeAnswer)
        _say(json.loads(answer.kvs[0].value)["owner"])
        _say(await _outcome(arbiter.read(vm)))
        _say(await _outcome(arbiter.claim(vm, "alpha", 2, "stale")))
        _say(await _outcome(arbiter.claim("another", "alpha", 1, "stale")))
    finally:
        await gateway.close()


async def _outcome(call: Awaitable[Ownership | None]) -> str:
    try:
        found = await call
    except ArbiterUnavailable:
        return "unavailable"
    except ArbiterConflict:
        return "conflict"
    return "none" if found is None else found.owner


def _say(outcome: str) -> None:
    sys.stdout.write(f"{outcome}\n")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
