"""What the engine relies on, of any arbiter: one body, for the simulated one and for etcd.

A `Party` is a third party with hosts; `lose_answers` and `cut` say what a test may do to the way of
one host to it. What a body counts is what took effect (`writes`), not what was sent.
"""

import asyncio
from typing import Any, Protocol

import pytest

from migrd.engine.arbiter_port import Arbiter, Ownership
from migrd.errors import ArbiterConflict, ArbiterUnavailable

VM = "web-1"
MIGRATION = "m-1"


class Party(Protocol):
    """A third party, and the hosts' ways to it."""

    def host(self, name: str) -> Arbiter:
        """The arbiter as that host has it; the same each time."""

    def lose_answers(self, host: str) -> None:
        """Requests of that host take effect, and it does not hear of it."""

    def cut(self, host: str) -> None:
        """No request of that host arrives."""

    def heal(self) -> None: ...

    async def writes(self, vm: str) -> int:
        """How many changes of a VM's record have taken effect since it was created."""


async def granted(party: Party) -> Ownership:
    """The record as it is after the source's grant."""
    claimed = await party.host("alpha").claim(VM, "alpha", 1, MIGRATION)
    return await party.host("alpha").assign(
        claimed, "beta", epoch=1, started=False, migration_id=MIGRATION
    )


class Rules:
    """Inherit, and give a `party` fixture."""

    async def test_a_vm_that_nobody_claimed_has_no_record(self, party: Party) -> None:
        assert await party.host("alpha").read(VM) is None

    async def test_a_claim_says_that_the_guest_runs_here(self, party: Party) -> None:
        claimed = await party.host("alpha").claim(VM, "alpha", 1, MIGRATION)
        assert (claimed.owner, claimed.epoch, claimed.started) == ("alpha", 1, True)
        assert await party.host("beta").read(VM) == claimed

    async def test_a_second_claim_of_the_same_writes_nothing(self, party: Party) -> None:
        first = await party.host("alpha").claim(VM, "alpha", 1, MIGRATION)
        assert await party.host("alpha").claim(VM, "alpha", 1, "m-other") == first
        assert await party.writes(VM) == 1

    async def test_a_claim_of_a_newer_epoch_raises_it(self, party: Party) -> None:
        first = await party.host("alpha").claim(VM, "alpha", 1, MIGRATION)
        second = await party.host("alpha").claim(VM, "alpha", 5, "m-2")
        assert (second.epoch, second.migration_id) == (5, "m-2")
        assert second.revision > first.revision

    async def test_a_claim_of_an_old_epoch_or_of_anothers_vm_changes_nothing(
        self, party: Party
    ) -> None:
        claimed = await party.host("alpha").claim(VM, "alpha", 5, MIGRATION)
        for host, epoch in (("alpha", 4), ("beta", 5), ("beta", 6)):
            with pytest.raises(ArbiterConflict) as conflict:
                await party.host(host).claim(VM, host, epoch, "m-2")
            assert "alpha (epoch 5, started)" in conflict.value.message
        assert await party.host("alpha").read(VM) == claimed

    async def test_a_whole_handover_takes_three_writes(self, party: Party) -> None:
        record = await granted(party)
        seen = await party.host("beta").read(VM)
        assert seen == record
        assert not record.started
        started = await party.host("beta").assign(
            record, "beta", epoch=1, started=True, migration_id=MIGRATION
        )
        assert started.revision > record.revision
        assert await party.host("alpha").read(VM) == started
        assert await party.writes(VM) == 3

    async def test_a_grant_that_was_taken_back_cannot_start(self, party: Party) -> None:
        record = await granted(party)
        kept = await party.host("alpha").assign(
            record, "alpha", epoch=1, started=True, migration_id=MIGRATION
        )
        with pytest.raises(ArbiterConflict) as conflict:
            await party.host("beta").assign(
                record, "beta", epoch=1, started=True, migration_id=MIGRATION
            )
        assert "alpha (epoch 1, started)" in conflict.value.message
        assert await party.host("beta").read(VM) == kept

    async def test_a_start_that_was_recorded_cannot_be_taken_back(self, party: Party) -> None:
        record = await granted(party)
        started = await party.host("beta").assign(
            record, "beta", epoch=1, started=True, migration_id=MIGRATION
        )
        with pytest.raises(ArbiterConflict):
            await party.host("alpha").assign(
                record, "alpha", epoch=1, started=True, migration_id=MIGRATION
            )
        assert await party.host("alpha").read(VM) == started

    async def test_of_a_start_and_a_taking_back_at_once_one_wins(self, party: Party) -> None:
        record = await granted(party)
        both = [
            party.host(name).assign(record, name, epoch=1, started=True, migration_id=MIGRATION)
            for name in ("alpha", "beta")
        ]
        results = await asyncio.gather(*both, return_exceptions=True)
        won = [r for r in results if isinstance(r, Ownership)]
        assert [type(r) for r in results if r not in won] == [ArbiterConflict]
        assert await party.host("alpha").read(VM) == won[0]
        assert await party.writes(VM) == 3

    async def test_what_is_assigned_twice_is_assigned_once(self, party: Party) -> None:
        claimed = await party.host("alpha").claim(VM, "alpha", 1, MIGRATION)
        wanted: dict[str, Any] = {"epoch": 1, "started": False, "run_guest": False}
        first = await party.host("alpha").assign(claimed, "beta", migration_id="m", **wanted)
        again = await party.host("alpha").assign(claimed, "beta", migration_id="m", **wanted)
        assert first == again
        assert not first.run_guest
        assert await party.writes(VM) == 2
        with pytest.raises(ArbiterConflict):
            await party.host("alpha").assign(claimed, "beta", migration_id="m-other", **wanted)

    async def test_a_taking_back_is_written_although_it_says_what_stands_there(
        self, party: Party
    ) -> None:
        """A grant from the same revision may be under way; only a newer revision rules it out."""
        claimed = await party.host("alpha").claim(VM, "alpha", 1, MIGRATION)
        kept = await party.host("alpha").assign(
            claimed, "alpha", epoch=1, started=True, migration_id=MIGRATION
        )
        assert kept.revision > claimed.revision
        with pytest.raises(ArbiterConflict):
            await party.host("alpha").assign(
                claimed, "beta", epoch=1, started=False, migration_id=MIGRATION
            )

    async def test_a_record_is_forgotten_as_it_was_read(self, party: Party) -> None:
        claimed = await party.host("alpha").claim(VM, "alpha", 1, None)
        newer = await party.host("alpha").claim(VM, "alpha", 2, None)
        with pytest.raises(ArbiterConflict):
            await party.host("alpha").forget(claimed)
        assert await party.host("alpha").read(VM) == newer
        for _ in range(2):
            await party.host("alpha").forget(newer)
        assert await party.host("alpha").read(VM) is None
        reborn = await party.host("alpha").claim(VM, "alpha", 1, None)
        assert reborn.revision > newer.revision

    @pytest.mark.parametrize("vm", ["a/b", "../vms/x", "ü", "a b", "%41", "x" * 200])
    async def test_every_name_has_a_record_of_its_own(self, party: Party, vm: str) -> None:
        claimed = await party.host("alpha").claim(vm, "alpha", 1, None)
        assert claimed.vm == vm
        assert await party.host("alpha").read(vm) == claimed
        assert await party.host("alpha").read("x") is None
        assert await party.host("alpha").read("A") is None

    async def test_a_host_that_is_cut_off_knows_nothing(self, party: Party) -> None:
        claimed = await party.host("alpha").claim(VM, "alpha", 1, MIGRATION)
        party.cut("alpha")
        with pytest.raises(ArbiterUnavailable):
            await party.host("alpha").read(VM)
        with pytest.raises(ArbiterUnavailable):
            await party.host("alpha").claim(VM, "alpha", 1, MIGRATION)
        with pytest.raises(ArbiterUnavailable):
            await party.host("alpha").assign(claimed, "beta", epoch=1, started=False)
        with pytest.raises(ArbiterUnavailable):
            await party.host("alpha").forget(claimed)
        assert await party.host("beta").read(VM) == claimed
        party.heal()
        assert await party.host("alpha").read(VM) == claimed

    async def test_a_write_whose_answer_is_lost_is_not_known_and_is_there_once(
        self, party: Party
    ) -> None:
        claimed = await party.host("alpha").claim(VM, "alpha", 1, MIGRATION)
        party.lose_answers("alpha")
        wanted: dict[str, Any] = {"epoch": 1, "started": False, "migration_id": MIGRATION}
        with pytest.raises(ArbiterUnavailable):
            await party.host("alpha").assign(claimed, "beta", **wanted)
        seen = await party.host("beta").read(VM)
        assert seen is not None
        assert seen.owner == "beta"
        party.heal()
        assert await party.host("alpha").assign(claimed, "beta", **wanted) == seen
        assert await party.writes(VM) == 2
