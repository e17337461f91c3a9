"""What operators have said of one migration, and what became of it.

The records are in the journal (`ports.StoredResolution`); that a word was carried out is read off
the migration's own events, so the two can never disagree, whenever the daemon ends.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from migrd.core.handover import DestinationEvent, DestinationPhase, DestinationTrigger
from migrd.core.migration import Cause, MigrationEvent
from migrd.core.phases import TRANSITIONS, Phase
from migrd.engine.ports import StoredResolution


@dataclass
class Word:
    """One of them."""

    stored: StoredResolution
    carried_out_wall_s: float | None = None
    overtaken: bool = False
    """It was not carried out, and will not be: something else has settled the migration first."""

    @property
    def cause(self) -> Cause:
        """As the migration's events tell it."""
        said = self.stored
        text = f"{said.by} says {said.resolution}: {said.evidence}"
        return Cause(f"operator_{said.resolution}", text)

    @property
    def is_pending(self) -> bool:
        return self.carried_out_wall_s is None and not self.overtaken


class OperatorWords:
    """Of one migration, in the order they were given."""

    def __init__(self) -> None:
        self.given: list[Word] = []
        self.lock = asyncio.Lock()
        """Held while one is judged and written down: one at a time."""

    def restore(self, stored: Sequence[StoredResolution]) -> None:
        """After a restart, before the events are shown to it."""
        self.given = [Word(one) for one in stored]

    def add(self, stored: StoredResolution) -> Word:
        """Only the newest can be waiting."""
        self.overtake()
        self.given.append(Word(stored))
        return self.given[-1]

    @property
    def last(self) -> Word | None:
        return self.given[-1] if self.given else None

    @property
    def pending(self) -> Word | None:
        """Written down, and not yet carried out."""
        last = self.last
        return last if last is not None and last.is_pending else None

    def overtake(self) -> None:
        """What waits will not be carried out."""
        if self.pending is not None:
            self.pending.overtaken = True

    def saw(self, event: MigrationEvent) -> None:
        """An event of the source's side took effect (also one that is replayed)."""
        if not event.by_operator:
            word = self.pending
            later = word is not None and event.wall_s >= word.stored.wall_s
            if later and event.trigger in TRANSITIONS[Phase.NEEDS_OPERATOR]:
                self.overtake()
            return
        for word in self.given:
            if word.carried_out_wall_s is None and word.cause == event.cause:
                word.carried_out_wall_s = event.wall_s
                return

    def saw_there(self, event: DestinationEvent) -> None:
        """An event of the destination's side took effect."""
        word = self.pending
        if word is None:
            return
        was_owned = word.stored.known.phase == DestinationPhase.OWNED
        start = DestinationTrigger.START_ORDERED if was_owned else DestinationTrigger.GRANT_RECEIVED
        started = event.trigger is start
        refused = event.trigger is DestinationTrigger.REFUSAL_DECIDED
        is_use = word.stored.resolution == "use_destination_copy"
        if (started and is_use) or (refused and event.reason == word.cause.message):
            word.carried_out_wall_s = event.wall_s
