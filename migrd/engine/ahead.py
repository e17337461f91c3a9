"""What precopy has begun for the switchover, so that a guest that stands still waits for less.

    precopy     ... long poll of the destination ───────────────┐
                pre-switchover seen: migrate-continue ───────┐  │
    (the step unwinds, SWITCHOVER_REACHED is applied)        │  │
    switchover  ... waits for the answer to that ◄───────────┘  │
                waits for that very poll ◄──────────────────────┘

A long poll that is cancelled takes its connection with it, and the next one would begin with a TLS
handshake, on both hosts, in the middle of the blackout.

What is begun is taken up at most once. What nobody takes up is dropped by the migration's owner, as
soon as its phase is another one: cancelled, waited for, its outcome looked at and forgotten.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any

from migrd.engine.ports import DestinationView


class Ahead:
    """Of one migration."""

    def __init__(self) -> None:
        self._view: asyncio.Task[DestinationView] | None = None
        self._switchover: asyncio.Task[None] | None = None

    def keep_view(self, asking: asyncio.Task[DestinationView]) -> None:
        """A view that is being waited for, and goes on when its asker leaves."""
        if self._view is not None:
            self._view.cancel()
        self._view = asking

    def take_view(self) -> asyncio.Task[DestinationView] | None:
        """The caller's from here on."""
        taken, self._view = self._view, None
        return taken

    def begin_switchover(self, doing: Coroutine[Any, Any, None]) -> None:
        """Let it run while the step that saw the reason for it unwinds."""
        self._switchover = asyncio.create_task(doing, name="migrate-continue")

    def take_switchover(self) -> asyncio.Task[None] | None:
        """The caller's from here on."""
        taken, self._switchover = self._switchover, None
        return taken

    async def drop(self) -> None:
        """End what nobody has taken up."""
        left = [task for task in (self.take_view(), self.take_switchover()) if task is not None]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
