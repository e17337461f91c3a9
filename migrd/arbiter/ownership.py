"""The rules of a VM's record, over any store that compares and swaps.

    read -> decide -> swap(expected revision) --applied--------------------> done
                        |  |--compare failed--> the same already? ---------> done
                        |                       else ----------------------> ArbiterConflict
                        '--no answer----> read: changed to what was wanted-> done
                                                to something else ---------> ArbiterUnavailable
                                                unchanged -> swap again, by the same revision

Traps
- A swap whose answer was lost may still be under way, and take effect after we have read. Sending
  it again is safe only because both compare with the same revision: one of them applies, at most.
- A record that has changed after a swap without an answer does not tell whether the swap came first
  and was followed by another: that is no conflict, for a conflict says that nothing was changed.
- "The same already" counts only at a revision newer than the expected one. A take-back may write
  what stood there all along; it is the new revision that rules a late grant out.
- Every call ends by one deadline, whatever it takes; then nothing is known (ArbiterUnavailable).
"""

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, Final, TypeVar

from migrd.arbiter.records import decoded, encoded, key_of
from migrd.arbiter.store import ABSENT, Entry, Store, Swapped, revision_of
from migrd.engine.arbiter_port import Ownership
from migrd.errors import ArbiterConflict, ArbiterUnavailable

T = TypeVar("T")

SWAPS_AT_MOST: Final = 3
"""Of one write, while its answers are lost and the record is seen unchanged."""
LOOKS_AT_MOST: Final = 4
"""Of one claim, while others change the record under it."""


class Ownerships:
    """The calls of `engine.arbiter_port.Arbiter` that concern records."""

    def __init__(self, store: Store, *, prefix: str, within_s: float) -> None:
        self._store = store
        self._prefix = prefix
        self._within_s = within_s

    async def read(self, vm: str) -> Ownership | None:
        return await self._in_time(f"read the record of {vm}", self._read(vm))

    async def claim(self, vm: str, host: str, epoch: int, migration_id: str | None) -> Ownership:
        wanted = Ownership(vm, host, epoch, started=True, revision=0, migration_id=migration_id)
        return await self._in_time(f"claim {vm}", self._claim(wanted))

    async def assign(
        self,
        record: Ownership,
        owner: str,
        *,
        epoch: int,
        started: bool,
        run_guest: bool = True,
        migration_id: str | None = None,
    ) -> Ownership:
        wanted = Ownership(
            record.vm, owner, epoch, started, record.revision, run_guest, migration_id
        )
        return await self._in_time(f"assign {record.vm} to {owner}", self._assign(wanted))

    async def forget(self, record: Ownership) -> None:
        await self._in_time(f"forget the record of {record.vm}", self._forget(record))

    async def _in_time(self, what: str, work: Coroutine[Any, Any, T]) -> T:
        try:
            async with asyncio.timeout(self._within_s):
                return await work
        except TimeoutError as late:
            raise ArbiterUnavailable(
                f"no answer from the arbiter within {self._within_s:g} s, to {what}: it is not "
                "known whether it took effect"
            ) from late

    async def _read(self, vm: str) -> Ownership | None:
        key = key_of(self._prefix, vm)
        return self._record(vm, await self._store.get(key))

    def _record(self, vm: str, entry: Entry | None) -> Ownership | None:
        return None if entry is None else decoded(key_of(self._prefix, vm), vm, entry)

    async def _claim(self, wanted: Ownership) -> Ownership:
        found = await self._read(wanted.vm)
        for _ in range(LOOKS_AT_MOST):
            if found is not None:
                if found.owner != wanted.owner or found.epoch > wanted.epoch:
                    raise _conflict(f"{wanted.vm} cannot be claimed for {_said(wanted)}", found)
                if found.epoch == wanted.epoch and found.started:
                    return found
            revision = ABSENT if found is None else found.revision
            swapped, is_certain = await self._swap(replace(wanted, revision=revision))
            found = self._record(wanted.vm, swapped.entry)
            if found is not None and (swapped.is_applied or _is_done(found, wanted)):
                return found
            if not is_certain:
                raise _not_known(wanted, found)
        raise _conflict(f"{wanted.vm} changes too often to be claimed", found)

    async def _assign(self, wanted: Ownership) -> Ownership:
        swapped, is_certain = await self._swap(wanted)
        found = self._record(wanted.vm, swapped.entry)
        if found is not None and (swapped.is_applied or _is_done(found, wanted)):
            return found
        if not is_certain:
            raise _not_known(wanted, found)
        raise _conflict(
            f"{wanted.vm} was not given to {_said(wanted)}, for its record is not at revision "
            f"{wanted.revision} any more",
            found,
        )

    async def _forget(self, record: Ownership) -> None:
        swapped, is_certain = await self._swap(record, removes=True)
        if swapped.is_applied or swapped.entry is None:
            return
        found = self._record(record.vm, swapped.entry)
        if not is_certain:
            raise _not_known(record, found)
        raise _conflict(f"the record of {record.vm} was not removed", found)

    async def _swap(self, wanted: Ownership, *, removes: bool = False) -> tuple[Swapped, bool]:
        """One compare-and-swap on `wanted.revision`; and whether it is certain that one that was
        not applied has changed nothing."""
        key = key_of(self._prefix, wanted.vm)
        value = None if removes else encoded(wanted)
        is_certain = True
        for left in reversed(range(SWAPS_AT_MOST)):
            try:
                return await self._store.swap(key, wanted.revision, value), is_certain
            except ArbiterUnavailable:
                if not left:
                    raise
            is_certain = False
            entry = await self._store.get(key)
            if revision_of(entry) != wanted.revision:
                return Swapped(is_applied=False, entry=entry), is_certain
        raise AssertionError("the last swap returns or raises")


def _is_done(found: Ownership, wanted: Ownership) -> bool:
    is_newer = found.revision > wanted.revision
    return is_newer and replace(found, revision=wanted.revision) == wanted


def _said(record: Ownership) -> str:
    return f"{record.owner} (epoch {record.epoch}{', started' if record.started else ''})"


def _conflict(what: str, found: Ownership | None) -> ArbiterConflict:
    if found is None:
        return ArbiterConflict(f"{what}: there is none")
    return ArbiterConflict(f"{what}: it says {_said(found)} at revision {found.revision}")


def _not_known(wanted: Ownership, found: Ownership | None) -> ArbiterUnavailable:
    now = "it is gone" if found is None else f"it says {_said(found)}"
    return ArbiterUnavailable(
        f"a write of the record of {wanted.vm} had no answer, and the record has changed since: "
        f"{now}; it is not known whether the write came first"
    )
