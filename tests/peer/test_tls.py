"""Certificates: clear refusals at start, and renewal without a restart."""

import asyncio
import datetime
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from migrd.core.certificate import identity
from migrd.errors import ConfigError, PeerRefused, PeerUnreachable
from migrd.peer.client import HttpPeer, connect_peer
from migrd.peer.server import serve_peers
from migrd.peer.tls import PeerTls, TlsFiles
from tests.fakes.peer import FakePeerService
from tests.peer.fleet import Fleet

_YESTERDAY = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
_SOON = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=3)


async def _refusal(files: TlsFiles, host: str = "host-a") -> str:
    with pytest.raises(ConfigError) as refused:
        await PeerTls.load(files, host)
    return refused.value.message


async def test_good_files_give_names_and_the_date_of_expiry(fleet: Fleet) -> None:
    tls = await PeerTls.load(fleet.issue("host-a", "host-a.example", expires=_SOON), "HOST-A")
    assert tls.names == ("host-a", "host-a.example")
    assert abs(tls.expires_wall_s - _SOON.timestamp()) < 2
    assert tls.problem is None


async def test_a_certificate_with_a_common_name_alone_will_do(fleet: Fleet) -> None:
    tls = await PeerTls.load(fleet.issue(common_name="host-a"), "host-a")
    assert tls.names == ("host-a",)


@pytest.mark.parametrize("which", ["cert", "key", "ca"])
async def test_a_missing_file_is_named(fleet: Fleet, which: str) -> None:
    missing = Path("/nonexistent/file.pem")
    message = await _refusal(replace(fleet.issue("host-a"), **{which: missing}))
    assert str(missing) in message


@pytest.mark.parametrize("which", ["cert", "key", "ca"])
async def test_a_file_that_is_no_pem_is_named(fleet: Fleet, which: str) -> None:
    files = fleet.issue("host-a")
    getattr(files, which).write_bytes(b"\x30\x82")
    assert f"{getattr(files, which)}: no PEM file" in await _refusal(files)


async def test_a_key_of_another_certificate_is_named(fleet: Fleet) -> None:
    files = replace(fleet.issue("host-a"), key=fleet.issue("host-b").key)
    assert f"{files.key}: not the key of {files.cert}" in await _refusal(files)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o620, 0o660])
async def test_a_key_that_others_can_read_or_change_is_refused(fleet: Fleet, mode: int) -> None:
    files = fleet.issue("host-a")
    await asyncio.to_thread(files.key.chmod, mode)
    message = await _refusal(files)
    assert f"{mode:04o}" in message
    assert "chmod 0600" in message


async def test_a_key_for_migrds_own_group_is_accepted(fleet: Fleet) -> None:
    files = fleet.issue("host-a")
    await asyncio.to_thread(files.key.chmod, 0o640)
    assert (await PeerTls.load(files, "host-a")).problem is None


async def test_an_expired_certificate_is_refused(fleet: Fleet) -> None:
    files = fleet.issue("host-a", expires=_YESTERDAY)
    message = await _refusal(files)
    assert "expired" in message
    assert str(files.cert) in message


async def test_a_certificate_of_another_ca_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    other = Fleet(tmp_path / "pki", "other")
    files = replace(fleet.issue("host-a"), ca=other.issue("x").ca)
    message = await _refusal(files)
    assert f"not valid under {files.ca}" in message


async def test_a_certificate_that_does_not_name_this_host_is_refused(fleet: Fleet) -> None:
    message = await _refusal(fleet.issue("host-b"), host="host-a")
    assert "names host-b" in message
    assert "this host is host-a" in message


async def test_a_key_with_a_passphrase_is_refused_without_asking_for_it(fleet: Fleet) -> None:
    files = fleet.issue("host-a")
    done = await asyncio.create_subprocess_exec(
        *("openssl", "rsa", "-aes128", "-passout", "pass:x", "-in", str(files.key)),
        *("-out", str(files.key)),
        stderr=asyncio.subprocess.DEVNULL,
    )
    if await done.wait() != 0:  # an elliptic key
        done = await asyncio.create_subprocess_exec(
            *("openssl", "ec", "-aes128", "-passout", "pass:x", "-in", str(files.key)),
            *("-out", str(files.key)),
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert await done.wait() == 0
    assert "passphrase" in await _refusal(files)


def test_a_name_is_found_in_the_dns_names_before_the_common_name() -> None:
    subject = ((("countryName", "NO"),), (("commonName", "cn.example"),))
    both = {"subject": subject, "subjectAltName": (("DNS", "Host-A"), ("IP Address", "::1"))}
    assert identity(both) == ("host-a",)
    assert identity({"subject": subject}) == ("cn.example",)
    assert identity({}) == identity(None) == ()


def _touched(files: TlsFiles) -> None:
    """Make sure that a new file is seen as one, whatever the clock's resolution."""
    for path in (files.cert, files.key, files.ca):
        os.utime(path, (time.time(), time.time() + 5))


async def test_a_renewed_certificate_is_used_without_a_restart(fleet: Fleet) -> None:
    files = fleet.issue("host-a", file="host-a", expires=_SOON)
    tls = await PeerTls.load(files, "host-a")
    assert await tls.reload_if_changed() is False
    before = tls.expires_wall_s
    fleet.issue("host-a", file="host-a")
    await asyncio.to_thread(_touched, files)
    with capture_logs():
        assert await tls.reload_if_changed() is True
    assert tls.expires_wall_s > before


async def test_half_a_renewal_leaves_the_old_certificate_in_use(fleet: Fleet) -> None:
    files = fleet.issue("host-a", file="host-a")
    tls = await PeerTls.load(files, "host-a")
    old_client, old_key = tls.client, files.key.read_bytes()
    fleet.issue("host-a", file="host-a")
    new_key = files.key.read_bytes()
    files.key.write_bytes(old_key)
    await asyncio.to_thread(_touched, files)
    with capture_logs() as logged:
        assert await tls.reload_if_changed() is False
        assert await tls.reload_if_changed() is False
    assert tls.client is old_client
    assert "not the key of" in str(tls.problem)
    assert len(logged) == 1  # told once
    files.key.write_bytes(new_key)
    with capture_logs():
        assert await tls.reload_if_changed() is True
    assert tls.problem is None


async def _hello(url: str, tls: PeerTls) -> str:
    async with connect_peer("host-b", url, tls, warm_every_s=3600) as peer:
        return (await peer.hello()).migrd_version


async def test_another_ca_takes_effect_on_the_listener_and_the_client(
    fleet: Fleet, tmp_path: Path
) -> None:
    service, roster = FakePeerService(), {"host-a"}
    files = fleet.issue("host-b", file="host-b")
    tls = await PeerTls.load(files, "host-b")
    old_client = await fleet.tls("host-a")
    next_fleet = Fleet(tmp_path / "pki", "next")
    new_client = await next_fleet.tls("host-a")
    async with serve_peers(service, roster, tls, "127.0.0.1", 0) as listener:
        url = f"https://127.0.0.1:{listener.port}"
        assert await _hello(url, old_client) == "9.8.7"
        with pytest.raises(PeerUnreachable):
            await _hello(url, new_client)
        renewed = next_fleet.issue("host-b", file="host-b")
        files.ca.write_bytes(renewed.ca.read_bytes())
        await asyncio.to_thread(_touched, files)
        with capture_logs():
            assert await tls.reload_if_changed() is True
        assert await _hello(url, new_client) == "9.8.7"
        with pytest.raises(PeerUnreachable):
            await _hello(url, old_client)


async def test_an_open_peer_presents_its_renewed_certificate_on_its_next_connection(
    fleet: Fleet,
) -> None:
    service = FakePeerService()
    files = fleet.issue("host-z", "host-a", file="host-a")
    client = await PeerTls.load(files, "host-a")
    async with serve_peers(
        service, {"host-a", "host-y"}, await fleet.tls("host-b"), "127.0.0.1", 0
    ) as listener:
        peer = HttpPeer("host-b", f"https://127.0.0.1:{listener.port}", client)
        try:
            await peer.hello()
            fleet.issue("host-y", "host-a", file="host-a")  # two names of the roster: refused
            await asyncio.to_thread(_touched, files)
            with capture_logs():
                assert await client.reload_if_changed() is True
                with pytest.raises(PeerRefused) as refused:
                    await peer.hello()
            assert refused.value.code == "ambiguous_identity"
        finally:
            await peer.close()
