"""The destination's part of a handover whose hosts have an arbiter (engine.arbiter_port).

    loaded    the record names this host (read when GRANT comes, and by itself when nothing is
              heard: the source may be gone)                                      => owned
    owned     write `started`; it is the destination's for good once that has been seen => starting
              the record is the source's again, or of a newer epoch: refuse, durably     => refused
              there is none (somebody removed it): the source settles it, or a person

Whether the guest may start is in the record alone; GRANT only hastens things. While the arbiter
does not answer the copy is kept: it may be the last one, and the source asks for a refusal if its
own is whole. Without an arbiter, and for a guest that came by postcopy (it cannot go back), GRANT
is enough.
"""

import asyncio
import contextlib
from typing import Final

from migrd.core.migration import Mode
from migrd.engine.arbiter_port import Ownership
from migrd.engine.incoming_record import IncomingRecord
from migrd.engine.ownership import Standing, as_target, present
from migrd.errors import ArbiterConflict, ArbiterUnavailable
from migrd.failpoints import around

FIRST_LOOK_S: Final = 0.25
LONGEST_LOOK_S: Final = 2.0
SETTLED_S: Final = 1.0
"""A record that is not ours when we own the guest is looked at for so long before it counts: in a
migration that ends just as postcopy begins, GRANT may be here first."""
LOOK_AGAIN_S: Final = 0.1


class RecordGone(ArbiterUnavailable):
    """Somebody has removed the record, as is done with a VM that is deleted."""


def _gone(record: Ownership | None) -> str:
    if record is None:
        return "the arbiter has no record of this grant any more"
    return (
        f"the arbiter's record of {record.vm} was made anew since this grant, for {record.owner} "
        f"(epoch {record.epoch}): ask migrd there"
    )


class RecordKeeping:
    """What one incoming migration does with its record."""

    def __init__(self, i: IncomingRecord) -> None:
        self._i = i
        self.is_proven = False
        """A person has said, with proof, that the source never runs the guest again."""
        self._not_ours_since_s: float | None = None

    @property
    def decides(self) -> bool:
        """The record, not GRANT, says whether the guest starts."""
        return self._i.stored.settings.arbitrated and self._i.state.mode is Mode.PRECOPY

    async def until_given(self) -> bool:
        """Until the record names this host; whether the guest is to run then."""
        pause_s = FIRST_LOOK_S
        while True:
            run_guest = await self._given()
            if run_guest is not None:
                return run_guest
            await asyncio.sleep(pause_s)
            pause_s = LOOK_AGAIN_S if self.is_proven else min(2 * pause_s, LONGEST_LOOK_S)

    async def _given(self) -> bool | None:
        i = self._i
        here, epoch = i.world.options.host, i.state.epoch
        try:
            record = await present(i.world).read(i.stored.spec.name)
            standing = as_target(record, here, epoch)
            if record is None and self.is_proven:
                record = await present(i.world).claim(i.stored.spec.name, here, epoch, i.id)
            elif record is not None and standing is Standing.OURS and self.is_proven:
                record = await present(i.world).assign(
                    record, here, epoch=epoch, started=False, migration_id=i.id
                )
            elif record is not None and standing is Standing.LOST and self.is_proven:
                i.say_why_not(
                    f"the arbiter's record of {record.vm} says {record.owner} (epoch "
                    f"{record.epoch}), which is not of this migration: ask migrd on {record.owner} "
                    f"for {record.vm}; the copy is kept, and is given up by the word guest_lost"
                )
        except ArbiterConflict:
            return None
        except ArbiterUnavailable as exc:
            i.note_arbiter(exc.message)
            return None
        i.note_arbiter(None)
        is_given = as_target(record, here, epoch) in (Standing.GIVEN, Standing.STARTED)
        return record.run_guest if record is not None and is_given else None

    async def mark_started(self) -> str | None:
        """Say that this host starts the guest. None: it is said, and cannot be taken back; else
        why the guest is not to start here. Raises ArbiterUnavailable: not known, RecordGone among
        them: it was removed, and says nothing any more."""
        i = self._i
        here, epoch = i.world.options.host, i.state.epoch
        while True:
            record = await present(i.world).read(i.stored.spec.name)
            standing = as_target(record, here, epoch)
            if record is not None and standing is Standing.GIVEN:
                try:
                    with around("destination.mark_started"):
                        record = await present(i.world).assign(
                            *(record, here),
                            epoch=epoch,
                            started=True,
                            run_guest=record.run_guest,
                            migration_id=i.id,
                        )
                except ArbiterConflict:
                    continue  # looked at again
                standing = as_target(record, here, epoch)
            if standing is Standing.STARTED:
                i.note_arbiter(None)
                return None
            if record is None and self.is_proven:
                with contextlib.suppress(ArbiterConflict):
                    await present(i.world).claim(i.stored.spec.name, here, epoch, i.id)
                continue
            if record is None or record.epoch < epoch:
                raise RecordGone(_gone(record))
            if self._is_settled():
                whom = f"{record.owner} (epoch {record.epoch})"
                return f"the arbiter's record says {whom}: taken back by {i.stored.source}"
            await asyncio.sleep(LOOK_AGAIN_S)

    def _is_settled(self) -> bool:
        now_s = self._i.world.clock.monotonic_s()
        if self._not_ours_since_s is None:
            self._not_ours_since_s = now_s
        return now_s - self._not_ours_since_s >= SETTLED_S

    async def is_the_sources(self) -> bool | None:
        """A guest of which nobody knew whether it ran here is the source's again: a fence was
        written. None: there is no record (the VM was deleted). Raises ArbiterUnavailable."""
        record = await present(self._i.world).read(self._i.stored.spec.name)
        return None if record is None else record.owner != self._i.world.options.host
