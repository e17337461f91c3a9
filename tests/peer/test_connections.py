"""Connections between daemons: kept, warmed, broken, replaced; and what each failure proves."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from migrd.core.handover import DestinationPhase
from migrd.errors import ConfigError, PeerRefused, PeerTimedOut, PeerUnreachable
from migrd.peer import client, messages, server
from migrd.peer.client import HttpPeer, connect_peer
from tests.fakes.peer import FakePeerService
from tests.lab.freezing_proxy import FreezingProxy, freezing_proxy
from tests.peer.fleet import SETTINGS, VM, Fleet, host, peer_at


def _port_of(proxy: FreezingProxy) -> int:
    assert isinstance(proxy.address, tuple)
    return proxy.address[1]


async def test_connections_are_kept_and_a_grant_finds_one_open(
    fleet: Fleet, service: FakePeerService
) -> None:
    async with (
        host(fleet, service) as listener,
        freezing_proxy(("127.0.0.1", 0), (listener.host, listener.port)) as proxy,
        peer_at(_port_of(proxy), await fleet.tls("host-a")) as peer,
    ):
        await peer.warm()
        await peer.prepare("m1", 1, VM, SETTINGS)
        waiting = [
            asyncio.create_task(peer.view("m1", newer_than=9, wait_s=20.0)) for _ in range(3)
        ]
        async with asyncio.timeout(10):
            while proxy.accepted < 5:  # noqa: ASYNC110 - a proxy tells nobody
                await asyncio.sleep(0.005)
        for _ in range(20):
            await peer.grant("m1", 1, run_guest=False)
            await peer.hello()
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        assert proxy.accepted == 5  # two kept warm, three held by views


@pytest.mark.parametrize("abruptly", [False, True])
async def test_a_kept_connection_that_was_closed_meanwhile_is_replaced(
    fleet: Fleet, service: FakePeerService, abruptly: bool
) -> None:
    async with (
        host(fleet, service) as listener,
        freezing_proxy(("127.0.0.1", 0), (listener.host, listener.port)) as proxy,
        peer_at(_port_of(proxy), await fleet.tls("host-a")) as peer,
    ):
        await peer.prepare("m1", 1, VM, SETTINGS)
        proxy.cut(abruptly=abruptly)  # and at once, before the client can have noticed
        view = await peer.grant("m1", 1, run_guest=True)
    assert view.phase is DestinationPhase.RUNNING


async def test_a_peer_that_restarts_is_found_again(fleet: Fleet, service: FakePeerService) -> None:
    tls = await fleet.tls("host-a")
    async with host(fleet, service) as listener:
        port = listener.port
        async with peer_at(port, tls) as peer:
            await peer.hello()
    async with peer_at(port, tls) as peer:
        with pytest.raises(PeerUnreachable):
            await peer.prepare("m1", 1, VM, SETTINGS)
        async with host(fleet, service, port=port):
            await peer.prepare("m1", 1, VM, SETTINGS)
        with pytest.raises((PeerUnreachable, PeerTimedOut)):
            await peer.hello()
        with pytest.raises(PeerUnreachable):
            await peer.hello()
        async with host(fleet, service, port=port):
            assert (await peer.view("m1")).phase is DestinationPhase.RECEIVING


async def test_a_host_name_that_nobody_knows_is_unreachable(fleet: Fleet) -> None:
    async with peer_at("https://no-such-host.invalid:7441", await fleet.tls("host-a")) as peer:
        with pytest.raises(PeerUnreachable):
            await peer.hello()


async def test_a_port_where_nobody_listens_is_unreachable(fleet: Fleet) -> None:
    async with peer_at(1, await fleet.tls("host-a")) as peer:
        with pytest.raises(PeerUnreachable) as unreachable:
            await peer.grant("m1", 1, run_guest=True)
    assert "refused" in unreachable.value.message.lower()
    assert "object at" not in unreachable.value.message


async def test_a_host_that_does_not_complete_a_handshake_is_unreachable(
    fleet: Fleet, service: FakePeerService
) -> None:
    async with (
        host(fleet, service) as listener,
        freezing_proxy(("127.0.0.1", 0), (listener.host, listener.port)) as proxy,
        peer_at(_port_of(proxy), await fleet.tls("host-a")) as peer,
    ):
        proxy.freeze()
        with pytest.raises(PeerUnreachable):
            await peer._exchange("hello", b"{}", within_s=0.3)


async def test_a_closing_listener_lets_a_grant_end(fleet: Fleet, service: FakePeerService) -> None:
    tls = await fleet.tls("host-a")
    async with host(fleet, service) as listener:
        peer = HttpPeer("host-b", f"https://127.0.0.1:{listener.port}", tls)
        await peer.prepare("m1", 1, VM, SETTINGS)
        service.slow_s = 0.3
        granting = asyncio.create_task(peer.grant("m1", 1, run_guest=True))
        async with asyncio.timeout(10):
            while ("host-a", "grant") not in service.calls:  # noqa: ASYNC110 - nobody is told
                await asyncio.sleep(0.005)
    await asyncio.wait([granting])
    await peer.close()
    assert service.incoming["m1"].view.phase is DestinationPhase.RUNNING


async def test_the_status_of_a_peer_is_kept_fresh(fleet: Fleet, service: FakePeerService) -> None:
    tls = await fleet.tls("host-a")
    async with host(fleet, service) as listener, peer_at(listener.port, tls) as peer:
        assert peer.status.up is None
        assert (await peer.warm()).up is True
        assert peer.status.migrd_version == "9.8.7"
    async with peer_at(listener.port, tls) as peer:
        status = await peer.warm()
    assert status.up is False
    assert "host-b" in str(status.error)


async def test_each_call_is_told_to_the_metrics(fleet: Fleet, service: FakePeerService) -> None:
    told: list[tuple[str, str, str, float]] = []

    def observe(*one: Any) -> None:
        told.append(one)

    tls = await fleet.tls("host-a")
    async with (
        host(fleet, service) as listener,
        peer_at(listener.port, tls, observe=observe) as peer,
    ):
        await peer.hello()
        with pytest.raises(PeerRefused):
            await peer.view("m9")
    assert [one[:3] for one in told] == [
        ("host-b", "hello", "ok"),
        ("host-b", "view", "problem"),
    ]


@pytest.mark.parametrize(
    "url", ["http://host-b:1", "host-b:1", "https://", "https://h:1/path", "unix:///x"]
)
async def test_an_address_that_is_none_is_a_mistake_of_the_configuration(
    fleet: Fleet, url: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        async with connect_peer("host-b", url, await fleet.tls("host-a")):
            pass
    assert repr(url) in refused.value.message


async def test_an_address_in_use_is_a_mistake_of_the_configuration(
    fleet: Fleet, service: FakePeerService
) -> None:
    async with host(fleet, service) as listener:
        with pytest.raises(ConfigError) as refused:
            async with host(fleet, service, port=listener.port):
                pass
    assert str(listener.port) in refused.value.message


def test_idle_connections_are_closed_by_the_client_first() -> None:
    """Else the server's close would cross a GRANT on its way."""
    assert client._IDLE_S < server.KEEP_ALIVE_S / 1.5
    assert client.WARM_EVERY_S * 4 < client._IDLE_S


async def test_a_message_for_each_field_of_the_settings(fleet: Fleet) -> None:
    """A field added to the settings and forgotten in the message would be lost in silence."""
    odd = replace(
        SETTINGS,
        multifd_channels=3,
        auto_converge=True,
        postcopy=True,
        postcopy_preempt=True,
        tls=False,
    )
    assert messages.WireSettings.of(odd).value() == odd
