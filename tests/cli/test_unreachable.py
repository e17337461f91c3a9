"""Nobody answers, or somebody else does: which address, why, and what to do. Exit code 8 or 1."""

import errno
import socket
import ssl
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trustme

from migrd.cli.address import Address, locate, unreachable
from migrd.cli.exits import Exit, Usage
from tests.cli.conftest import parsed, run_alone


@contextmanager
def listening(path: Path, answer: bytes, *, hang_s: float = 0.0) -> Iterator[Path]:
    """A stream socket that reads something and answers `answer` to everybody."""
    done = threading.Event()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        server.settimeout(0.05)

        def serve() -> None:
            while not done.is_set():
                try:
                    peer, _ = server.accept()
                except TimeoutError:
                    continue
                with peer:
                    peer.settimeout(5)
                    peer.recv(65536)
                    peer.sendall(answer)
                    done.wait(hang_s)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield path
        finally:
            done.set()
            thread.join(10)
    path.unlink()


def test_no_socket_says_which_and_what_to_do(tmp_path: Path) -> None:
    result = run_alone("--socket", str(tmp_path / "none.sock"), "vms")
    assert result.exit_code == Exit.UNREACHABLE
    assert result.stdout == ""
    assert str(tmp_path / "none.sock") in result.stderr.replace("\n", "")
    assert "there is no such socket" in result.stderr
    assert "systemctl status migrd" in result.stderr


def test_a_plain_file_is_not_a_socket(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run_alone("--socket", str(tmp_path / "file"), "vms")
    assert result.exit_code == Exit.UNREACHABLE
    assert "it is not a socket" in result.stderr


def test_a_directory_is_not_a_socket(tmp_path: Path) -> None:
    assert "it is not a socket" in run_alone("--socket", str(tmp_path), "vms").stderr


def test_a_datagram_socket_is_a_socket_of_another_kind(short_tmp_path: Path) -> None:
    path = short_tmp_path / "dgram"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        result = run_alone("--socket", str(path), "vms")
    path.unlink()
    assert result.exit_code == Exit.UNREACHABLE
    assert "a socket of another kind" in result.stderr


def test_a_socket_left_behind_by_a_dead_daemon_says_so(short_tmp_path: Path) -> None:
    path = short_tmp_path / "dead"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    result = run_alone("--socket", str(path), "vms")
    path.unlink()
    assert result.exit_code == Exit.UNREACHABLE
    assert "a daemon that ran here has ended" in result.stderr
    assert "journalctl -u migrd" in result.stderr


def test_without_the_right_it_names_the_group() -> None:
    denied = PermissionError(errno.EACCES, "Permission denied")
    for looked in (stat.S_IFSOCK | 0o660, denied):
        error = unreachable(Address(), denied, looked)
        assert error.exit_code == Exit.UNREACHABLE
        assert "you may not open it" in error.message
        assert "group" in error.cure


def test_a_tcp_port_where_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    result = run_alone("--url", f"http://127.0.0.1:{port}", "vms")
    assert result.exit_code == Exit.UNREACHABLE
    assert "nobody listens there" in result.stderr


def test_a_daemon_that_accepts_nobody_is_told_from_one_that_does_not_answer(
    short_tmp_path: Path,
) -> None:
    path = short_tmp_path / "full"
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as first:
        server.bind(str(path))
        server.listen(0)
        first.connect(str(path))
        result = run_alone("--socket", str(path), "--call-timeout", "5", "stop", "web1")
    path.unlink()
    assert result.exit_code == Exit.UNREACHABLE
    assert "takes no more connections" in result.stderr
    assert "may or may not" not in result.stderr


def test_a_connection_that_is_never_made_was_not_a_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("migrd.cli.client._CONNECT_S", 0.5)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(server.getsockname())
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        result = run_alone("--url", url, "stop", "web1")
        for one in waiting:
            one.close()
    assert result.exit_code == Exit.UNREACHABLE
    assert "no connection in time" in result.stderr
    assert "may or may not" not in result.stderr


def test_a_certificate_that_is_not_trusted_asks_for_the_authority() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def serve() -> None:
            peer, _ = server.accept()
            with peer, suppress(OSError):  # ssl.SSLError is one
                context.wrap_socket(peer, server_side=True)

        thread = threading.Thread(target=serve)
        thread.start()
        result = run_alone("--url", f"https://127.0.0.1:{server.getsockname()[1]}", "vms")
        thread.join(10)
    assert result.exit_code == Exit.UNREACHABLE
    assert "cannot trust" in result.stderr
    assert "--cacert" in result.stderr


@pytest.mark.parametrize(
    "answer",
    [
        b"\x00\xffgarbage\r\n\r\n",
        b'{"QMP": {"version": {}, "capabilities": []}}\r\n',
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 301 Moved\r\nLocation: http://evil/\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_what_is_not_migrd_is_called_so(short_tmp_path: Path, answer: bytes) -> None:
    with listening(short_tmp_path / "s", answer) as path:
        result = run_alone("--socket", str(path), "vms")
    assert result.exit_code == Exit.UNEXPECTED, result.stderr
    assert "is not migrd's API" in result.stderr
    assert "Traceback" not in result.output


def test_json_of_endless_depth_is_not_understood_and_no_traceback(short_tmp_path: Path) -> None:
    deep = b"[" * 200_000
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(deep), deep)
    with listening(short_tmp_path / "s", answer) as path:
        result = run_alone("--socket", str(path), "vms")
    assert result.exit_code == Exit.UNEXPECTED
    assert "is not migrd's API" in result.stderr


def test_an_error_page_of_a_proxy_is_told_by_its_status(short_tmp_path: Path) -> None:
    page = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 6\r\n\r\n<html>"
    with listening(short_tmp_path / "s", page) as path:
        result = run_alone("--socket", str(path), "vms")
    assert result.exit_code == Exit.UNREACHABLE
    assert "Bad Gateway" in result.stderr


def test_no_answer_in_time_says_that_it_may_have_taken_effect(short_tmp_path: Path) -> None:
    with listening(short_tmp_path / "s", b"", hang_s=5) as path:
        result = run_alone("--socket", str(path), "--call-timeout", "0.3", "stop", "web1")
    assert result.exit_code == Exit.UNREACHABLE
    assert "may or may not have taken effect" in result.stderr


def test_a_lost_answer_to_migrate_is_asked_again_and_names_the_key(short_tmp_path: Path) -> None:
    with listening(short_tmp_path / "s", b"") as path:
        result = run_alone("--socket", str(path), "migrate", "web1", "b", "--idempotency-key", "K7")
    assert result.exit_code == Exit.UNREACHABLE
    assert "--idempotency-key K7" in result.stderr.replace("\n", " ")


def test_errors_are_json_where_json_was_asked_for(tmp_path: Path) -> None:
    result = run_alone("--socket", str(tmp_path / "none"), "vms", "-o", "json")
    assert result.stdout == ""
    result.stdout_bytes = result.stderr_bytes
    problem = parsed(result)
    assert problem["code"] == "daemon_unreachable"
    assert problem["exit_code"] == 8
    assert problem["cure"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--socket", "/a", "--url", "http://b"), "two different addresses"),
        (("--url", "ftp://b"), "is not an address of the API"),
        (("--url", "b:80"), "is not an address of the API"),
        (("--url", "http://me:secret@b"), "--token-file"),
        (("--url", "http://b", "--token-file", "/nonexistent"), "cannot read the token file"),
        (("--url", "https://b", "--cacert", "/nonexistent"), "cannot read the certificates"),
    ],
)
def test_a_wrong_address_is_a_usage_error(arguments: tuple[str, ...], said: str) -> None:
    result = run_alone(*arguments, "vms")
    assert result.exit_code == Exit.USAGE
    assert said in result.stderr.replace("\n", " ")
    assert "secret" not in result.stderr


def test_the_environment_is_used_and_an_option_beats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIGRD_SOCKET", "/from/environment")
    assert "/from/environment" in run_alone("vms").stderr
    assert "/from/option" in run_alone("--url", "http://127.0.0.1:1/from/option", "vms").stderr
    assert "/nearer" in run_alone("--socket", "/from/group", "vms", "--socket", "/nearer").stderr
    monkeypatch.setenv("MIGRD_URL", "http://b")
    assert "both set" in run_alone("vms").stderr


def test_a_token_file_of_several_lines_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("one\ntwo\n")
    with pytest.raises(Usage, match="one line"):
        locate(None, "http://b", str(tmp_path / "token"), None)
