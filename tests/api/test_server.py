"""The unix socket, and stopping."""

import asyncio
import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from migrd.api.server import bind_unix
from migrd.errors import ConfigError
from tests.api.running import Api, running, until


def test_the_socket_has_its_mode_and_group_before_anybody_can_connect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, tried = tmp_path / "api.sock", os.chmod, []

    def chmod(where: Path, mode: int) -> None:
        with socket.socket(socket.AF_UNIX) as early, pytest.raises(ConnectionRefusedError):
            early.connect(str(path))
        tried.append(mode)
        real(where, mode)

    monkeypatch.setattr(os, "chmod", chmod)
    sock, _ = bind_unix(path, mode=0o660, gid=os.getgid())
    with sock, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    assert tried == [0o660]
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert path.stat().st_gid == os.getgid()


async def test_the_default_mode_is_0660(api: Api) -> None:
    assert stat.S_IMODE(os.lstat(api.path).st_mode) == 0o660


def test_a_socket_left_by_a_dead_daemon_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    bind_unix(path, mode=0o600)[0].close()
    assert path.exists()
    sock, _ = bind_unix(path, mode=0o660)
    sock.close()


def test_a_socket_on_which_somebody_listens_is_an_error_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(ConfigError, match="another daemon listens"):
            bind_unix(path, mode=0o660)
        assert path.exists()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_never_removed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s.sock"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="not a socket"):
        bind_unix(path, mode=0o660)
    assert path.is_symlink() or path.exists()


@pytest.mark.parametrize("path", ["/proc/nowhere/s.sock", "/tmp/" + "x" * 120])
def test_a_path_that_cannot_be_bound_is_named(path: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen on"):
        bind_unix(Path(path), mode=0o660)


def test_of_daemons_that_start_together_one_wins_and_is_not_displaced(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    bind_unix(path, mode=0o600)[0].close()  # a stale one, which all of them find
    won: list[socket.socket] = []
    refused: list[ConfigError] = []
    together = threading.Barrier(8)

    def start() -> None:
        together.wait()
        try:
            sock, _ = bind_unix(path, mode=0o660)
        except ConfigError as error:
            refused.append(error)
        else:
            won.append(sock)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    for sock in won:
        sock.close()
    assert len(won) + len(refused) == 8
    assert len(won) == 1


async def test_stopping_removes_our_socket_but_not_a_successors(tmp_path: Path) -> None:
    async with running(tmp_path) as api:
        assert api.path.exists()
    assert not api.path.exists()
    async with running(tmp_path) as api:
        api.path.unlink()
        with socket.socket(socket.AF_UNIX) as successor:
            successor.bind(str(api.path))
    assert api.path.exists()


async def test_stopping_ends_long_polls_with_an_answer(tmp_path: Path) -> None:
    async with running(tmp_path) as api:
        version = (await api("GET", "/v1/vms")).json["resource_version"]
        query = f"watch=1&resource_version={version}&timeout_s=60"
        poll = asyncio.create_task(api("GET", f"/v1/vms?{query}"))
        await until(lambda: api.service.stream._newer._waiters)
        begun_s = asyncio.get_running_loop().time()
        await api.server.close()
        got = await poll
        assert got.status == 200
        assert asyncio.get_running_loop().time() - begun_s < 2.0


async def test_stopping_leaves_no_task_behind(tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    async with running(tmp_path) as api:
        await api("GET", "/v1/host")
        stream = await api.session.get("http://migrd/v1/events")
        async with api.wire() as wire:
            await wire.send(b"GET /he")
            await api.server.close()
        stream.close()
    await until(lambda: asyncio.all_tasks() <= before)
