"""The network that guests travel on: ports that listen, and a link that breaks in all ways.

`frozen` takes every byte and delivers none, and nobody notices (a partition). `cut` is a reset:
both ends notice, where they look. `swallows_ack` delivers everything but the destination's last
word, without which a source with a return path is never `completed`.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fakes.qemu_process import FakeQemu
    from tests.fakes.transfer import Transfer

MIB = 1 << 20
GOOD_BYTES_PER_S = 1024 * MIB


class FakeWire:
    """One link between all hosts of a test."""

    def __init__(self, bandwidth_bytes_per_s: int = GOOD_BYTES_PER_S) -> None:
        self.bandwidth_bytes_per_s = bandwidth_bytes_per_s
        self.frozen = False
        self.swallows_ack = False
        self.transfers: list[Transfer] = []
        self._listeners: dict[int, FakeQemu] = {}
        self._ports = itertools.count(49152)

    def listen(self, qemu: FakeQemu) -> int:
        port = next(self._ports)
        self._listeners[port] = qemu
        return port

    def listener(self, port: int) -> FakeQemu | None:
        """Who answers there now."""
        qemu = self._listeners.get(port)
        return None if qemu is None or qemu.is_dead else qemu

    def close(self, port: int) -> None:
        self._listeners.pop(port, None)

    def cut(self) -> None:
        """Reset every connection."""
        for transfer in list(self.transfers):
            transfer.break_("Connection reset by peer")

    def freeze(self) -> None:
        self.frozen = True
        self._wake()

    def heal(self) -> None:
        self.frozen = False
        self._wake()

    def _wake(self) -> None:
        for transfer in list(self.transfers):
            transfer.wake()
