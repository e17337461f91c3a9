"""Who may ask, on each kind of socket."""

import os
import pwd
import socket
import ssl
import struct
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
import trustme

from migrd.api.auth import (
    Credentials,
    Gate,
    Scope,
    Token,
    credentials_of,
    load_tokens,
    new_token,
)
from migrd.api.server import is_loopback
from migrd.errors import ConfigError
from tests.api.running import Api, running


def tokens(tmp_path: Path, *lines: str, mode: int = 0o600) -> tuple[Token, ...]:
    path = tmp_path / "tokens"
    path.write_text("\n".join(lines))
    path.chmod(mode)
    return load_tokens(path)


@dataclass(frozen=True)
class Issued:
    """One token that may read, one that may write, and how the daemon knows them."""

    read: str
    write: str
    known: tuple[Token, ...]


@pytest.fixture
def issued(tmp_path: Path) -> Issued:
    read, read_line = new_token("prometheus", Scope.READ)
    write, write_line = new_token("control-plane", Scope.WRITE)
    return Issued(read, write, tokens(tmp_path, "# tokens", "", read_line, write_line))


async def status(url: str, method: str = "GET", token: str | None = None, **more: object) -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.request(method, url, **more) as response,  # type: ignore[arg-type]  # ssl=
    ):
        if response.status in (401, 403):
            assert response.content_type == "application/problem+json"
        if response.status == 401:
            assert response.headers["WWW-Authenticate"] == 'Bearer realm="migrd"'
        return response.status


async def test_on_the_unix_socket_the_kernel_says_who_asks(api: Api) -> None:
    id_ = await api.begun()
    by = (await api("GET", f"/v1/migrations/{id_}")).json["requested_by"]
    assert by == f"uid:{os.getuid()}/{pwd.getpwuid(os.getuid()).pw_name}"


def test_the_kernel_tells_the_groups_too() -> None:
    here, there = socket.socketpair()
    with here, there:
        who = credentials_of(here)
    assert who.uid == os.getuid()
    assert who.gids >= {os.getgid(), *os.getgroups()}


@pytest.mark.parametrize(
    ("who", "listed"),
    [
        (Credentials(4242, frozenset({5})), False),
        (Credentials(1000, frozenset({5})), True),
        (Credentials(4242, frozenset({5, 77})), True),
        (Credentials(0, frozenset({0})), True),
        (Credentials(os.getuid(), frozenset()), True),
    ],
)
def test_a_list_lets_in_its_users_its_groups_root_and_the_daemon(
    who: Credentials, listed: bool
) -> None:
    gate = Gate(allow_uids=frozenset({1000}), allow_gids=frozenset({77}))
    assert gate._is_listed(who) is listed


async def test_who_is_not_on_the_list_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("migrd.api.auth.credentials_of", lambda _: Credentials(4242, frozenset()))
    async with running(tmp_path, gate=Gate(allow_uids=frozenset({1000}))) as api:
        assert "4242" in (await api("GET", "/v1/host")).problem(403, "not_authorized").detail
        (await api("GET", "/nowhere")).problem(403, "not_authorized")
        assert (await api("GET", "/healthz")).status == 200


async def test_tcp_asks_for_a_token_for_everything_but_healthz(
    tmp_path: Path, issued: Issued
) -> None:
    read, write, known = issued.read, issued.write, issued.known
    async with running(tmp_path) as api:
        port = await api.server.serve_tcp("127.0.0.1", 0, tokens=known)
        url = f"http://127.0.0.1:{port}"
        assert await status(f"{url}/healthz") == 200
        for where in ("/v1/host", "/metrics", "/readyz", "/openapi.json", "/", "/nowhere"):
            assert await status(f"{url}{where}") == 401, where
            assert await status(f"{url}{where}", token="x" * 43) == 401, where
        assert await status(f"{url}/metrics", token=read) == 200
        assert await status(f"{url}/nowhere", token=read) == 404
        cancel = f"{url}/v1/migrations/{await api.begun()}:cancel"
        assert await status(cancel, "POST", token=read) == 403
        assert await status(cancel, "POST", token=write) == 202
        assert api.service.said[-1][1] == "token:control-plane"


@pytest.mark.parametrize(
    "sent",
    ["", "Bearer", "Bearer ", "Basic dXNlcjpwYXNz", "Bearer caf\u00e9", "bearer " + "x" * 4000],
)
async def test_a_credential_of_another_shape_is_a_401(
    tmp_path: Path, issued: Issued, sent: str
) -> None:
    async with running(tmp_path) as api:
        port = await api.server.serve_tcp("127.0.0.1", 0, tokens=issued.known)
        async with (
            aiohttp.ClientSession(headers={"Authorization": sent}) as session,
            session.get(f"http://127.0.0.1:{port}/v1/host") as response,
        ):
            assert response.status == 401


async def test_tcp_without_tokens_is_refused_at_start(tmp_path: Path) -> None:
    async with running(tmp_path) as api:
        with pytest.raises(ConfigError, match="only with tokens"):
            await api.server.serve_tcp("127.0.0.1", 0, tokens=())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", "127.0.0.1.nip.io"])
async def test_off_the_loopback_tcp_without_tls_is_refused_at_start(
    tmp_path: Path, issued: Issued, host: str
) -> None:
    async with running(tmp_path) as api:
        with pytest.raises(ConfigError, match="only with TLS"):
            await api.server.serve_tcp(host, 0, tokens=issued.known)


def test_only_a_literal_address_is_trusted_to_be_the_loopback() -> None:
    assert is_loopback("127.0.0.1")
    assert is_loopback("127.9.9.9")
    assert is_loopback("::1")
    assert not is_loopback("localhost.example.org")
    assert not is_loopback("0.0.0.0")


def two_sides() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server_side)
    client_side = ssl.create_default_context()
    authority.configure_trust(client_side)
    return server_side, client_side


async def test_with_tls_it_listens_anywhere(tmp_path: Path, issued: Issued) -> None:
    server_side, client_side = two_sides()
    token = issued.read
    async with running(tmp_path) as api:
        port = await api.server.serve_tcp("0.0.0.0", 0, tokens=issued.known, tls=server_side)
        url = f"https://127.0.0.1:{port}/v1/host"
        assert await status(url, token=token, ssl=client_side) == 200
        assert await status(url, ssl=client_side) == 401


async def test_a_port_that_is_taken_is_named(tmp_path: Path, issued: Issued) -> None:
    known = issued.known
    async with running(tmp_path) as api:
        port = await api.server.serve_tcp("127.0.0.1", 0, tokens=known)
        with pytest.raises(ConfigError, match=str(port)):
            await api.server.serve_tcp("127.0.0.1", port, tokens=known)


def test_a_token_file_keeps_no_token(tmp_path: Path) -> None:
    token, line = new_token("ci", Scope.READ)
    assert len(token) >= 43
    assert token not in line
    (known,) = tokens(tmp_path, line)
    assert (known.name, known.scope) == ("ci", Scope.READ)


def test_a_file_with_one_plain_token_will_do(tmp_path: Path) -> None:
    (known,) = tokens(tmp_path, "s3cret-s3cret-s3cret-s3cret")
    assert known.scope is Scope.WRITE
    assert "s3cret" not in repr(known)


@pytest.mark.parametrize(
    ("lines", "mode", "words"),
    [
        ([], 0o600, "no token"),
        (["# only words"], 0o600, "no token"),
        (["short"], 0o600, "tokens:1"),
        (["", "a admin sha256:" + "0" * 64], 0o600, "tokens:2"),
        (["a read sha256:" + "0" * 63], 0o600, "neither"),
        (["a read sha256:" + "0" * 64, "a read sha256:" + "1" * 64], 0o600, "same name"),
        (["a read sha256:" + "0" * 64], 0o602, "anybody may write"),
        (["s3cret-s3cret-s3cret-s3cret"], 0o644, "others may read"),
    ],
)
def test_a_token_file_that_cannot_be_used_says_where_and_why(
    tmp_path: Path, lines: list[str], mode: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        tokens(tmp_path, *lines, mode=mode)


def test_a_token_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        load_tokens(tmp_path / "nowhere")


def test_ucred_is_read_as_the_kernel_writes_it() -> None:
    assert struct.calcsize("3i") == 12  # struct ucred: pid, uid, gid (include/linux/socket.h)
