"""Following one migration to its end, whatever happens to the daemon in between.

    hints (server-sent events) --wake--> look (GET it, its rounds and decisions) --> screen

Level-triggered: what is shown comes from the resources alone, and an event only says that it is
time to look. So nothing is missed when events are lost, the daemon is restarted or the stream is
refused by a proxy; without the stream the look itself waits at the daemon (long poll).

The watch ends when the migration does, when it needs an operator (unless asked to watch on), when
the daemon stays away too long, or when the time given is over. None of that touches the migration.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from migrd.cli.client import Client, Problem, Reply, path
from migrd.cli.exits import CommandError, NoAnswer, Unreachable, WaitedTooLong
from migrd.cli.pages import items_after
from migrd.cli.seen import Seen
from migrd.cli.stream import Connected, Event, EventStream, Lost
from migrd.core.phases import Phase

AWAY_S: Final = 120.0
"""So long a daemon may stay away (an upgrade, a restart) before the watch gives up."""
LOOK_S: Final = 10.0
_CHANGES: Final = ("generation", "is_terminal", "last_decision")
"""Fields that change when there may be a new round or decision."""
_LEAST_PAUSE_S: Final = 0.1
_LONG_POLL_S: Final = 5.0
_LONGEST_PAUSE_S: Final = 2.0


@dataclass(frozen=True)
class Look:
    """The migration as it stands, and what is new since the last look."""

    migration: Seen
    new_rounds: Sequence[Seen] = ()
    new_decisions: Sequence[Seen] = ()


class Screen(Protocol):
    """Where a watch is shown."""

    refresh_s: float
    """How often it wants a look although nothing is known to have changed."""

    def show(self, look: Look) -> None: ...

    def lost(self, error: CommandError) -> None:
        """The daemon does not answer: what is shown is old."""

    def back(self) -> None:
        """It answers again."""


@dataclass
class Watch:
    """One watch over one migration."""

    client: Client
    migration_id: str
    screen: Screen
    through_needs_operator: bool = False
    give_up_after_s: float = AWAY_S
    rounds_seen: int = 0
    decisions_seen: int = 0
    _away: bool = False
    _broke_off: CommandError | None = None
    """What ended the stream, until the screen was told; only one task touches the screen."""
    _has_stream: bool = False
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _version: int | None = None
    _state: str = ""

    async def to_the_end(self, *, within_s: float | None = None) -> Seen:
        """The migration's last state.

        Raises WaitedTooLong after `within_s`, Problem, Unreachable.
        """
        ended: Seen | Exception
        async with asyncio.TaskGroup() as tasks:
            hints = tasks.create_task(self._listen())
            try:
                async with asyncio.timeout(within_s):
                    ended = await self._look_until_the_end()
            except TimeoutError:
                ended = WaitedTooLong(
                    f"the migration has not ended within {within_s:g} s; it goes on",
                    cure=f"watch on: migrd watch {self.migration_id}",
                )
            except Exception as error:  # raised outside, so that it comes out as itself
                ended = error
            finally:
                hints.cancel()
        if isinstance(ended, Exception):
            raise ended
        return ended

    async def _look_until_the_end(self) -> Seen:
        while True:
            look = await self._look_again_and_again()
            self.screen.show(look)
            if self._is_over(look.migration):
                return look.migration
            await self._something_new()

    def _is_over(self, migration: Seen) -> bool:
        if migration.flag("is_terminal"):
            return True
        waits = migration.raw("phase") == Phase.NEEDS_OPERATOR.value
        return waits and not self.through_needs_operator

    async def _something_new(self) -> None:
        """Until there is a hint or the screen wants a refresh; never in a tight loop."""
        await asyncio.sleep(_LEAST_PAUSE_S)
        if not self._has_stream:
            return  # the look waits at the daemon
        try:
            async with asyncio.timeout(self.screen.refresh_s):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    async def _look_again_and_again(self) -> Look:
        """A look, however often the daemon has to be asked for it."""
        loop, pause_s = asyncio.get_running_loop(), _LEAST_PAUSE_S
        since_s = loop.time()
        while True:
            if self._broke_off is not None:
                self._note_lost(self._broke_off)
                self._broke_off = None
            try:
                look = await self._look()
            except (Unreachable, Problem) as error:
                if isinstance(error, Problem) and not error.retryable:
                    raise
                self._note_lost(error)
                if loop.time() - since_s >= self.give_up_after_s:
                    raise _gave_up(self.migration_id, error) from error
            else:
                self._note_back()
                return look
            await asyncio.sleep(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, pause_s * 2)

    async def _look(self) -> Look:
        migration = (await self._migration()).seen
        self._version = migration.whole("resource_version")
        rounds: list[Seen] = []
        decisions: list[Seen] = []
        state = json.dumps([migration.body.get(key) for key in _CHANGES])
        if state != self._state:
            rounds = await self._new("rounds", self.rounds_seen)
            decisions = await self._new("decisions", self.decisions_seen)
            self._state = state
        self.rounds_seen += len(rounds)
        self.decisions_seen += len(decisions)
        return Look(migration, rounds, decisions)

    async def _migration(self) -> Reply:
        query: dict[str, str] = {}
        limit_s = LOOK_S
        if not self._has_stream and self._version is not None and not self._away:
            wait_s = min(_LONG_POLL_S, self.screen.refresh_s)
            query = {
                "watch": "true",
                "resource_version": str(self._version),
                "timeout_s": f"{wait_s:g}",
            }
            limit_s += wait_s
        where = path("migrations", self.migration_id)
        return await self.client.call("GET", where, query=query, deadline_s=limit_s)

    async def _new(self, kind: str, known: int) -> list[Seen]:
        """The rounds or decisions that were not there at the last look."""
        try:
            return await items_after(self.client, known, "migrations", self.migration_id, kind)
        except Problem as problem:
            if problem.status == 404:  # an older daemon, or it keeps none
                return []
            raise

    async def _listen(self) -> None:
        """Turn events into wake-ups; ends quietly where there is no stream."""
        try:
            async with EventStream(
                self.client,
                query={"migration_id": self.migration_id},
                give_up_after_s=self.give_up_after_s,
            ) as stream:
                while True:
                    self._hear(await stream.next())
        except CommandError:
            self._has_stream = False

    def _hear(self, heard: Event | Connected | Lost) -> None:
        match heard:
            case Connected():
                self._has_stream = True
            case Lost(error):
                self._has_stream = False
                self._broke_off = error
            case Event(kind=kind, body=body):
                about = body.raw("migration_id")
                if about is not None and about != self.migration_id:
                    return
                if about is None and kind != "events.lost":
                    return
        self._wake.set()

    def _note_lost(self, error: CommandError) -> None:
        if not self._away:
            self._away = True
            self.screen.lost(error)

    def _note_back(self) -> None:
        if self._away:
            self._away = False
            self.screen.back()


def _gave_up(migration_id: str, error: CommandError) -> NoAnswer:
    return NoAnswer(
        f"{error.message}; the migration goes on without being watched",
        cure=f"when the daemon is back: migrd watch {migration_id}",
        code=error.code,
    )
