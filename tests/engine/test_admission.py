"""What clients ask for, and the named reason when they do not get it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from migrd.core.admission import Admission
from migrd.core.facts import VmSpec
from migrd.core.migration import Policy, Request
from migrd.core.phases import Phase
from migrd.engine import registry
from migrd.engine.service import Resolution
from migrd.errors import Conflict, Invalid, MigrdError, NotFound, Unavailable
from tests.fakes.virtual_time import until
from tests.fakes.wire import MIB
from tests.fakes.world import VM, Pair, running_pair


async def refused(pair: Pair, error: type[MigrdError], **wanted: Any) -> str:
    """The code with which a request is refused."""
    with pytest.raises(error) as caught:
        await pair.ask(**wanted)
    return caught.value.code


async def test_an_unknown_vm_or_destination_is_not_found() -> None:
    async with running_pair() as pair:
        assert await refused(pair, NotFound, vm="nobody") == "unknown_vm"
        assert await refused(pair, NotFound, destination="gamma") == "unknown_destination"
        assert await refused(pair, Invalid, destination="alpha") == "invalid"


async def test_a_vm_that_is_being_migrated_is_not_migrated_a_second_time() -> None:
    async with running_pair() as pair:
        slow(pair)
        first = await pair.ask()
        assert await refused(pair, Conflict) == "already_migrating"
        await pair.until_phase(first, Phase.PRECOPY)
        assert await refused(pair, Conflict) == "already_migrating"
        with pytest.raises(Conflict, match="being migrated"):
            await pair.alpha.service.stop_vm(VM)
        assert await refused(pair, Conflict, source="beta") == "vm_incoming"
        assert (await pair.until_over(first)).phase == Phase.SUCCEEDED


async def test_a_stopped_or_departed_vm_is_not_migrated() -> None:
    async with running_pair() as pair:
        await pair.migrate()
        assert await refused(pair, Conflict) == "vm_departed"
        pair.guest().may_end = True
        await pair.beta.service.stop_vm(VM)
        assert await refused(pair, Conflict, source="beta") == "vm_stopped"


async def test_a_departed_vm_is_never_started_as_a_second_copy() -> None:
    async with running_pair() as pair:
        await pair.migrate()
        with pytest.raises(Conflict) as caught:
            await pair.alpha.service.start_vm(VM)
        assert caught.value.code == "vm_departed"
        await pair.restart("alpha")
        with pytest.raises(Conflict):
            await pair.alpha.service.start_vm(VM)


async def test_the_same_key_and_body_is_the_same_migration() -> None:
    async with running_pair() as pair:
        first = await pair.ask(key="k1")
        assert await pair.ask(key="k1") == first
        await pair.until_over(first)
        assert await pair.ask(key="k1") == first, "also when it has ended"
        await pair.restart("alpha")
        assert await pair.ask(key="k1") == first, "also after a restart"


async def test_the_same_key_with_another_body_is_refused() -> None:
    async with running_pair() as pair:
        await pair.ask(key="k1")
        other = Request(VM, "beta", policy=Policy(downtime_limit_s=1.0))
        with pytest.raises(Invalid) as caught:
            await pair.alpha.service.create_migration(
                other, idempotency_key="k1", body_digest="another"
            )
        assert caught.value.code == "idempotency_key_reused"


async def test_two_requests_at_the_same_instant_make_one_migration() -> None:
    async with running_pair() as pair:
        asked = await asyncio.gather(*(pair.ask() for _ in range(5)), return_exceptions=True)
        assert sum(isinstance(answer, str) for answer in asked) == 1
        assert all(isinstance(answer, str | Conflict) for answer in asked)


async def test_migrations_beyond_the_slots_wait_their_turn_in_order() -> None:
    async with Pair(outgoing_slots=1, incoming_slots=1) as pair:
        names = ["vm1", "vm2", "vm3"]
        for name in names:
            await pair.boot(name)
        ids = [await pair.ask(name) for name in names]
        assert [pair.view(id_).queue_position for id_ in ids][1:] == [1, 2] or [
            pair.view(id_).queue_position for id_ in ids
        ] == [1, 2, 3]
        order = []
        for id_, name in zip(ids, names, strict=True):
            view = await pair.until_over(id_)
            assert view.phase == Phase.SUCCEEDED, (name, view.cause, view.refusals)
            order.append(view.timeline[-1].monotonic_s)
        assert order == sorted(order)


async def test_a_waiting_migration_can_be_cancelled_and_frees_its_place() -> None:
    async with Pair(outgoing_slots=1) as pair:
        slow(pair)
        for name in ("vm1", "vm2", "vm3"):
            await pair.boot(name)
        first, second, third = [await pair.ask(f"vm{n}") for n in (1, 2, 3)]
        await pair.until_phase(first, Phase.PRECOPY)
        answer = await pair.alpha.service.cancel(second, by="test")
        assert answer.admission is Admission.QUEUED
        assert (await pair.until_over(second)).phase == Phase.CANCELLED
        assert pair.stands(first)[0] == Phase.PRECOPY
        assert (await pair.until_over(third)).phase == Phase.SUCCEEDED


async def test_a_full_queue_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "QUEUE_LIMIT", 1)
    async with Pair(outgoing_slots=0) as pair:
        await pair.boot("vm1")
        await pair.boot("vm2")
        await pair.ask("vm1")
        assert await refused(pair, Unavailable, vm="vm2") == "queue_full"


async def test_an_unknown_migration_is_not_found_and_a_foreign_one_is_redirected() -> None:
    async with running_pair() as pair:
        with pytest.raises(NotFound):
            pair.alpha.service.migration("no-such-id")
        with pytest.raises(NotFound):
            await pair.alpha.service.cancel("no-such-id", by="test")
        view = await pair.migrate()
        with pytest.raises(Conflict) as caught:
            await pair.beta.service.cancel(view.id, by="test")
        assert caught.value.code == "not_the_source"


async def test_wishes_about_an_ended_migration_are_denied_by_name() -> None:
    async with running_pair() as pair:
        view = await pair.migrate()
        service = pair.alpha.service
        answers = [
            await service.cancel(view.id, by="test"),
            await service.switch_over(view.id, by="test"),
            await service.change_policy(view.id, Policy(), by="test"),
            await service.resolve(view.id, Resolution.GUEST_LOST, evidence="", by="test"),
        ]
        assert [answer.admission for answer in answers] == [Admission.DENIED] * 4
        assert [answer.reason for answer in answers] == [
            "past_point_of_no_return",
            "already_ended",
            "already_ended",
            "not_needs_operator",
        ]


async def test_a_vm_is_defined_once_and_not_redefined_while_it_runs() -> None:
    async with running_pair() as pair:
        service = pair.alpha.service
        view, created = await service.define_vm(VmSpec(VM, "tiny"), dry_run=False)
        assert (view.state, created) == ("running", False)
        with pytest.raises(Conflict):
            await service.define_vm(VmSpec(VM, "tiny", {"x": 1}), dry_run=False)
        with pytest.raises(NotFound):
            await service.define_vm(VmSpec("new", "no-such-profile"), dry_run=False)
        with pytest.raises(Conflict):
            await service.forget_vm(VM)
        pair.guest().may_end = True
        await service.stop_vm(VM)
        assert service.vm(VM).state == "stopped"
        await service.forget_vm(VM)
        with pytest.raises(NotFound):
            service.vm(VM)


async def test_a_dry_run_defines_nothing() -> None:
    async with Pair() as pair:
        _, created = await pair.alpha.service.define_vm(VmSpec("new", "tiny"), dry_run=True)
        assert created
        with pytest.raises(NotFound):
            pair.alpha.service.vm("new")


async def test_a_qemu_that_dies_is_seen_to_be_dead_and_can_be_started_again() -> None:
    async with running_pair() as pair:
        pair.hosts["alpha"].qemu(VM).die("killed")
        await until(lambda: pair.alpha.service.vm(VM).state == "dead")
        assert await refused(pair, Conflict) == "vm_stopped"
        await pair.alpha.service.start_vm(VM)
        assert pair.alpha.service.vm(VM).state == "running"


def slow(pair: Pair) -> None:
    pair.ground.wire.bandwidth_bytes_per_s = 300 * MIB
