"""Devices plugged and unplugged while the VM runs: judged first, done, then kept."""

from __future__ import annotations

import pytest

from migrd.core.devices import Capability, DeviceMigration, Unknown
from migrd.core.tracking import Migratability, TrackingPolicy
from migrd.engine import hot_plug
from migrd.engine.service import PlugRequest
from migrd.errors import (
    Conflict,
    JournalError,
    MigrdError,
    NotFound,
    Refused,
    Unavailable,
    VmmRefused,
)
from tests.engine.passthrough import (
    DISK,
    NIC,
    NIC2,
    hardware,
    hosts,
    immovable,
    kinds,
    nic,
    spec_of,
    start,
    told,
    untracked,
)
from tests.fakes.virtual_time import until
from tests.fakes.world import VM, Pair

NOT_ASKED = Capability.unknown(Unknown.NOT_PROBED)


async def plug(pair: Pair, address: str, *, accept: bool = False, id_: str | None = None) -> None:
    request = PlugRequest(address, id_, "rp0", "00.0", accept)
    await pair.alpha.service.plug_device(VM, request, by="test")


async def unplug(pair: Pair, id_: str) -> None:
    await pair.alpha.service.unplug_device(VM, id_, by="test")


def has(pair: Pair) -> set[str]:
    """What its QEMU has."""
    return set(pair.hosts["alpha"].qemu(VM).devices)


def verdict(pair: Pair) -> Migratability:
    decision = pair.alpha.service.vm(VM).decision
    assert decision is not None
    return decision.plan.migratability


async def test_a_capable_device_is_plugged_and_the_decision_stands_durably() -> None:
    async with hosts(hardware(nic(NIC), nic(NIC2))) as pair:
        await start(pair, NIC)
        await plug(pair, NIC2)
        assert has(pair) == {"hostdev0", "hostdev1"}
        assert verdict(pair) is Migratability.LIVE
        view = pair.alpha.service.vm(VM)
        assert [d.address for d in view.spec.devices] == [NIC, NIC2]
        await pair.restart("alpha")
        again = pair.alpha.service.vm(VM)
        assert (again.spec, again.decision) == (view.spec, view.decision)


async def test_t8_a_device_that_would_lower_the_vm_is_refused_and_nothing_is_touched() -> None:
    async with hosts(hardware(nic(NIC), immovable(DISK))) as pair:
        await start(pair, NIC)
        before = pair.alpha.service.vm(VM)
        with pytest.raises(Refused) as refused:
            await plug(pair, DISK)
        assert refused.value.code == "lowers_migratability"
        assert "live" in refused.value.message
        assert "device_no_migration" in {code for _, code in told(refused.value)}
        assert has(pair) == {"hostdev0"}
        assert pair.alpha.service.vm(VM).decision == before.decision
        assert len(pair.hardware["alpha"].opened) == 1, "it was not even opened"


async def test_t8_what_lowers_it_is_plugged_when_that_is_accepted_and_said() -> None:
    async with hosts(hardware(nic(NIC), immovable(DISK))) as pair:
        await start(pair, NIC)
        await plug(pair, DISK, accept=True)
        assert verdict(pair) is not Migratability.LIVE
        (event,) = kinds(pair, "vm.verdict_changed")
        assert event["before"] == "live"


async def test_t8_the_first_device_of_a_vm_may_not_lower_it_either() -> None:
    async with hosts(hardware(nic(NIC), immovable(DISK))) as pair:
        await pair.boot()
        with pytest.raises(Refused) as refused:
            await plug(pair, DISK)
        assert refused.value.code == "lowers_migratability"
        assert has(pair) == set()
        await plug(pair, NIC)
        assert verdict(pair) is Migratability.LIVE
        await unplug(pair, "hostdev0")
        assert pair.alpha.service.vm(VM).decision is None


async def test_beside_devices_that_nothing_was_decided_about_none_is_plugged() -> None:
    async with hosts(hardware(nic(NIC))) as pair:
        pair.hosts["alpha"].make.passthrough_devices = ("from_profile",)
        await pair.boot()
        with pytest.raises(Conflict, match="from_profile") as refused:
            await plug(pair, NIC)
        assert refused.value.code == "devices_not_named"
        assert len(pair.hardware["alpha"].opened) == 0


async def test_unplugging_the_last_offending_device_raises_the_verdict_again() -> None:
    async with hosts(hardware(nic(NIC), immovable(DISK))) as pair:
        await start(pair, NIC, DISK)
        assert verdict(pair) is not Migratability.LIVE
        await unplug(pair, "hostdev1")
        assert has(pair) == {"hostdev0"}
        assert verdict(pair) is Migratability.LIVE
        assert kinds(pair, "vm.verdict_changed")[-1]["after"] == "live"
        assert pair.alpha.service.device(DISK).in_use_by is None


async def test_a_device_that_was_unplugged_can_be_asked_and_given_again() -> None:
    async with hosts(hardware(nic(NIC), nic(NIC2))) as pair:
        await start(pair, NIC, NIC2)
        await unplug(pair, "hostdev1")
        await pair.alpha.service.probe_device(NIC2, by="test")
        await plug(pair, NIC2, accept=True)
        assert has(pair) == {"hostdev0", "hostdev1"}


async def test_under_require_no_device_is_added_that_cannot_be_tracked() -> None:
    async with hosts(hardware(nic(NIC), untracked(DISK))) as pair:
        await start(pair, NIC, policy=TrackingPolicy.REQUIRE)
        with pytest.raises(Refused):
            await plug(pair, DISK, accept=True)
        assert has(pair) == {"hostdev0"}


async def test_a_plugged_device_is_asked_first() -> None:
    unasked = nic(NIC2, dma_logging=NOT_ASKED, migration=DeviceMigration(NOT_ASKED))
    async with hosts(hardware(nic(NIC), unasked)) as pair:
        pair.hardware["alpha"].answers[NIC2] = nic(NIC2)
        await start(pair, NIC)
        await plug(pair, NIC2)
        assert NIC2 in pair.hardware["alpha"].probes
        assert verdict(pair) is Migratability.LIVE


async def test_saying_it_again_changes_nothing_more() -> None:
    async with hosts(hardware(nic(NIC), nic(NIC2))) as pair:
        await start(pair, NIC)
        await plug(pair, NIC2)
        opened = len(pair.hardware["alpha"].opened)
        await plug(pair, NIC2)
        assert has(pair) == {"hostdev0", "hostdev1"}
        assert len(pair.hardware["alpha"].opened) == opened


async def test_what_the_journal_lacks_is_said_and_done_when_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with hosts(hardware(nic(NIC), nic(NIC2))) as pair:
        await start(pair, NIC)

        async def full(stored: object) -> None:
            raise JournalError("the disk is full")

        with monkeypatch.context() as patched:
            patched.setattr(pair.alpha.journal, "put_vm", full)
            with pytest.raises(Unavailable) as half:
                await plug(pair, NIC2)
        assert half.value.code == "not_recorded"
        assert "QEMU has changed" in half.value.message
        assert has(pair) == {"hostdev0", "hostdev1"}
        await plug(pair, NIC2)
        assert [d.id for d in pair.alpha.service.vm(VM).spec.devices] == ["hostdev0", "hostdev1"]
        assert has(pair) == {"hostdev0", "hostdev1"}


async def test_a_qemu_that_does_not_take_it_leaves_nothing_open() -> None:
    async with hosts(hardware(nic(NIC), nic(NIC2))) as pair:
        await start(pair, NIC)
        pair.hosts["alpha"].make.refuses_plug = "Bus 'pcie.0' does not support hotplugging"
        with pytest.raises(VmmRefused, match="hotplugging"):
            await plug(pair, NIC2)
        assert has(pair) == {"hostdev0"}
        assert len(pair.hardware["alpha"].opened) == 1
        assert [d.id for d in pair.alpha.service.vm(VM).spec.devices] == ["hostdev0"]


@pytest.mark.parametrize(
    ("lets_go", "error", "code"),
    [(False, Conflict, "unplug_refused_by_guest"), (None, Unavailable, "unplug_pending")],
)
async def test_a_guest_that_keeps_its_device_is_told_of(
    lets_go: bool | None, error: type[MigrdError], code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hot_plug, "UNPLUG_S", 0.2)
    async with hosts(hardware(nic(NIC), nic(NIC2))) as pair:
        await start(pair, NIC, NIC2)
        make = pair.hosts["alpha"].make
        make.guest_lets_go = lets_go
        with pytest.raises(error) as kept:
            await unplug(pair, "hostdev1")
        assert kept.value.code == code
        assert [d.id for d in pair.alpha.service.vm(VM).spec.devices] == ["hostdev0", "hostdev1"]
        make.guest_lets_go = True
        await unplug(pair, "hostdev1")
        assert [d.id for d in pair.alpha.service.vm(VM).spec.devices] == ["hostdev0"]


async def test_never_during_a_migration() -> None:
    async with hosts(hardware(nic(NIC), nic(NIC2))) as pair:
        await start(pair, NIC)
        pair.ground.wire.freeze()
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, "precopy")
        for act in (plug(pair, NIC2), unplug(pair, "hostdev0")):
            with pytest.raises(Conflict) as refused:
                await act
            assert refused.value.code == "already_migrating"
        pair.ground.wire.heal()
        await pair.until_over(migration_id)


async def test_a_vm_with_plugged_devices_moves_and_comes_back() -> None:
    async with hosts(hardware(nic(NIC), nic(NIC2))) as pair:
        await start(pair, NIC)
        await plug(pair, NIC2)
        await pair.migrates_again()
        assert has(pair) == {"hostdev0", "hostdev1"}


async def test_a_vm_that_does_not_run_is_only_defined_anew() -> None:
    async with hosts(hardware(nic(NIC), nic(NIC2))) as pair:
        await pair.alpha.service.define_vm(spec_of(NIC), dry_run=False)
        await plug(pair, NIC2)
        assert [d.address for d in pair.alpha.service.vm(VM).spec.devices] == [NIC, NIC2]
        await unplug(pair, "hostdev0")
        await unplug(pair, "hostdev1")
        assert pair.alpha.service.vm(VM).decision is None


async def test_what_is_not_there_or_there_already_is_named() -> None:
    async with hosts(hardware(nic(NIC), nic(NIC2))) as pair:
        await start(pair, NIC)
        with pytest.raises(NotFound):
            await unplug(pair, "hostdev7")
        with pytest.raises(Refused, match="hostdev0"):
            await plug(pair, NIC2, id_="hostdev0")
        with pytest.raises(Refused):
            await plug(pair, NIC, id_="hostdev5")
        with pytest.raises(Refused) as refused:
            await plug(pair, "0000:99:00.0")
        assert "unknown_device" in {code for _, code in told(refused.value)}
        assert has(pair) == {"hostdev0"}


async def test_everything_of_a_plugged_device_is_let_go_of_with_its_qemu() -> None:
    async with hosts(hardware(nic(NIC), nic(NIC2))) as pair:
        await start(pair, NIC)
        await plug(pair, NIC2)
        pair.hosts["alpha"].qemu(VM).die("killed")
        await until(lambda: not pair.hardware["alpha"].opened)
