"""The disk of a journal is full: nothing is begun, nothing is guessed, and it goes on afterwards.

The journal has room of its own for a while, so filling the disk is not enough: VMs are defined
until that is used up too.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrd.cli.client import Problem
from migrd.cli.seen import Json
from tests.integration.fleet import MIB, SMALL, Fleet
from tests.integration.scenarios import (
    FAST,
    has_condition,
    hurry,
    in_precopy,
    moved,
    moves_again,
    running,
    stays_and_moves_again,
)
from tests.integration.small_disk import fill

pytestmark = [pytest.mark.real, pytest.mark.timeout(120)]

MOST_COMMITS = 3000


@contextlib.asynccontextmanager
async def full_disk(two: Fleet, host: str) -> AsyncIterator[Problem]:
    """While it lasts the journal of a host cannot be written; the answer that says so first."""
    filler = two.hosts[host].directory / "state" / "filler"
    await asyncio.to_thread(fill, filler)
    try:
        yield await until_refused(two, host)
    finally:
        await asyncio.to_thread(os.unlink, filler)


async def until_refused(two: Fleet, host: str) -> Problem:
    body: Json = {
        "profile": "demo",
        "parameters": {"memory_mib": 32, "firmware": "guest.rom"},
    }
    for number in range(MOST_COMMITS):
        try:
            await two.call(host, "PUT", f"/v1/vms/filler-{number}", body=body)
        except Problem as problem:
            return problem
    raise AssertionError("the journal never became full")


async def test_with_a_full_disk_no_migration_begins_and_nothing_is_touched(
    short_tmp_path: Path, newer: Path
) -> None:
    async with running(short_tmp_path, newer, image=SMALL, small_disk="alpha") as two:
        async with full_disk(two, "alpha") as problem:
            assert problem.status >= 500
            with pytest.raises(Problem) as refused:
                await two.migrate("alpha", "beta")
            assert (refused.value.status, refused.value.code) == (503, "journal_disk_full")
            assert refused.value.retryable
            await two.prove(0, on="alpha")
        await moves_again(two)


async def test_a_disk_that_fills_up_in_precopy_keeps_the_guest_at_the_source(
    short_tmp_path: Path, newer: Path
) -> None:
    """Without a record of it nothing may be granted: the guest is taken back at once."""
    async with running(short_tmp_path, newer, proxied=True, small_disk="alpha") as two:
        assert two.stream is not None
        two.stream.to_target.freeze_after_bytes = MIB
        migration = await two.migrate("alpha", "beta", policy=FAST)
        await two.phase("alpha", migration, "precopy")
        async with full_disk(two, "alpha"):
            two.stream.resume()
            await two.phase("alpha", migration, "rolling_back")
            await two.counts_on("alpha", 100)
            seen = await two.migration("alpha", migration)
            assert seen["phase"] == "rolling_back"  # and not more, until it can be recorded
            assert has_condition("JournalFailing")(seen)
        await stays_and_moves_again(two, migration, "rolled_back", "journal_disk_full")


async def test_a_destination_whose_disk_is_full_is_waited_for(
    short_tmp_path: Path, newer: Path
) -> None:
    """It can record neither that it owns the guest nor that it refuses it."""
    quick = {"alpha": {"migration": "grant_deadline_s = 1.5\n"}}
    async with running(short_tmp_path, newer, settings=quick, small_disk="beta") as two:
        migration = await in_precopy(two)
        async with full_disk(two, "beta"):
            await hurry(two, migration)
            seen = await two.phase("alpha", migration, "needs_operator")
            assert seen["guest_runs_on"] == "unknown"
            await two.stands_still("alpha")
        await moved(two, migration)


async def test_a_destination_whose_disk_is_full_before_it_prepares_is_not_used(
    short_tmp_path: Path, newer: Path
) -> None:
    async with running(short_tmp_path, newer, image=SMALL, small_disk="beta") as two:
        async with full_disk(two, "beta"):
            migration = await two.migrate("alpha", "beta")
            seen = await two.ended("alpha", migration)
            assert "journal" in seen["cause"]["message"]
            await two.only_qemus(1)
        await stays_and_moves_again(two, migration, "rolled_back", "journal_disk_full")
