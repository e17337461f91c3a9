"""What the engine relies on, of HTTPS between two hosts and of the road between simulated ones."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from migrd.core.facts import TransferAddress, VmSpec
from migrd.core.handover import DestinationPhase
from migrd.engine.ports import DestinationView, HostProfile, SourceView
from migrd.errors import (
    Conflict,
    JournalError,
    MigrdError,
    PeerError,
    PeerRefused,
    PeerTimedOut,
    PeerUnreachable,
    Unavailable,
    VmmDied,
    VmmTimedOut,
)
from migrd.peer import asking
from migrd.peer.asking import WirePeer
from migrd.peer.client import connect_peer
from tests.fakes.peer import FakePeerService
from tests.fakes.road import Door, Loss, Road, RoadPeer
from tests.lab.freezing_proxy import FreezingProxy, freezing_proxy
from tests.peer.fleet import SETTINGS, VM, Fleet, host

PATIENCE_S = 0.5


@dataclass
class Link:
    """host-a asking host-b, and what a test may do to the way between them."""

    peer: WirePeer
    service: FakePeerService
    lose_requests: Callable[[], None]
    lose_answers: Callable[[], None]
    refuse_connections: Callable[[], None]
    heal: Callable[[], None]


@pytest.fixture(params=["https", "road"])
async def link(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Link]:
    for deadline in ("QUICK_S", "PREFLIGHT_S", "PREPARE_S", "GRANT_S"):
        monkeypatch.setattr(asking, deadline, PATIENCE_S)
    service = FakePeerService()
    make = _https(service, tmp_path) if request.param == "https" else _road(service)
    async with make as made:
        yield made


@contextlib.asynccontextmanager
async def _https(service: FakePeerService, tmp_path: Path) -> AsyncIterator[Link]:
    fleet = Fleet(tmp_path / "pki")
    async with (
        host(fleet, service) as listener,
        freezing_proxy(("127.0.0.1", 0), (listener.host, listener.port)) as proxy,
        connect_peer("host-b", _url(proxy), await fleet.tls("host-a")) as peer,
    ):
        await peer.warm()

        def refuse() -> None:
            proxy.refuse = True
            proxy.cut()

        def heal() -> None:
            proxy.refuse = False
            proxy.cut()
            proxy.resume()

        yield Link(peer, service, proxy.to_target.freeze, proxy.to_client.freeze, refuse, heal)


def _url(proxy: FreezingProxy) -> str:
    assert isinstance(proxy.address, tuple)
    return f"https://127.0.0.1:{proxy.address[1]}"


@contextlib.asynccontextmanager
async def _road(service: FakePeerService) -> AsyncIterator[Link]:
    road = Road()
    road.doors["host-b"] = Door(service)

    def meet(loss: Loss) -> Callable[[], None]:
        def do() -> None:
            road.faults = lambda caller, callee, call: loss

        return do

    try:
        yield Link(
            RoadPeer(road, "host-a", "host-b"),
            service,
            meet(Loss.REQUEST_LOST),
            meet(Loss.ANSWER_LOST),
            meet(Loss.UNREACHABLE),
            road.heal,
        )
    finally:
        await road.close()
        await road.doors["host-b"].close()


def _served(link: Link, call: str) -> int:
    return sum(one == call for _, one in link.service.calls)


async def test_each_call_brings_back_what_the_host_answers(link: Link) -> None:
    peer, service = link.peer, link.service
    assert (await peer.hello()).migrd_version == "9.8.7"
    assert await peer.preflight(VM) == await service.preflight("host-a", VM)
    view = await peer.prepare("m1", 3, VM, SETTINGS)
    assert view == DestinationView(
        "m1", 3, DestinationPhase.RECEIVING, 1, TransferAddress("192.0.2.7", 49152)
    )
    stored = service.incoming["m1"]
    assert (stored.source, stored.vm, stored.settings) == ("host-a", VM, SETTINGS)
    assert await peer.view("m1") == view
    await service.move("m1", DestinationPhase.LOADED)
    ran = await peer.grant("m1", 3, run_guest=True)
    assert (ran.phase, ran.guest_running, ran.generation) == (DestinationPhase.RUNNING, True, 3)
    assert await peer.listen_for_recovery("m1") == TransferAddress("192.0.2.7", 50000)
    service.outgoing["m2"] = ("host-a", SourceView("m2", 9, "granted", copy_gone=True))
    assert await peer.source_view("m2") == SourceView("m2", 9, "granted", copy_gone=True)


async def test_parameters_keep_their_types_on_the_way(link: Link) -> None:
    await link.peer.prepare("m1", 1, VM, SETTINGS)
    arrived = link.service.incoming["m1"].vm.parameters
    assert {name: type(value) for name, value in arrived.items()} == {
        "memory_mib": int,
        "net": bool,
        "disk": str,
    }


async def test_a_profile_with_nothing_known_comes_back_as_such(link: Link) -> None:
    found = await link.peer.preflight(VM)
    assert isinstance(found, HostProfile)
    assert found.qemu_version is None
    assert "from_the_future" in found.features
    assert found.refusals == (("no_kvm", "no /dev/kvm — here"),)


async def test_the_caller_is_who_its_certificate_says(link: Link) -> None:
    await link.peer.preflight(VM)
    assert ("host-a", "preflight") in link.service.calls


async def test_messages_asked_again_change_nothing(link: Link) -> None:
    first = await link.peer.prepare("m1", 1, VM, SETTINGS)
    assert await link.peer.prepare("m1", 1, VM, SETTINGS) == first
    ran = await link.peer.grant("m1", 1, run_guest=True)
    assert await link.peer.grant("m1", 1, run_guest=True) == ran


async def test_a_refusal_is_said_by_the_view_and_is_final(link: Link) -> None:
    await link.peer.prepare("m1", 1, VM, SETTINGS)
    view = await link.peer.discard("m1", 1, "cancelled by ann — really")
    assert (view.phase, view.reason) == (DestinationPhase.REFUSED, "cancelled by ann — really")
    after = await link.peer.grant("m1", 1, run_guest=True)
    assert after.phase is DestinationPhase.REFUSED


async def test_an_old_epoch_is_refused_by_name(link: Link) -> None:
    await link.peer.prepare("m1", 5, VM, SETTINGS)
    for late in (
        link.peer.grant("m1", 4, run_guest=True),
        link.peer.discard("m1", 6, "late"),
        link.peer.prepare("m0", 4, VM, SETTINGS),
    ):
        with pytest.raises(PeerRefused) as refused:
            await late
        assert refused.value.code == "stale_epoch"
    assert link.service.incoming["m1"].view.phase is DestinationPhase.RECEIVING


@pytest.mark.parametrize(
    ("error", "code", "retryable"),
    [
        (Conflict("busy", code="vm_present"), "vm_present", False),
        (Unavailable("full", code="no_slot"), "no_slot", True),
        (JournalError("disk full", code="journal_disk_full"), "journal_disk_full", True),
        (VmmDied("QEMU ended: no such device"), "vmm_died", False),
    ],
)
async def test_a_problem_comes_back_with_its_code(
    link: Link, error: MigrdError, code: str, retryable: bool
) -> None:
    link.service.fail("prepare", error)
    with pytest.raises(PeerRefused) as refused:
        await link.peer.prepare("m1", 1, VM, SETTINGS)
    assert (refused.value.code, refused.value.retryable) == (code, retryable)
    assert error.message in refused.value.message
    assert "host-b" in refused.value.message


@pytest.mark.parametrize("error", [RuntimeError("secret"), VmmTimedOut("no answer from QEMU")])
async def test_where_it_is_not_known_how_far_a_call_came_it_is_not_called_refused(
    link: Link, error: Exception
) -> None:
    link.service.fail("prepare", error)
    with capture_logs(), pytest.raises(PeerTimedOut) as unknown:
        await link.peer.prepare("m1", 1, VM, SETTINGS)
    assert "secret" not in unknown.value.message


async def test_a_migration_of_other_hosts_is_out_of_reach(link: Link) -> None:
    service = link.service
    await service.prepare("host-c", "theirs", 1, VM, SETTINGS)
    service.outgoing["away"] = ("host-c", SourceView("away", 1, "precopy"))
    service.calls.clear()
    for attempt in (
        link.peer.prepare("theirs", 1, VM, SETTINGS),
        link.peer.view("theirs"),
        link.peer.grant("theirs", 1, run_guest=True),
        link.peer.discard("theirs", 1, "mine now"),
        link.peer.listen_for_recovery("theirs"),
        link.peer.source_view("away"),
    ):
        with pytest.raises(PeerRefused) as refused:
            await attempt
        assert refused.value.code == "not_your_migration"
    assert service.calls == []
    assert service.incoming["theirs"].view.phase is DestinationPhase.RECEIVING


async def test_without_a_connection_nothing_was_delivered(link: Link) -> None:
    link.refuse_connections()
    with pytest.raises(PeerError):  # may find a connection that nobody has seen breaking yet
        await link.peer.hello()
    with pytest.raises(PeerUnreachable) as unreachable:
        await link.peer.prepare("m1", 1, VM, SETTINGS)
    assert "host-b" in unreachable.value.message
    assert _served(link, "prepare") == 0
    link.heal()
    assert (await link.peer.prepare("m1", 1, VM, SETTINGS)).migration_id == "m1"


async def test_a_lost_answer_says_not_known_and_asking_again_tells(link: Link) -> None:
    await link.peer.prepare("m1", 1, VM, SETTINGS)
    link.lose_answers()
    with pytest.raises(PeerTimedOut):
        await link.peer.grant("m1", 1, run_guest=True)
    assert link.service.incoming["m1"].view.phase is DestinationPhase.RUNNING
    link.heal()
    assert (await link.peer.grant("m1", 1, run_guest=True)).phase is DestinationPhase.RUNNING


async def test_a_lost_request_says_not_known_too(link: Link) -> None:
    await link.peer.prepare("m1", 1, VM, SETTINGS)
    link.lose_requests()
    with pytest.raises(PeerTimedOut):
        await link.peer.grant("m1", 1, run_guest=True)
    assert _served(link, "grant") == 0
    link.heal()
    assert (await link.peer.view("m1")).phase is DestinationPhase.RECEIVING


async def test_a_view_is_held_back_until_there_is_news(link: Link) -> None:
    first = await link.peer.prepare("m1", 1, VM, SETTINGS)
    waiting = asyncio.create_task(link.peer.view("m1", newer_than=first.generation, wait_s=20.0))
    async with asyncio.timeout(10):
        while not _served(link, "view"):  # noqa: ASYNC110 - the service tells nobody
            await asyncio.sleep(0.005)
        assert not waiting.done()
        await link.service.move("m1", DestinationPhase.LOADED)
        view = await waiting
    assert (view.phase, view.generation) == (DestinationPhase.LOADED, first.generation + 1)


async def test_a_view_without_news_comes_back_as_it_was(link: Link) -> None:
    first = await link.peer.prepare("m1", 1, VM, SETTINGS)
    assert await link.peer.view("m1", newer_than=first.generation, wait_s=0.05) == first


async def test_a_cancelled_view_leaves_the_peer_usable(link: Link) -> None:
    await link.peer.prepare("m1", 1, VM, SETTINGS)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await link.peer.view("m1", newer_than=99, wait_s=20.0)
    assert (await link.peer.view("m1")).phase is DestinationPhase.RECEIVING


async def test_a_caller_that_gives_up_does_not_stop_what_it_began(link: Link) -> None:
    await link.peer.prepare("m1", 1, VM, SETTINGS)
    link.service.slow_s = 0.2
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await link.peer.grant("m1", 1, run_guest=True)
    view = await link.peer.view("m1", newer_than=1, wait_s=10.0)
    assert view.phase is DestinationPhase.RUNNING


async def test_a_migration_nobody_heard_of_is_not_found(link: Link) -> None:
    with pytest.raises(PeerRefused) as refused:
        await link.peer.view("m9")
    assert refused.value.code == "unknown_migration"


@pytest.mark.parametrize("vm", [VmSpec("x" * 300, "p"), VmSpec("a\ud800b", "p"), VmSpec("", "p")])
async def test_what_no_message_can_say_is_not_sent(link: Link, vm: VmSpec) -> None:
    with pytest.raises(PeerRefused) as refused:
        await link.peer.prepare("m1", 1, vm, SETTINGS)
    assert refused.value.code == "bad_message"
    assert _served(link, "prepare") == 0


async def test_text_of_any_origin_survives_as_a_reason(link: Link) -> None:
    await link.peer.prepare("m1", 1, VM, SETTINGS)
    view = await link.peer.discard("m1", 1, "QEMU said \ud800 " + "x" * 100_000)
    assert view.reason is not None
    assert view.reason.startswith("QEMU said ? x")
    assert len(view.reason) <= 8192


async def test_a_host_of_another_name_is_not_taken_for_the_peer(link: Link) -> None:
    link.service.host = "host-z"
    with pytest.raises(PeerRefused) as refused:
        await link.peer.hello()
    assert refused.value.code == "wrong_host"
    assert "host-z" in refused.value.message
