"""A source of uevents that the test plays: what the kernel would send, when the test says so."""

import asyncio
from collections.abc import Callable

from migrd.kernel.uevents import Listener, Listening, Uevent


class FakeKernelMessages:
    """Pass `listen` to HostInventory."""

    def __init__(self, refuses: OSError | None = None) -> None:
        self._refuses = refuses
        self.listeners: list[Listener] = []

    def listen(self, listener: Listener) -> Listening:
        if self._refuses is not None:
            raise self._refuses
        self.listeners.append(listener)
        return _Open(self, listener)

    def send(self, action: str, address: str, subsystem: str = "pci") -> None:
        """About one device."""
        self.send_event(Uevent(action, f"/devices/pci0000:00/{address}", subsystem))

    def send_event(self, event: Uevent) -> None:
        for listener in self.listeners:
            listener.event(event)

    def overflow(self) -> None:
        for listener in self.listeners:
            listener.lost()

    def break_off(self, error: OSError) -> None:
        for listener in self.listeners:
            listener.broken(error)


class _Open:
    def __init__(self, source: FakeKernelMessages, listener: Listener) -> None:
        self._source, self._listener = source, listener

    def close(self) -> None:
        if self._listener in self._source.listeners:
            self._source.listeners.remove(self._listener)


async def until(condition: Callable[[], object]) -> None:
    """Wait for what threads and kernels do in their own time."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - the condition is anything
            await asyncio.sleep(0.002)
