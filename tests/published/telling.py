"""Published failures of dirty pages, devices, peers, answers and metrics: checks and plants."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from migrd.core import tracking_limits
from migrd.core.harvest_round import SourceRead
from migrd.core.migration import MigrationState
from migrd.core.phases import Phase
from migrd.engine import sampler, views
from migrd.engine.decisions import without
from migrd.engine.device_start import DeviceStart
from migrd.engine.dirty_ports import OnLoss
from migrd.engine.harvest import Harvest
from migrd.engine.hot_plug import HotPlug
from migrd.engine.migrations import Migrations
from migrd.engine.outgoing import Outgoing
from migrd.engine.outgoing_record import OutgoingRecord
from migrd.engine.peer_service import PEER_PROTOCOL
from migrd.engine.rate_views import SamplingState
from migrd.engine.service import MigrationView, Progress
from migrd.errors import KernelError, MigrdError, Unavailable, VmmDied
from migrd.metrics import Metrics
from migrd.metrics import migrations as migration_metrics
from migrd.peer import answering
from migrd.peer.messages import GrantRequest
from tests.engine import passthrough
from tests.engine.harvesting import HIGH, moved, started, two
from tests.engine.passthrough import NIC, NIC2, hardware, hosts, immovable, nic
from tests.engine.rates import pair_of, qemu_of, sampled
from tests.engine.test_steering import never_converges
from tests.fakes.dirty_source import SimSource
from tests.fakes.road import Loss
from tests.fakes.virtual_time import until
from tests.fakes.world import VM, Pair
from tests.metrics.views import migration_view
from tests.published.handover import copying
from tests.published.row import losing, on_a_pair, on_hosts

# Dirty pages --------------------------------------------------------------------------------------


def a_second_attempt_moves_all_pages_again() -> None:
    async def play() -> None:
        sources = two()
        first, _ = await started(sources)
        all_pages = moved(first)
        sources[0].write(3, 600)
        await first.round()
        moved(first)
        await first.stop()  # the first attempt has failed
        second, _ = await started(sources)
        assert moved(second) == all_pages, "pages that the first attempt took are not offered"

    asyncio.run(play())


def only_what_is_dirty_is_offered_the_second_time(patch: pytest.MonkeyPatch) -> None:
    start, seen = Harvest._start, set[int]()

    def thrifty(self: Harvest) -> None:
        again = {id(source) for source in self.sources} <= seen
        seen.update(id(source) for source in self.sources)
        start(self)
        if again:
            self.pending.clear()

    patch.setattr(Harvest, "_start", thrifty)


def what_was_written_before_tracking_began_anew_is_not_lost() -> None:
    async def play() -> None:
        iommu, log = two()
        harvest, _ = await started([iommu, log], OnLoss.RESTART)
        moved(harvest)
        log.write(600)
        log.lose()
        await harvest.round()
        assert 600 in moved(harvest), "written before the log was begun anew, and lost"

    asyncio.run(play())


def tracking_is_simply_begun_anew(patch: pytest.MonkeyPatch) -> None:
    def naive(self: Harvest, watched: Any) -> SourceRead:
        buffer = self._take_buffer()
        watched.error = None
        try:
            read: SourceRead = watched.source.read_and_clear(buffer)
        except KernelError as error:
            read = self._lost(watched, error, self._clock.monotonic_s())
        with self._merging:
            self._fresh.merge(buffer)
            buffer.clear()
            self._buffers.append(buffer)
        return read

    patch.setattr(Harvest, "_read", naive)


def tracking_ends_everywhere_whatever_fails() -> None:
    async def play() -> None:
        sources = [SimSource("gpu", HIGH), *two()]
        harvest, _ = await started(sources)
        sources[0].close()  # its device is gone: the transfer fails
        with pytest.raises(MigrdError):
            await harvest.round()
        await harvest.close()
        left = [source.name for source in sources if source.is_tracking]
        assert not left, f"still tracked: {left}"

    asyncio.run(play())


def tracking_ends_where_a_transfer_ended_well(patch: pytest.MonkeyPatch) -> None:
    def only_then(self: Harvest) -> None:
        if all(watched.error is None for watched in self._watched):
            self._stop_sources()

    patch.setattr(Harvest, "_close", only_then)


# Devices ------------------------------------------------------------------------------------------


@on_hosts(lambda: hosts(hardware(immovable(NIC))))
async def a_device_that_cannot_move_is_refused_before_anything_is_touched(pair: Pair) -> None:
    await passthrough.start(pair, NIC)
    view = await pair.migrate()
    codes = {refusal.code for refusal in view.refusals}
    assert view.phase == Phase.REFUSED, f"let through: {view.cause}"
    assert "device_no_migration" in codes


def whether_a_device_moves_shows_when_it_is_tried(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tracking_limits, "_migration", lambda one: iter(()))


@on_hosts(lambda: hosts(hardware(nic(NIC), nic(NIC2))))
async def a_page_table_that_is_refused_tracking_does_not_keep_the_vm_from_starting(
    pair: Pair,
) -> None:
    launcher = pair.alpha.launcher
    launch, tried = launcher.launch, []

    async def refusing(*args: Any, devices: Any, **named: Any) -> Any:
        tried.append(devices.launch)
        if len(tried) == 1:
            id_ = devices.launch.devices[0].id
            said = "Failed to allocate hwpt: Operation not supported"
            raise VmmDied(f"QEMU did not start: -device vfio-pci,id={id_},fd=9: vfio FD9: {said}")
        return await launch(*args, devices=devices, **named)

    launcher.launch = refusing  # type: ignore[assignment, method-assign]  # the fault
    try:
        await passthrough.start(pair, NIC, NIC2)
    except MigrdError as exc:
        raise AssertionError(f"the VM does not start: {exc.message}") from exc
    decision = pair.alpha.service.vm(VM).decision
    assert decision is not None
    assert decision.downgraded, "and that is said"


def one_try_and_no_other(patch: pytest.MonkeyPatch) -> None:
    async def give_up(self: DeviceStart, *args: Any) -> Any:
        raise args[-1]

    patch.setattr(DeviceStart, "_lower", give_up)


@on_hosts(lambda: hosts(hardware(nic(NIC), nic(NIC2))))
async def a_device_that_the_guest_has_not_let_go_of_is_still_there(pair: Pair) -> None:
    await passthrough.start(pair, NIC, NIC2)
    pair.hosts["alpha"].make.guest_lets_go = None
    with contextlib.suppress(Unavailable):  # it has not let go within the time that is waited
        await pair.alpha.service.unplug_device(VM, "hostdev1", by="op")
    has = set(pair.hosts["alpha"].qemu(VM).device_ids)
    said = {device.id for device in pair.alpha.service.vm(VM).spec.devices}
    assert said == has, f"QEMU has {has}, and {said} is said"
    view = await pair.migrate()
    assert view.phase == Phase.SUCCEEDED, (view.cause, view.refusals)


def asked_to_let_go_is_let_go(patch: pytest.MonkeyPatch) -> None:
    unplug = HotPlug.unplug

    async def trusting(self: HotPlug, entry: Any, id_: str, *, by: str) -> None:
        spec = without(entry.spec, id_)
        try:
            await unplug(self, entry, id_, by=by)
        except Unavailable:
            await self._without(entry, entry.vmm, spec)

    patch.setattr(HotPlug, "unplug", trusting)


# Peers --------------------------------------------------------------------------------------------


@on_a_pair()
async def another_host_of_the_fleet_has_no_say_in_a_migration(pair: Pair) -> None:
    pair.road.faults = losing("grant", Loss.UNREACHABLE)
    migration_id = await pair.ask()
    await pair.until_phase(migration_id, Phase.GRANTED)
    epoch = pair.engine_state(migration_id).epoch
    body = GrantRequest(migration_id=migration_id, epoch=epoch, run_guest=True)
    said = body.model_dump_json().encode()
    door = pair.beta.engine.reception
    reply = await answering.answer(door, "gamma", "grant", str(PEER_PROTOCOL), said)
    assert pair.running_on() is None, "started on the word of a stranger"
    assert reply.status == 403
    pair.road.heal()
    assert (await pair.until_over(migration_id)).phase == Phase.SUCCEEDED


def whoever_is_of_the_fleet_may_say_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(answering, "_check_party", lambda *said: None)


# Answers ------------------------------------------------------------------------------------------


@on_a_pair(watch_interval_s=60.0)
async def what_a_guest_does_after_a_failed_migration_is_looked_at(pair: Pair) -> None:
    migration_id = await copying(pair)
    pair.hosts["alpha"].qemu(VM).shut_down()
    await pair.alpha.service.cancel(migration_id, by="op")
    assert (await pair.until_over(migration_id)).phase == Phase.CANCELLED
    await pair.settle()
    await asyncio.sleep(1.0)
    state = pair.alpha.service.vm(VM).state
    assert state == "shutdown", f"it has shut itself down, and is said to be {state}"


def who_stayed_runs(patch: pytest.MonkeyPatch) -> None:
    async def assume(self: Migrations, m: Outgoing) -> None:
        return None  # it ran before, so it runs

    patch.setattr(Migrations, "_after_outgoing", assume)


@on_a_pair()
async def that_a_guest_stayed_is_told_to_whoever_listens(pair: Pair) -> None:
    migration_id = await copying(pair)
    told: dict[int, object] = {}

    async def listen() -> None:
        async with pair.alpha.service.events(after_id=None) as stream:
            async for event in stream:
                if event.kind == "migration.phase":
                    told[event.id] = event.body.get("phase")

    listening = asyncio.create_task(listen())
    await asyncio.sleep(0.1)
    pair.ground.wire.cut()
    await pair.until_over(migration_id)
    await asyncio.sleep(1.0)
    listening.cancel()
    await asyncio.wait([listening])
    assert list(told.values())[-1:] == [Phase.ROLLED_BACK], f"told: {told}"


def an_end_is_told_to_nobody(patch: pytest.MonkeyPatch) -> None:
    changed = OutgoingRecord.changed

    def quiet(self: OutgoingRecord, kind: str, **body: object) -> None:
        state: MigrationState = self.state
        if not state.is_terminal:
            changed(self, kind, **body)

    patch.setattr(OutgoingRecord, "changed", quiet)


@on_a_pair()
async def how_far_it_is_shows_while_it_goes_on(pair: Pair) -> None:
    migration_id = await copying(pair)
    await until(lambda: pair.view(migration_id).phase == Phase.PRECOPY)
    await asyncio.sleep(2.0)
    progress = pair.view(migration_id).progress
    assert progress.total_bytes, f"nothing is said while it goes on: {progress}"
    assert progress.transferred_bytes
    assert progress.remaining_bytes is not None
    assert progress.rounds


def progress_shows_at_the_end(patch: pytest.MonkeyPatch) -> None:
    real = views._progress

    def late(m: Outgoing, now_s: float) -> Progress:
        return real(m, now_s) if m.state.is_terminal else Progress()

    patch.setattr(views, "_progress", late)


# Metrics ------------------------------------------------------------------------------------------


@on_hosts(pair_of)
async def nobody_measures_a_guest_that_migrates(pair: Pair) -> None:
    await sampled(pair)
    never_converges(pair)
    meter = qemu_of(pair).meter
    migration_id = await pair.ask()
    await pair.until_phase(migration_id, Phase.PRECOPY)
    await asyncio.sleep(1.0)
    before = len(meter.begun)
    await asyncio.sleep(100.0)
    assert pair.stands(migration_id)[0] == Phase.PRECOPY
    more = len(meter.begun) - before
    assert more == 0, f"measured {more} times while it migrated"


def a_migration_is_no_reason_not_to_measure(patch: pytest.MonkeyPatch) -> None:
    stands = sampler._stands

    def regardless(entry: Any) -> SamplingState | None:
        state = stands(entry)
        return None if state is SamplingState.MIGRATING else state

    patch.setattr(sampler, "_stands", regardless)


def what_goes_on_is_counted_right_by_a_new_daemon() -> None:
    metrics = Metrics()  # that of a daemon which found the migration in precopy
    metrics.phase_changed("source", Phase.PRECOPY, Phase.SWITCHOVER, None)
    shown = migration_metrics.migration_families([migration_view(phase="switchover")], {})
    counts = dict(shown)[migration_metrics.ACTIVE]
    assert min(counts.values()) >= 0, f"fewer than none: {counts}"
    assert sum(counts.values()) == 1


def phases_are_counted_up_and_down(patch: pytest.MonkeyPatch) -> None:
    ledger: dict[tuple[str, ...], float] = {}

    def moved_on(self: object, role: str, old: str, new: str, duration_s: float | None) -> None:
        for phase, by in ((old, -1), (new, 1)):
            ledger[role, str(phase)] = ledger.get((role, str(phase)), 0) + by

    def counted(active: Iterable[MigrationView]) -> Mapping[tuple[str, ...], float]:
        return dict(ledger)

    patch.setattr(migration_metrics.MigrationMetrics, "phase_changed", moved_on)
    patch.setattr(migration_metrics, "_active_by_phase", counted)
