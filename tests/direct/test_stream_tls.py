"""With TLS only hosts of our CA, each under its own name, send or take a guest."""

import ssl
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from migrd.direct.manifest import Manifest
from migrd.direct.receiver import ReceiverStatus
from migrd.direct.stream_tls import destination_context, source_context
from migrd.engine.threads import in_thread
from migrd.errors import ConfigError, MigrdError, PeerRefused
from tests.direct.stream_rig import Owner, arrived, guest, receiver, sender


@dataclass(frozen=True)
class Hosts:
    """Directories of certificates as `migration.tls_dir` names them."""

    ours: Path
    theirs: Path
    stranger: Path


def issue(authority: trustme.CA, name: str, directory: Path) -> Path:
    directory.mkdir()
    authority.cert_pem.write_to_path(directory / "ca-cert.pem")
    issued = authority.issue_cert(name)
    for role in ("server", "client"):
        issued.cert_chain_pems[0].write_to_path(directory / f"{role}-cert.pem")
        issued.private_key_pem.write_to_path(directory / f"{role}-key.pem")
    return directory


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Hosts:
    at = tmp_path_factory.mktemp("tls")
    ours = trustme.CA()
    return Hosts(
        issue(ours, "host-a", at / "a"),
        issue(ours, "host-b", at / "b"),
        issue(trustme.CA(), "host-a", at / "stranger"),
    )


async def attempt(source_dir: Path, destination_dir: Path, *, called: str, comes_from: str) -> None:
    """Move a small guest, and check it; raises what the source is told."""
    arriving = await in_thread(destination_context, destination_dir)
    leaving = await in_thread(source_context, source_dir)
    with guest(600) as of:
        of.write(77, b"secret" * 100)
        async with (
            receiver(Owner(), tls=arriving, peer_name=comes_from) as destination,
            sender(of, destination.address, tls=leaving, peer_name=called) as source,
        ):
            try:
                await source.connect(Manifest(of.memory))
            except MigrdError:
                assert destination.status is ReceiverStatus.WAITING
                assert not destination.region_fds
                raise
            await source.send(of.memory.full(), stable=True)
            await source.finish()
            assert arrived(destination) == of.read()


async def test_a_guest_moves_between_hosts_that_know_each_other(hosts: Hosts) -> None:
    await attempt(hosts.ours, hosts.theirs, called="host-b", comes_from="HOST-A")


async def test_a_source_of_another_ca_is_refused(hosts: Hosts) -> None:
    with pytest.raises(PeerRefused, match="TLS"):
        await attempt(hosts.stranger, hosts.theirs, called="host-b", comes_from="host-a")


async def test_a_destination_of_another_ca_is_refused(hosts: Hosts) -> None:
    with pytest.raises(PeerRefused, match=r"TLS failed while shaking hands: .*certificate") as told:
        await attempt(hosts.ours, hosts.stranger, called="host-a", comes_from="host-a")
    assert told.value.code == "tls_refused"


async def test_a_destination_under_another_name_is_refused(hosts: Hosts) -> None:
    with pytest.raises(PeerRefused, match="host-c"):
        await attempt(hosts.ours, hosts.theirs, called="host-c", comes_from="host-a")


async def test_a_source_under_another_name_is_refused(hosts: Hosts) -> None:
    with pytest.raises(PeerRefused, match="names host-a, and not host-d") as told:
        await attempt(hosts.ours, hosts.theirs, called="host-b", comes_from="host-d")
    assert told.value.code == "wrong_certificate"


async def test_a_source_without_a_certificate_is_refused(hosts: Hosts) -> None:
    without = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    await in_thread(without.load_verify_locations, hosts.ours / "ca-cert.pem")
    tls = await in_thread(destination_context, hosts.theirs)
    with guest(8) as of:
        async with (
            receiver(Owner(), tls=tls) as destination,
            sender(of, destination.address, tls=without) as source,
        ):
            with pytest.raises(PeerRefused, match="certificate"):
                await source.connect(Manifest(of.memory))


@pytest.mark.parametrize("is_encrypted_at", ["source", "destination"])
async def test_one_side_with_and_one_without_tls_do_not_come_together(
    hosts: Hosts, is_encrypted_at: str
) -> None:
    at_source = at_destination = None
    if is_encrypted_at == "source":
        at_source = await in_thread(source_context, hosts.ours)
    else:
        at_destination = await in_thread(destination_context, hosts.theirs)
    with guest(8) as of:
        async with (
            receiver(Owner(), tls=at_destination) as destination,
            sender(of, destination.address, tls=at_source) as source,
        ):
            with pytest.raises(MigrdError):
                await source.connect(Manifest(of.memory))
            assert destination.status is ReceiverStatus.WAITING


def test_a_missing_file_is_named(hosts: Hosts, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"client-cert\.pem is not there"):
        source_context(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("server-cert.pem", "server-key.pem", "ca-cert.pem"):
        (broken / name).write_text("no PEM")
    with pytest.raises(ConfigError, match="not usable"):
        destination_context(broken)
