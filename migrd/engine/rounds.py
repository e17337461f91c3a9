"""From QEMU's samples to rounds, and the keeping of rounds and decisions.

QEMU counts its dirty syncs; when the count has grown since the last sample, the samples on both
sides of the change bound the round. Rounds that came and went between two samples (a guest that
hardly writes) get a record each, with the interval and its bytes divided evenly among them: what
was measured over several is not known of each.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Final

from migrd.core.convergence import Decision
from migrd.core.facts import Round, TransferSample
from migrd.engine.outgoing import Outgoing

PAGE_BYTES: Final = 4096
BURST: Final = 64
"""At most so many rounds are written for one change of the count."""


class RoundCounter:
    """Turns samples into rounds; `number` is QEMU's dirty-sync-count at the end of the round."""

    def __init__(self, last_number: int) -> None:
        self._count = last_number
        self._mark: TransferSample | None = None

    def observe(self, sample: TransferSample) -> Sequence[Round]:
        """The rounds that ended between the last sample and this one."""
        count, sent = sample.qemu_dirty_sync_count, sample.transferred_bytes
        if count is None or sent is None or sample.remaining_bytes is None:
            return ()
        mark, self._mark = self._mark, self._mark or sample
        if mark is None:  # the first sample: rounds before it were not seen, unless none was
            self._count = max(self._count, count - 1 if count == 1 else count)
            if count != 1:
                return ()
        if count <= self._count:
            return ()
        ended = min(count - self._count, BURST)
        start = mark or sample
        rounds = [self._round(count - ended + i + 1, ended, start, sample) for i in range(ended)]
        rounds[-1] = replace(rounds[-1], sources=sample.sources)
        self._count, self._mark = count, sample
        return rounds

    def _round(self, number: int, ended: int, start: TransferSample, end: TransferSample) -> Round:
        duration_s = max(0.0, end.at_s - start.at_s) / ended
        sent = max(0, (end.transferred_bytes or 0) - (start.transferred_bytes or 0)) // ended
        return Round(
            number=number,
            at_s=end.at_s,
            duration_s=duration_s,
            transferred_bytes=sent,
            remaining_bytes=end.remaining_bytes or 0,
            dirty_pages_per_s=end.dirty_pages_per_s,
            page_size_bytes=end.page_size_bytes or PAGE_BYTES,
            bandwidth_bytes_per_s=sent / duration_s if duration_s > 0 else None,
            throttle_percent=end.throttle_percent or 0,
        )


def record_round(m: Outgoing, round_: Round) -> None:
    """Publish a round, and keep it soon."""
    m.rounds.append(round_)
    m.world.observer.round_recorded(m.stored.request.vm, round_)
    m.changed("migration.round", round=asdict(round_))
    m.keep("round", round_.number, asdict(round_))


def record_decision(m: Outgoing, decision: Decision) -> None:
    """Publish a decision with its inputs, and keep it soon."""
    m.decisions.append(decision)
    m.changed("migration.decision", decision=asdict(decision))
    m.keep("decision", decision.round_number, asdict(decision))
