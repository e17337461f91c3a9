"""Rules of the arbiter, broken one at a time: each is noticed by the test named beside it."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from migrd.arbiter import ownership
from migrd.arbiter.ownership import Ownerships
from migrd.arbiter.records import encoded, key_of
from migrd.arbiter.store import Swapped
from migrd.engine.arbiter_port import Ownership
from migrd.errors import ArbiterError, ArbiterUnavailable
from tests.arbiter import test_fake
from tests.arbiter.rules import Rules
from tests.arbiter.test_fake import SimulatedParty
from tests.fakes.arbiter import FakeArbiterStore, Trouble

Patch = pytest.MonkeyPatch
Noticing = Callable[[], Awaitable[None]]


def writes_without_comparing(patch: Patch) -> None:
    compared = FakeArbiterStore.swap

    def swap(
        self: FakeArbiterStore, host: str, key: str, expected: int, value: bytes | None
    ) -> Swapped:
        found = self.entries.get(key)
        return compared(self, host, key, found.revision if found else 0, value)

    patch.setattr(FakeArbiterStore, "swap", swap)


def takes_any_record_of_the_owner_for_done(patch: Patch) -> None:
    patch.setattr(ownership, "_is_done", lambda found, wanted: found.owner == wanted.owner)


def skips_a_write_that_says_what_stands_there(patch: Patch) -> None:
    written = Ownerships._assign

    async def assign(self: Ownerships, wanted: Ownership) -> Ownership:
        found = await self._read(wanted.vm)
        if found is not None and replace(found, revision=wanted.revision) == wanted:
            return found
        return await written(self, wanted)

    patch.setattr(Ownerships, "_assign", assign)


def _swap_once(lost: Callable[[ArbiterUnavailable], None]) -> Any:
    async def swap(
        self: Ownerships, wanted: Ownership, *, removes: bool = False
    ) -> tuple[Swapped, bool]:
        key = key_of(self._prefix, wanted.vm)
        value = None if removes else encoded(wanted)
        try:
            return await self._store.swap(key, wanted.revision, value), True
        except ArbiterUnavailable as exc:
            lost(exc)
        return Swapped(False, await self._store.get(key)), True

    return swap


def takes_no_answer_for_not_done(patch: Patch) -> None:
    patch.setattr(Ownerships, "_swap", _swap_once(lambda exc: None))


def never_reads_after_no_answer(patch: Patch) -> None:
    def give_up(exc: ArbiterUnavailable) -> None:
        raise exc

    patch.setattr(Ownerships, "_swap", _swap_once(give_up))


def claims_whoever_has_it(patch: Patch) -> None:
    async def claim(self: Ownerships, wanted: Ownership) -> Ownership:
        found = await self._read(wanted.vm)
        revision = 0 if found is None else found.revision
        return await self._assign(replace(wanted, revision=revision))

    patch.setattr(Ownerships, "_claim", claim)


def _rule(rule: Callable[[Rules, Any], Awaitable[None]]) -> Noticing:
    return lambda: rule(Rules(), SimulatedParty())


MUTANTS: list[tuple[Callable[[Patch], None], Noticing]] = [
    (writes_without_comparing, lambda: test_fake.test_in_any_trouble_each_revision_is_won_once(0)),
    (writes_without_comparing, _rule(Rules.test_of_a_start_and_a_taking_back_at_once_one_wins)),
    (
        takes_any_record_of_the_owner_for_done,
        _rule(Rules.test_what_is_assigned_twice_is_assigned_once),
    ),
    (
        skips_a_write_that_says_what_stands_there,
        _rule(Rules.test_a_taking_back_is_written_although_it_says_what_stands_there),
    ),
    (
        takes_no_answer_for_not_done,
        test_fake.test_a_lost_write_that_another_followed_is_not_called_a_conflict,
    ),
    (
        never_reads_after_no_answer,
        lambda: test_fake.test_what_one_lost_message_hides_is_found_out_within_the_call(
            Trouble.BROKEN
        ),
    ),
    (
        claims_whoever_has_it,
        _rule(Rules.test_a_claim_of_an_old_epoch_or_of_anothers_vm_changes_nothing),
    ),
]


@pytest.mark.parametrize(("mutant", "noticing"), MUTANTS, ids=[m.__name__ for m, _ in MUTANTS])
async def test_a_broken_rule_is_noticed(
    monkeypatch: Patch, mutant: Callable[[Patch], None], noticing: Noticing
) -> None:
    await noticing()
    with monkeypatch.context() as patch:
        mutant(patch)
        with pytest.raises((AssertionError, ArbiterError, pytest.fail.Exception)):
            await noticing()
