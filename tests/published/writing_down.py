"""Published failures of stores, ours and the arbiter's: checks and their plants."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from migrd.arbiter.ownership import Ownerships
from migrd.core.phases import Trigger
from migrd.engine.arbiter_port import Ownership
from migrd.errors import ArbiterConflict, JournalError
from migrd.journal import opening
from migrd.journal.sqlite import open_journal
from tests.fakes.arbiter import FakeArbiter, FakeArbiterStore
from tests.fakes.virtual_time import VirtualTimeLoop
from tests.journal.files import NAME, as_after_a_crash, flip
from tests.journal.samples import event, request

# A write that the disk broke off ------------------------------------------------------------------


def a_journal_whose_last_write_was_broken_off_opens_again() -> None:
    with tempfile.TemporaryDirectory() as place:
        try:
            events = asyncio.run(_after_a_broken_write(Path(place)))
        except JournalError as refusal:
            raise AssertionError(f"the daemon does not start: {refusal.code}") from refusal
    assert events == [Trigger.STARTED], "what was acknowledged is there, and nothing else"


async def _after_a_broken_write(place: Path) -> list[Trigger]:
    """The second record is half on the disk when the process ends; what a new one reads."""
    (place / "here").mkdir()
    wal = place / "here" / f"{NAME}-wal"
    async with open_journal(place / "here" / NAME) as journal:
        await journal.create_outgoing(request())
        await journal.append_outgoing("m1", [event(Trigger.STARTED)])
        before = await asyncio.to_thread(wal.read_bytes)
        await journal.append_outgoing("m1", [event(Trigger.PREFLIGHT_PASSED)])
        after = await asyncio.to_thread(wal.read_bytes)
        left = await asyncio.to_thread(as_after_a_crash, place / "here", place / "left")
    pairs = enumerate(zip(before, after, strict=True))
    last_written = max(at for at, (was, is_now) in pairs if was != is_now)
    await asyncio.to_thread(flip, left.with_name(f"{NAME}-wal"), last_written)
    async with open_journal(left) as journal:
        await journal.append_outgoing("m1", [])
        ((_, events),) = (await journal.replay()).outgoing
    return [one.trigger for one in events]


def a_broken_end_is_a_broken_journal(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(opening, "_MAY_BE_TORN", 0)


# A lease that ended -------------------------------------------------------------------------------


def a_lease_that_ended_frees_nobodys_guest() -> None:
    async def play() -> None:
        store = FakeArbiterStore()
        alpha, beta = FakeArbiter(store, "alpha"), FakeArbiter(store, "beta")
        await alpha.claim("web1", "alpha", 1, None)
        store.down.add("alpha")  # the guest runs on there, and its host is cut off
        store.hosts.discard("alpha")
        try:
            found: Ownership | None = await beta.claim("web1", "beta", 2, None)
        except ArbiterConflict:
            found = await beta.read("web1")
        assert found is not None
        assert found.owner == "alpha", "given to beta while it may run on alpha"

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(play())


def who_has_no_lease_has_no_guest(patch: pytest.MonkeyPatch) -> None:
    claim = Ownerships._claim

    async def by_lease(self: FakeArbiter, wanted: Ownership) -> Ownership:
        found = await self._read(wanted.vm)
        if found is not None and found.owner not in (self.state.hosts or ()):
            wanted = replace(wanted, revision=found.revision)
            return await self._assign(wanted)
        return await claim(self, wanted)

    patch.setattr(Ownerships, "_claim", by_lease)
