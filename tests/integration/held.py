"""A migrd that waits where a test wants it: just before or just after a journal record is durable.

    python held.py <directory> serve --config …

    <directory>/before-<trigger>   exists: wait there before the record is written
    <directory>/after-<trigger>    exists: wait there once it is durable, before anything follows
    <the same>.reached             made by the daemon when it has come to that point
    <directory>/protocol           the version of the peer protocol to speak, if not ours
    <directory>/failpoints         what SIGUSR2 arms instead of what was armed (migrd.failpoints)

Triggers are those of `core.phases` (source) and `core.handover` (destination). While it waits,
everything else in the daemon goes on. Run by path: it needs nothing but migrd on the path.
"""

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

Append = Callable[..., Awaitable[None]]


def holding(append: Append, directory: Path) -> Append:
    """The same method, with a stop before and after each record."""

    async def append_and_wait(
        self: object, migration_id: str, events: Sequence[Any], *rest: Any
    ) -> None:
        points = [str(event.trigger) for event in events]
        await wait(directory, "before", points)
        await append(self, migration_id, events, *rest)
        await wait(directory, "after", points)

    return append_and_wait


async def wait(directory: Path, when: str, points: Sequence[str]) -> None:
    """Until the marks of all points are gone."""
    for point in points:
        mark = directory / f"{when}-{point}"
        while mark.exists():
            mark.with_suffix(".reached").touch()
            await asyncio.sleep(0.01)


def arm_on_signal(directory: Path) -> None:
    """A daemon that runs cannot be given another environment."""
    from migrd import failpoints

    asked = directory / "failpoints"

    def arm(*_: object) -> None:
        vars(failpoints)["_armed"].clear()
        failpoints.arm(asked.read_text())
        asked.unlink()

    signal.signal(signal.SIGUSR2, arm)


def main() -> None:
    directory = Path(sys.argv.pop(1))
    protocol = directory / "protocol"
    if protocol.exists():
        from migrd.engine import peer_service

        # before others take it over
        vars(peer_service)["PEER_PROTOCOL"] = int(protocol.read_text())

    from migrd.__main__ import main as migrd
    from migrd.journal.sqlite import SqliteJournal

    arm_on_signal(directory)
    for name in ("append_outgoing", "append_incoming"):
        setattr(SqliteJournal, name, holding(getattr(SqliteJournal, name), directory))
    migrd()


if __name__ == "__main__":
    main()
