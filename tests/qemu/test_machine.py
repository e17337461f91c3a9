"""What only a real QEMU can show: TLS, postcopy, blockers, and a monitor that is truly blocked."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import trustme

from migrd.core.facts import (
    Feature,
    QemuStatus,
    RunState,
    TransferAddress,
    TransferSettings,
)
from migrd.demo.dh import dh_params_pem
from migrd.engine.ports import TlsIdentity
from migrd.engine.threads import in_thread
from migrd.errors import VmmDied, VmmRefused, VmmTimedOut, VmmUnreachable
from migrd.qemu.machine import Machine
from migrd.qemu.migration import AUTHZ_ID, TLS_ID
from migrd.qemu.preparation import QEMU_DEFAULTS
from tests.contract.conftest import REAL
from tests.contract.test_machine import (
    ENDLESS,
    FAST,
    prepared,
    seen,
    state_reached,
    status_reached,
    status_seen,
)
from tests.contract.vmm_world import MIB, RealWorld, dirtying_guest, nothing_is_left_in
from tests.qemu.real import running_qemu

pytestmark = pytest.mark.real

ENCRYPTED = replace(FAST, tls=True)


@pytest.fixture(params=["7.2", "10.0"])
async def world(
    request: pytest.FixtureRequest, qemu_binaries: dict[str, Path], short_tmp_path: Path
) -> AsyncIterator[RealWorld]:
    rom = await in_thread(dirtying_guest().write_rom, short_tmp_path / "guest.rom")
    world = RealWorld(request.param, qemu_binaries[REAL[request.param]], short_tmp_path, rom)
    try:
        yield world
    finally:
        await world.close()


def write_identity(authority: trustme.CA, name: str, parent: Path) -> TlsIdentity:
    """The five files as QEMU wants them, in a directory of their own."""
    directory = parent / f"tls-{name}"
    directory.mkdir()
    issued = authority.issue_cert(name, common_name=name)
    authority.cert_pem.write_to_path(directory / "ca-cert.pem")
    (directory / "dh-params.pem").write_text(dh_params_pem())  # else QEMU makes them: seconds
    for end in ("server", "client"):
        issued.cert_chain_pems[0].write_to_path(directory / f"{end}-cert.pem")
        issued.private_key_pem.write_to_path(directory / f"{end}-key.pem")
    return TlsIdentity(str(directory))


@pytest.fixture
def identities(tmp_path: Path) -> dict[str, TlsIdentity]:
    authority = trustme.CA()
    known = {name: write_identity(authority, name, tmp_path) for name in ("host-a", "host-b")}
    stranger = trustme.CA()
    return known | {"stranger": write_identity(stranger, "stranger", tmp_path)}


async def moved(
    world: RealWorld,
    outgoing: TransferSettings,
    incoming: TransferSettings,
    tls: tuple[TlsIdentity | None, TlsIdentity | None],
) -> tuple[Machine, QemuStatus]:
    """Try a migration: the source, and how far it came."""
    source, destination = await world.source(), await world.destination()
    address = await destination.prepare_incoming(incoming, tls[1], "127.0.0.1")
    await source.prepare_outgoing(outgoing, tls[0])
    async with source.feed() as feed:
        await source.start_outgoing(address)
        ends = (QemuStatus.PRE_SWITCHOVER, QemuStatus.FAILED)
        sample = await status_seen(feed, *ends)
        if sample.qemu_status is QemuStatus.PRE_SWITCHOVER:
            await source.continue_switchover()
            sample = await status_seen(feed, QemuStatus.COMPLETED, QemuStatus.FAILED)
    return source, sample.qemu_status


@pytest.mark.parametrize("channels", [0, 2])
async def test_an_encrypted_stream_between_hosts_that_know_each_other(
    world: RealWorld, identities: dict[str, TlsIdentity], channels: int
) -> None:
    settings = replace(ENCRYPTED, multifd_channels=channels)
    _, status = await moved(
        world,
        replace(settings, peer_name="host-b"),
        replace(settings, peer_name="host-a"),
        (identities["host-a"], identities["host-b"]),
    )
    assert status is QemuStatus.COMPLETED


@pytest.mark.parametrize(
    ("client", "server", "expects_server", "expects_client"),
    [
        ("host-a", "host-b", "host-c", "host-a"),  # the destination is not whom it was taken for
        ("host-a", "host-b", "host-b", "host-c"),  # nor is the source
        ("stranger", "host-b", "host-b", "stranger"),  # signed by another authority
        ("host-a", "stranger", "stranger", "host-a"),
    ],
)
async def test_a_stranger_on_either_side_gets_no_guest(
    world: RealWorld,
    identities: dict[str, TlsIdentity],
    client: str,
    server: str,
    expects_server: str,
    expects_client: str,
) -> None:
    source, status = await moved(
        world,
        replace(ENCRYPTED, peer_name=expects_server),
        replace(ENCRYPTED, peer_name=expects_client),
        (identities[client], identities[server]),
    )
    assert status is QemuStatus.FAILED
    assert await source.run_state() is RunState.RUNNING
    await nothing_is_left_in(source)


async def test_a_plain_stream_does_not_enter_an_encrypted_destination(
    world: RealWorld, identities: dict[str, TlsIdentity]
) -> None:
    incoming = replace(ENCRYPTED, peer_name="host-a")
    source, status = await moved(world, FAST, incoming, (None, identities["host-b"]))
    assert status is QemuStatus.FAILED
    await state_reached(source, RunState.RUNNING)


async def test_credentials_are_renewed_by_preparing_again_and_gone_after_cleaning(
    world: RealWorld, identities: dict[str, TlsIdentity]
) -> None:
    source, destination = await world.source(), await world.destination()
    settings = replace(ENCRYPTED, peer_name="host-b")
    for name in ("host-a", "host-b"):
        await source.prepare_outgoing(settings, identities[name])
    objects = {
        row["name"] for row in await source.monitor.execute("qom-list", {"path": "/objects"})
    }
    assert TLS_ID in objects
    await nothing_is_left_in(source)
    objects = {
        row["name"] for row in await source.monitor.execute("qom-list", {"path": "/objects"})
    }
    assert {TLS_ID, AUTHZ_ID} & objects == set()
    await destination.prepare_incoming(settings, identities["host-b"], "127.0.0.1")
    rows = await destination.monitor.execute("qom-list", {"path": "/objects"})
    assert {TLS_ID, AUTHZ_ID} <= {row["name"] for row in rows}


async def test_credentials_that_are_not_there_are_refused_with_qemus_reason(
    world: RealWorld, tmp_path: Path
) -> None:
    source = await world.source()
    with pytest.raises(VmmRefused, match=r"ca-cert\.pem|client-cert\.pem"):
        await source.prepare_outgoing(ENCRYPTED, TlsIdentity(str(tmp_path)))
    await nothing_is_left_in(source)


async def test_the_defaults_we_go_back_to_are_those_of_a_fresh_qemu(world: RealWorld) -> None:
    destination = await world.destination()
    values = await destination.monitor.execute("query-migrate-parameters")
    known = {name: value for name, value in QEMU_DEFAULTS.items() if name in values}
    assert {name: values[name] for name in known} == known
    assert len(known) >= 11


async def test_postcopy_moves_the_guest_first_and_the_memory_after(world: RealWorld) -> None:
    settings = replace(ENDLESS, postcopy=True, postcopy_preempt=True)
    source, destination, address = await prepared(world, settings)
    async with source.feed() as feed, destination.feed() as arriving:
        await source.start_outgoing(address)
        await seen(feed, lambda s: (s.qemu_dirty_sync_count or 0) >= 2, "a second round")
        await source.start_postcopy()
        sample = await status_seen(
            feed, QemuStatus.PRE_SWITCHOVER, QemuStatus.POSTCOPY_ACTIVE, QemuStatus.COMPLETED
        )
        if sample.qemu_status is QemuStatus.PRE_SWITCHOVER:
            await source.continue_switchover()
        await status_seen(arriving, QemuStatus.POSTCOPY_ACTIVE)
        await destination.run_guest()
        await status_seen(feed, QemuStatus.COMPLETED)
        await status_seen(arriving, QemuStatus.COMPLETED)
    assert await destination.run_state() is RunState.RUNNING


async def test_a_broken_postcopy_is_paused_and_taken_up_again(world: RealWorld) -> None:
    settings = replace(ENDLESS, postcopy=True)
    source, destination, address = await prepared(world, settings)
    slow = {"max-postcopy-bandwidth": MIB}  # so that it is still under way when it breaks
    await source.monitor.execute("migrate-set-parameters", slow)
    async with source.feed() as feed, destination.feed() as arriving:
        await source.start_outgoing(address)
        await seen(feed, lambda s: (s.transferred_bytes or 0) > MIB, "some bytes sent")
        await source.start_postcopy()
        sample = await status_seen(feed, QemuStatus.PRE_SWITCHOVER, QemuStatus.POSTCOPY_ACTIVE)
        if sample.qemu_status is QemuStatus.PRE_SWITCHOVER:
            await source.continue_switchover()
        await status_seen(arriving, QemuStatus.POSTCOPY_ACTIVE)
        await destination.run_guest()
        await source.pause_postcopy()
        await status_seen(feed, QemuStatus.POSTCOPY_PAUSED)
        await status_seen(arriving, QemuStatus.POSTCOPY_PAUSED)
        with pytest.raises(VmmRefused):  # the memory is on both sides: no way back
            await source.run_guest()
        again = await destination.listen_for_recovery("127.0.0.1")
        assert again.port != address.port
        await source.resume_postcopy(again)
        await status_seen(feed, QemuStatus.POSTCOPY_ACTIVE)
        await source.monitor.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 0})
        await status_seen(feed, QemuStatus.COMPLETED)
        await status_seen(arriving, QemuStatus.COMPLETED)


async def test_a_stalled_multifd_stream_that_no_cancel_ends_is_ended_by_yank(
    world: RealWorld,
) -> None:
    source, _destination, address = await prepared(world, replace(ENDLESS, multifd_channels=2))
    link = await world.link(address)
    async with source.feed() as feed:
        await source.start_outgoing(link.address)
        await seen(feed, lambda s: (s.transferred_bytes or 0) > MIB, "some bytes sent")
        await link.freeze()
        await source.cancel_transfer()
        # A channel that finds its socket shut may fail the migration in that very moment (7.2).
        ended = await status_seen(
            feed, QemuStatus.CANCELLING, QemuStatus.CANCELLED, QemuStatus.FAILED
        )
        await source.free_stalled()
        if ended.qemu_status is not QemuStatus.FAILED:
            await status_seen(feed, QemuStatus.CANCELLED, QemuStatus.FAILED)
    await state_reached(source, RunState.RUNNING)
    await nothing_is_left_in(source)


@pytest.fixture(params=["7.2", "10.0"])
async def blocked_source(
    request: pytest.FixtureRequest, qemu_binaries: dict[str, Path], short_tmp_path: Path
) -> AsyncIterator[Machine]:
    """A source that hangs in its switchover: more is left to send than sockets can hold."""
    rom = await in_thread(dirtying_guest(9000).write_rom, short_tmp_path / "guest.rom")
    world = RealWorld(request.param, qemu_binaries[REAL[request.param]], short_tmp_path, rom)
    try:
        settings = replace(ENDLESS, downtime_limit_s=60.0)
        source, _destination, address = await prepared(world, settings)
        await asyncio.sleep(1.0)  # the guest fills its memory with noise
        link = await world.link(address)
        async with source.feed() as feed:
            await source.start_outgoing(link.address)
            await status_seen(feed, QemuStatus.PRE_SWITCHOVER)
            await link.freeze()
            with contextlib.suppress(VmmTimedOut):  # it may block before it has answered
                await source.continue_switchover()
            await status_seen(feed, QemuStatus.DEVICE)
        await until_blocked(source)
        yield source
    finally:
        await world.close()


async def until_blocked(source: Machine) -> None:
    for _ in range(100):
        try:
            await source.monitor.execute("query-status", deadline_s=0.3)
        except VmmTimedOut:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it answers still")


async def test_a_blocked_monitor_times_out_and_everything_works_after_the_yank(
    blocked_source: Machine,
) -> None:
    source = blocked_source
    assert source.is_reachable  # blocked, and not gone
    async with source.feed() as feed:
        assert await feed.newer(within_s=0.3) is None  # which says nothing at all
        started_s = time.monotonic()
        await source.free_stalled()
        await seen(feed, lambda s: s.run_state is RunState.RUNNING, "the guest running again")
        assert time.monotonic() - started_s < 2.0
    assert (await source.sample()).qemu_status is QemuStatus.FAILED
    assert source.monitor.unanswered == 0  # the late replies have come, and are dropped
    await nothing_is_left_in(source)


async def test_quitting_ends_the_process_even_when_its_monitor_is_blocked(
    blocked_source: Machine,
) -> None:
    blocked_source._call_deadline_s = 0.3
    await blocked_source.quit()
    assert blocked_source.is_dead
    with pytest.raises(VmmDied):
        await blocked_source.run_state()


async def test_with_one_monitor_only_the_lane_goes_beside_its_commands(
    qemu_binary: Path, short_tmp_path: Path
) -> None:
    async with running_qemu(qemu_binary, short_tmp_path, has_oob=False) as qemu:
        facts = await qemu.machine.facts()
        assert {Feature.OOB, Feature.YANK} <= facts.features
        await qemu.machine.free_stalled()  # it was asked, and there is nothing to free
        await qemu.machine.monitor.close()
        with pytest.raises(VmmUnreachable):
            await qemu.machine.free_stalled()


async def test_devices_that_cannot_move_are_named(qemu_binary: Path, short_tmp_path: Path) -> None:
    drive = ("-drive", "if=none,id=d,driver=null-co,size=1M", "-device", "nvme,serial=x,drive=d")
    async with running_qemu(qemu_binary, short_tmp_path, *drive) as qemu:
        facts = await qemu.machine.facts()
        assert any("nvme" in reason for reason in facts.blocked_reasons)
        await qemu.machine.prepare_outgoing(FAST, None)
        with pytest.raises(VmmRefused, match="nvme"):
            await qemu.machine.start_outgoing(TransferAddress("127.0.0.1", 1))


async def test_a_migration_goes_on_while_the_monitor_is_away(world: RealWorld) -> None:
    source, _destination, address = await prepared(world, ENDLESS)
    async with source.feed() as feed:
        await source.start_outgoing(address)
        await seen(feed, lambda s: s.qemu_dirty_sync_count is not None, "the first round")
        await source.monitor.close()  # as when this daemon is killed
        await asyncio.sleep(0.3)
        source.monitor.start()
        await source.wait_connected(within_s=5)
        await seen(feed, lambda s: (s.qemu_dirty_sync_count or 0) >= 2, "a later round")
        await source.cancel_transfer()
        await status_seen(feed, QemuStatus.CANCELLED)


async def test_statuses_arrive_within_milliseconds_of_the_event(world: RealWorld) -> None:
    source, _destination, address = await prepared(world, FAST)
    async with source.feed() as feed:
        await source.start_outgoing(address)
        delays_s = []
        while True:
            sample = await feed.newer(within_s=5)
            assert sample is not None
            now_s = asyncio.get_running_loop().time()
            delays_s.append(now_s - sample.at_s)
            if sample.qemu_status is QemuStatus.PRE_SWITCHOVER:
                break
        await source.cancel_transfer()
    assert min(delays_s) < 0.005, delays_s
    assert sorted(delays_s)[len(delays_s) // 2] < 0.02, delays_s  # on a busy machine too


async def test_a_failed_destination_of_10_stays_and_says_why_and_one_of_7_2_dies(
    world: RealWorld,
) -> None:
    source, destination, address = await prepared(world, ENDLESS)
    async with source.feed() as feed:
        await source.start_outgoing(address)
        await seen(feed, lambda s: (s.transferred_bytes or 0) > MIB, "some bytes sent")
        await source.cancel_transfer()
        await status_seen(feed, QemuStatus.CANCELLED)
    if world.version == "7.2":
        assert await destination._process.wait_dead(within_s=10)
    else:
        failed = await status_reached(destination, QemuStatus.FAILED)
        assert failed.error
        with pytest.raises(VmmRefused):  # once in its life
            await destination.monitor.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
