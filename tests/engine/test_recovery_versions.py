"""A daemon upgraded in the middle of a migration: a restart like any other.

The records of the earlier version are written here by hand: without the fields that came with the
arbiter. What its journal's files look like is looked at in `tests/journal/test_versions.py`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import MutableMapping
from dataclasses import replace
from typing import Any

import pytest
import structlog

from migrd.journal.codec import Sealed
from tests.fakes.journal import FakeDisk
from tests.fakes.world import VM, Pair
from tests.journal.standing import HOSTS, ID, POINTS, Point, standing

NEW_FIELDS = frozenset({"arbitrated", "decided_on_revision"})
TAKEN_UP = "migration taken up again"
OVER_AT_SOURCE = frozenset({"succeeded", "cancelled", "refused", "rolled_back", "guest_lost"})


def of_before(sealed: Sealed) -> Sealed:
    """The record as the version without these fields wrote it."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items() if k not in NEW_FIELDS}
        return [without(one) for one in value] if isinstance(value, list) else value

    body = json.dumps(without(json.loads(sealed.body)), separators=(",", ":")).encode()
    crc = zlib.crc32(body, zlib.crc32(f"{sealed.kind}/{sealed.version}".encode()))
    return replace(sealed, body=body, crc=crc)


def downgrade(disk: FakeDisk) -> int:
    """All of a disk; how many records were changed by it."""
    changed = 0
    for migrations in (disk.outgoing, disk.incoming):
        for id_, (stored, events) in migrations.items():
            old = of_before(stored), [of_before(event) for event in events]
            changed += sum(
                a != b for a, b in zip((stored, *events), (old[0], *old[1]), strict=True)
            )
            migrations[id_] = old
    return changed


async def to_its_end(pair: Pair) -> tuple[str | None, str | None]:
    await pair.until_over(ID)
    await pair.settle()
    return pair.stands(ID)[0], pair.stands(ID, "beta")[0]


@pytest.mark.parametrize("point", POINTS, ids=lambda point: str(point.name))
async def test_records_of_the_version_before_are_taken_up_in_each_phase(point: Point) -> None:
    async with standing(point) as pair:
        changed = sum(downgrade(pair.disks[name]) for name in HOSTS)
        assert changed or point.name == "pending", "nothing is here that was not written before"
        with structlog.testing.capture_logs() as logs:
            for name in HOSTS:
                await pair.start(name)
        said: list[MutableMapping[str, Any]] = [e for e in logs if e["event"] == TAKEN_UP]
        assert {entry["arbiter"] for entry in said} <= {"journals_decide"}
        assert (point.name in OVER_AT_SOURCE) or "source" in {entry["side"] for entry in said}
        ended, ended_there = await to_its_end(pair)
        assert ended in point.ends
        for entry in said:
            came = ended if entry["side"] == "source" else ended_there
            assert entry.get("expects") in (None, came), (entry, came)
        if pair.hosts["alpha"].living(VM) or pair.hosts["beta"].living(VM):
            await pair.migrates_again(times=1)
