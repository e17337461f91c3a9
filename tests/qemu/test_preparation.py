"""Setting a QEMU up: what it is told, and in which order."""

from __future__ import annotations

from typing import Any

from migrd.core.facts import TransferSettings
from migrd.engine.ports import TlsIdentity
from migrd.qemu.preparation import prepare_to_listen
from migrd.qemu.wire import Arguments, CommandRefused
from tests.qemu.test_migration import schema

ENCRYPTED = TransferSettings(
    downtime_limit_s=0.3, max_bandwidth_bytes_per_s=0, tls=True, peer_name="host-b.example"
)
LISTENING = {
    "status": "setup",
    "socket-address": [{"type": "inet", "host": "127.0.0.1", "port": "4711"}],
}


class Told:
    """Stands for a QEMU: keeps what it was told, and listens once it was told to."""

    def __init__(self, *, is_listening: bool = False) -> None:
        self.commands: list[str] = []
        self._is_listening = is_listening

    async def __call__(
        self, command: str, arguments: Arguments | None = None, *, deadline_s: float | None = None
    ) -> Any:
        self.commands.append(command)
        if command == "object-del":
            raise CommandRefused("object-del", "GenericError", "object not found")
        if command == "migrate-incoming":
            self._is_listening = True
        return LISTENING if command == "query-migrate" and self._is_listening else {}


async def listen(qemu: Told, *, is_new: bool) -> int:
    tls = TlsIdentity("/tls")
    return await prepare_to_listen(
        qemu, schema("10.0"), ENCRYPTED, tls, "127.0.0.1", None, is_new=is_new
    )


async def test_a_new_qemu_is_neither_asked_nor_cleaned_first() -> None:
    qemu = Told()
    assert await listen(qemu, is_new=True) == 4711
    assert qemu.commands == [
        "migrate-set-capabilities",
        "object-add",
        "object-add",
        "migrate-set-parameters",
        "migrate-incoming",
        "query-migrate",
    ]


async def test_one_that_was_spoken_to_before_is_asked_and_cleaned_first() -> None:
    qemu = Told()
    assert await listen(qemu, is_new=False) == 4711
    assert qemu.commands[0] == "query-migrate"
    assert qemu.commands.count("object-del") == 2
    assert qemu.commands.index("object-del") < qemu.commands.index("object-add")


async def test_one_that_listens_already_is_left_alone() -> None:
    qemu = Told(is_listening=True)
    assert await listen(qemu, is_new=False) == 4711
    assert qemu.commands == ["query-migrate"]
