"""A guest that a person gives up (guest_lost): only when no copy can run, and none is shown as
running afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from migrd.core.admission import Admission
from migrd.core.phases import Phase
from migrd.engine.service import Resolution
from migrd.errors import Conflict, VmmTimedOut
from tests.engine.arbitrating import arbitrated
from tests.fakes.gate import Fault
from tests.fakes.virtual_time import until
from tests.fakes.world import VM, Pair, running_pair


@asynccontextmanager
async def _pair(has_arbiter: bool) -> AsyncIterator[Pair]:
    if has_arbiter:
        async with arbitrated() as (pair, _):
            yield pair
    else:
        async with running_pair() as pair:
            yield pair


async def _hangs_starting(pair: Pair, hangs: list[bool]) -> str:
    """Beta's monitor does not answer `cont` while `hangs`: a person is called."""

    def plan(call: str, number: int) -> Fault | None:
        if hangs[0] and call == "vmm.run_guest":
            return Fault(after_effect=False, error=VmmTimedOut("the monitor does not answer"))
        return None

    pair.beta.gate.plan = plan
    migration_id = await pair.ask()
    await pair.until_phase(migration_id, Phase.NEEDS_OPERATOR)
    assert pair.stands(migration_id, "beta")[0] == "starting"
    return migration_id


async def _give_up(pair: Pair, id_: str) -> tuple[Admission, str]:
    answer = await pair.alpha.service.resolve(
        id_, Resolution.GUEST_LOST, evidence="give it up", by="op"
    )
    return answer.admission, answer.reason


@pytest.mark.parametrize("has_arbiter", [False, True])
async def test_a_guest_is_not_given_up_while_its_copy_is_being_started(has_arbiter: bool) -> None:
    async with _pair(has_arbiter) as pair:
        hangs = [True]
        id_ = await _hangs_starting(pair, hangs)
        assert await _give_up(pair, id_) == (Admission.DENIED, "destination_lives")
        hangs[0] = False
        assert (await pair.until_over(id_)).phase == Phase.SUCCEEDED
        assert pair.running_on() == "beta"


@pytest.mark.parametrize("has_arbiter", [False, True])
async def test_a_guest_is_given_up_when_its_copy_is_dead(has_arbiter: bool) -> None:
    async with _pair(has_arbiter) as pair:
        id_ = await _hangs_starting(pair, [True])
        pair.hosts["beta"].qemu(VM).die("killed")
        await until(lambda: pair.beta.engine.migrations.incoming[id_].vmm_died)
        assert (await _give_up(pair, id_))[0] is Admission.QUEUED
        assert (await pair.until_over(id_)).phase == Phase.GUEST_LOST


@pytest.mark.parametrize("restarts", [False, True])
async def test_what_was_given_up_is_not_said_to_be_started_while_its_process_stands(
    restarts: bool,
) -> None:
    async with running_pair() as pair:
        id_ = await _hangs_starting(pair, [True])
        pair.hosts["beta"].qemu(VM).die("killed")
        await until(lambda: pair.beta.engine.migrations.incoming[id_].vmm_died)
        await _give_up(pair, id_)
        view = await pair.until_over(id_)
        assert view.next_step is not None
        assert f"migrd stop {VM}" in view.next_step
        if restarts:
            await pair.restart("alpha")
        with pytest.raises(Conflict) as caught:
            await pair.alpha.service.start_vm(VM)
        assert caught.value.code == "given_up"
        with pytest.raises(Conflict) as caught:
            await pair.ask()
        assert caught.value.code == "given_up", "what is left of it is not moved, either"
        assert pair.running_on() is None
        pair.guest().may_end = True
        await pair.alpha.service.stop_vm(VM)
        await pair.alpha.service.start_vm(VM)
        await asyncio.sleep(1.0)
        assert pair.running_on() == "alpha"
