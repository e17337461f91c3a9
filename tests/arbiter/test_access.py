"""Certificates both ways, users and passwords: by a real etcd, and what is said when they are
wrong."""

import asyncio
import contextlib
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trustme

from migrd.arbiter.access import Access, AccessFiles
from migrd.arbiter.etcd import EtcdStore
from migrd.arbiter.gateway import Gateway
from migrd.arbiter.ownership import Ownerships
from migrd.engine.threads import in_thread
from migrd.errors import ArbiterUnavailable, ConfigError
from tests.arbiter.etcd_server import Cluster, ServerTls
from tests.arbiter.rules import MIGRATION, VM

WITHIN_S = 6.0


def issue(ca: trustme.CA, stem: Path, *names: str) -> tuple[Path, Path]:
    issued = ca.issue_cert(*names)
    cert, key = stem.with_suffix(".crt"), stem.with_suffix(".key")
    cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.touch(mode=0o600)
    key.write_bytes(issued.private_key_pem.bytes())
    return cert, key


@contextlib.asynccontextmanager
async def client(cluster: Cluster, files: AccessFiles) -> AsyncIterator[Ownerships]:
    gateway = Gateway(cluster.urls, await Access.load(files), within_s=WITHIN_S)
    try:
        yield Ownerships(EtcdStore(gateway), prefix="/migrd", within_s=WITHIN_S)
    finally:
        await gateway.close()


@pytest.fixture
def tls_files(tmp_path: Path) -> AccessFiles:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    issue(ca, tmp_path / "server", "127.0.0.1")
    cert, key = issue(ca, tmp_path / "client", "host-a")
    return AccessFiles(tmp_path / "ca.pem", cert, key)


@pytest.fixture
def encrypted(etcd_binary: Path, tmp_path: Path, tls_files: AccessFiles) -> Iterator[Cluster]:
    """An etcd that wants certificates of its clients."""
    assert tls_files.ca is not None
    tls = ServerTls(tmp_path / "server.crt", tmp_path / "server.key", tls_files.ca)
    with Cluster(etcd_binary, tmp_path, tls=tls).serving() as cluster:
        yield cluster


async def test_over_mutual_tls_records_are_kept_and_without_a_certificate_nothing_is(
    encrypted: Cluster, tls_files: AccessFiles, tmp_path: Path
) -> None:
    async with client(encrypted, tls_files) as arbiter:
        claimed = await arbiter.claim(VM, "alpha", 1, MIGRATION)
        assert await arbiter.read(VM) == claimed
    async with client(encrypted, AccessFiles(tls_files.ca)) as stranger:
        with pytest.raises(ArbiterUnavailable):
            await stranger.read(VM)
    other = trustme.CA()
    other.cert_pem.write_to_path(str(tmp_path / "other.pem"))
    files = AccessFiles(tmp_path / "other.pem", tls_files.cert, tls_files.key)
    async with client(encrypted, files) as deceived:
        with pytest.raises(ArbiterUnavailable, match=r"self.signed|unable to get local issuer"):
            await deceived.read(VM)


async def test_renewed_certificates_are_taken_up_and_broken_ones_are_not(
    tls_files: AccessFiles, tmp_path: Path
) -> None:
    access = await Access.load(tls_files)
    first = access.tls
    await access.reload_if_changed()
    assert access.tls is first
    assert tls_files.cert is not None
    good = tls_files.cert.read_bytes()
    tls_files.cert.write_bytes(b"half")
    await access.reload_if_changed()
    assert access.tls is first
    assert access.problem is not None
    assert "issued together" in access.problem
    tls_files.cert.write_bytes(good)
    await access.reload_if_changed()
    assert access.tls is not first
    assert access.problem is None


@pytest.mark.parametrize("wrong", ["ca", "cert", "key", "password_file"])
async def test_a_file_that_is_not_there_is_named(tls_files: AccessFiles, wrong: str) -> None:
    paths = {"ca": tls_files.ca, "cert": tls_files.cert, "key": tls_files.key}
    paths[wrong] = Path("/nonexistent/file.pem")
    with pytest.raises(ConfigError, match=r"/nonexistent/file.pem"):
        await Access.load(AccessFiles(**paths, user="migrd"))


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (b"secret\n", 0o644, "chmod 0600"),
        (b"", 0o600, "one line"),
        (b"a\nb\n", 0o600, "one line"),
        (b"\xff\xfe", 0o600, "one line"),
        (b"x" * 9000, 0o600, "one line"),
    ],
)
async def test_a_password_file_must_be_one_line_that_nobody_else_reads(
    tmp_path: Path, content: bytes, mode: int, said: str
) -> None:
    file = tmp_path / "password"
    file.write_bytes(content)
    file.chmod(mode)
    with pytest.raises(ConfigError, match=said) as refused:
        await Access.load(AccessFiles(user="migrd", password_file=file))
    assert "secret" not in refused.value.message


def enable_auth(cluster: Cluster) -> None:
    """Users root and migrd, the latter with a role on /migrd/."""
    ask = cluster.members[0].ask
    own = {
        "permType": "READWRITE",
        "key": b64encode(b"/migrd/").decode(),
        "range_end": b64encode(b"/migrd0").decode(),
    }
    for path, message in (
        ("role/add", {"name": "root"}),
        ("user/add", {"name": "root", "password": "r"}),
        ("user/grant", {"user": "root", "role": "root"}),
        ("role/add", {"name": "migrd"}),
        ("role/grant", {"name": "migrd", "perm": own}),
        ("user/add", {"name": "migrd", "password": "correct"}),
        ("user/grant", {"user": "migrd", "role": "migrd"}),
        ("enable", {}),
    ):
        ask(f"/v3/auth/{path}", message)


def password_file(tmp_path: Path, password: str) -> Path:
    file = tmp_path / "password"
    file.touch(mode=0o600)
    file.write_text(f"{password}\n")
    return file


@pytest.fixture
def own(etcd_binary: Path, tmp_path: Path) -> Iterator[Cluster]:
    """An etcd for one test."""
    with Cluster(etcd_binary, tmp_path).serving() as cluster:
        yield cluster


async def test_with_a_password_records_are_kept_also_over_a_restart_of_etcd(
    own: Cluster, tmp_path: Path
) -> None:
    files = AccessFiles(user="migrd", password_file=password_file(tmp_path, "correct"))
    async with client(own, files) as arbiter:
        before = await arbiter.claim(VM, "alpha", 1, MIGRATION)  # etcd wants no user yet
        await in_thread(enable_auth, own)
        assert await arbiter.read(VM) == before
        raised = await arbiter.claim(VM, "alpha", 2, MIGRATION)
        # tokens are in etcd's memory: this one is not known any more
        await in_thread(own.members[0].kill)
        await in_thread(own.members[0].run, *_again(own))
        await _until_up(arbiter)
        assert await arbiter.read(VM) == raised
        assert (await arbiter.claim(VM, "alpha", 3, MIGRATION)).epoch == 3
    with pytest.raises(OSError, match="400"):
        await in_thread(own.members[0].ask, "/v3/kv/range", {"key": "AA=="})


def _again(cluster: Cluster) -> tuple[Path, str]:
    member = cluster.members[0]
    return cluster._binary, f"{member.name}={member.peer_url}"


async def _until_up(arbiter: Ownerships) -> None:
    async with asyncio.timeout(40):
        while True:
            with contextlib.suppress(ArbiterUnavailable):
                await arbiter.read(VM)
                return
            await asyncio.sleep(0.1)


async def test_what_is_wrong_with_a_user_is_said_with_its_cure(
    own: Cluster, tmp_path: Path
) -> None:
    await in_thread(enable_auth, own)
    async with client(own, AccessFiles()) as nobody:
        with pytest.raises(ArbiterUnavailable, match=r"set .arbiter. user and password_file"):
            await nobody.read(VM)
    wrong = AccessFiles(user="migrd", password_file=password_file(tmp_path, "wrong"))
    async with client(own, wrong) as arbiter:
        with pytest.raises(ArbiterUnavailable, match="authentication failed") as refused:
            await arbiter.read(VM)
        assert "wrong" not in refused.value.message
        password_file(tmp_path, "correct")
        assert await arbiter.read(VM) is None, "the file is read again"
    files = AccessFiles(user="migrd", password_file=tmp_path / "password")
    gateway = Gateway(own.urls, await Access.load(files), within_s=WITHIN_S)
    try:
        elsewhere = Ownerships(EtcdStore(gateway), prefix="/other", within_s=WITHIN_S)
        with pytest.raises(ArbiterUnavailable, match="permission denied: give the user's role"):
            await elsewhere.claim(VM, "alpha", 1, None)
    finally:
        await gateway.close()
