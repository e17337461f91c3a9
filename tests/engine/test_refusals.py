"""A migration that is refused touches nothing, says every reason, and can be asked for again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from migrd.core.facts import Feature, RunState, VmSpec
from migrd.core.migration import Policy, Request, WhenNotConverging
from migrd.core.phases import Phase
from migrd.engine.service import MigrationView, Whereabouts
from tests.fakes.qemu_process import Make
from tests.fakes.world import VM, Pair, running_pair


def codes(view: MigrationView) -> list[str]:
    return [refusal.code for refusal in view.refusals]


async def is_refused(pair: Pair, *expected: str, **wanted: object) -> None:
    """Refused for these reasons; the guest has not noticed; then it works."""
    runs = len(pair.guest().runs)
    view = await pair.migrate(**wanted)  # type: ignore[arg-type]  # passed on as they are
    assert view.phase == Phase.REFUSED, (view.phase, view.cause)
    assert set(expected) <= set(codes(view)), view.refusals
    assert view.guest_runs_on is Whereabouts.SOURCE
    assert pair.running_on() == "alpha"
    assert len(pair.guest().runs) == runs, "it was stopped"
    assert not pair.hosts["beta"].living(VM)


async def test_the_destinations_daemon_is_down() -> None:
    async with running_pair() as pair:
        await pair.kill("beta")
        await is_refused(pair, "destination_unreachable")
        await pair.start("beta")
        await pair.migrates_again()


async def test_the_destinations_daemon_does_not_answer() -> None:
    async with running_pair(preflight_deadline_s=5.0) as pair:
        from tests.fakes.road import Loss

        pair.road.faults = lambda caller, callee, call: (
            Loss.REQUEST_LOST if call == "preflight" else None
        )
        await is_refused(pair, "preflight_timed_out")
        pair.road.heal()
        await pair.migrates_again()


async def test_the_destination_has_no_slot() -> None:
    async with running_pair() as pair:
        pair.options["beta"] = replace(pair.options["beta"], incoming_slots=0)
        await pair.restart("beta")
        await is_refused(pair, "destination_full")
        pair.options["beta"] = replace(pair.options["beta"], incoming_slots=2)
        await pair.restart("beta")
        await pair.migrates_again()


async def test_the_destination_has_too_little_memory() -> None:
    async with running_pair() as pair:
        pair.memory_bytes["beta"] = 1 << 20
        await is_refused(pair, "destination_out_of_memory")
        pair.memory_bytes["beta"] = None  # not known is no refusal
        await pair.migrates_again()


async def test_the_destination_has_seen_the_vm_at_a_later_epoch() -> None:
    async with running_pair() as pair:
        pair.beta.engine.vms.note_epoch(VM, 99)
        await is_refused(pair, "stale_epoch")


async def test_the_destination_has_a_vm_of_that_name() -> None:
    async with running_pair() as pair:
        await pair.beta.service.define_vm(VmSpec(VM, "tiny"), dry_run=False)
        await is_refused(pair, "vm_exists_at_destination")
        await pair.beta.service.forget_vm(VM)
        await pair.migrates_again()


async def test_the_profile_is_unknown_or_another_at_the_destination() -> None:
    async with running_pair() as pair:
        pair.hosts["beta"].profiles = {"tiny": "q35, 512 MiB"}
        await is_refused(pair, "profile_differs")
        pair.hosts["beta"].profiles = {}
        await is_refused(pair, "unknown_profile")
        pair.hosts["beta"].profiles = dict(pair.hosts["alpha"].profiles)
        await pair.migrates_again()


async def test_an_adopted_vm_without_a_profile_is_refused_until_one_is_named() -> None:
    async with Pair() as pair:
        qemu = pair.hosts["alpha"].boot(VM, profile=None)
        pair.hosts["alpha"].adopted.add(qemu.instance)
        await pair.restart("alpha")
        assert not pair.alpha.service.vm(VM).managed
        await is_refused(pair, "no_launch_profile")
        await pair.alpha.service.define_vm(VmSpec(VM, "tiny"), dry_run=False)
        view = await pair.migrate()
        assert view.phase == Phase.SUCCEEDED, (view.refusals, view.cause)


async def test_qemu_itself_says_no() -> None:
    async with Pair() as pair:
        pair.hosts["alpha"].make = Make(blocked_reasons=("non-migratable device: nvme",))
        await pair.boot()
        await is_refused(pair, "qemu_blocks")


async def test_passthrough_devices_and_postcopy_do_not_go_together() -> None:
    async with Pair() as pair:
        pair.hosts["alpha"].make = Make(passthrough_devices=("hostdev0",))
        await pair.boot()
        policy = Policy(when_not_converging=WhenNotConverging.POSTCOPY)
        await is_refused(
            pair, "postcopy_with_passthrough", policy=policy, accept_less_migratable=True
        )
        assert (await pair.migrate(accept_less_migratable=True)).phase == Phase.SUCCEEDED


async def test_a_qemu_that_lacks_what_is_needed_is_named_on_either_side() -> None:
    async with running_pair() as pair:
        old = Make(version="7.2.1", features=frozenset(Feature) - {Feature.MULTIFD, Feature.YANK})
        pair.hosts["beta"].make = old
        await is_refused(pair, "destination_lacks_feature", multifd_channels=2)
        pair.hosts["alpha"].qemu(VM).make = old
        await is_refused(pair, "source_lacks_feature", "destination_lacks_feature")


async def test_a_guest_that_is_shut_down_is_not_moved() -> None:
    async with running_pair() as pair:
        pair.hosts["alpha"].qemu(VM).stop(RunState.SHUTDOWN)
        view = await pair.migrate()
        assert view.phase == Phase.REFUSED
        assert codes(view) == ["guest_not_movable"]


async def test_the_source_qemu_does_not_answer() -> None:
    async with running_pair() as pair:
        pair.hosts["alpha"].qemu(VM).is_silent = True
        view = await pair.migrate()
        assert (view.phase, codes(view)) == (Phase.REFUSED, ["source_unreachable"])
        pair.hosts["alpha"].qemu(VM).is_silent = False
        await pair.migrates_again()


async def test_all_reasons_are_said_at_once_and_the_plan_says_the_same() -> None:
    async with running_pair() as pair:
        pair.memory_bytes["beta"] = 1
        pair.hosts["beta"].profiles = {"tiny": "q35"}
        await pair.beta.service.define_vm(VmSpec(VM, "tiny"), dry_run=False)
        policy = Policy(downtime_limit_s=0.001)
        plan = await pair.alpha.service.plan(Request(VM, "beta", policy=policy))
        view = await pair.migrate(policy=policy)
        expected = {
            "destination_out_of_memory",
            "profile_differs",
            "vm_exists_at_destination",
            "downtime_limit_below_floor",
        }
        assert set(codes(view)) == expected == {r.code for r in plan.refusals}
        assert not plan.possible
        assert pair.running_on() == "alpha"


async def test_a_plan_touches_nothing() -> None:
    async with running_pair() as pair:
        plan = await pair.alpha.service.plan(Request(VM, "beta"))
        assert plan.possible
        assert plan.memory_bytes == pair.ground.load.memory_bytes
        assert not pair.hosts["beta"].qemus
        assert pair.alpha.service.migrations()[1] == []


@pytest.mark.parametrize("reason", ["no such machine", "cannot set up guest memory"])
async def test_the_destinations_qemu_does_not_start(reason: str) -> None:
    async with running_pair() as pair:
        pair.hosts["beta"].launch_fails = reason
        view = await pair.migrate()
        assert view.phase == Phase.ROLLED_BACK
        assert view.cause is not None
        assert reason in view.cause.message, "QEMU's own words"
        assert len(pair.guest().runs) == 1, "the guest was not stopped"
        pair.hosts["beta"].launch_fails = None
        await pair.migrates_again()
