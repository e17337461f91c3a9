"""Wire models of what operators have said of a migration."""

from enum import StrEnum
from typing import Self

from migrd.api.wire import At, WireModel, at
from migrd.engine import service
from migrd.engine.service import Resolution


class ResolutionOutcome(StrEnum):
    """What became of an operator's word."""

    CARRIED_OUT = "carried_out"
    PENDING = "pending"
    """Written down; it is being carried out."""
    OVERTAKEN = "overtaken"
    """Something else has settled the migration first."""


class KnownThen(WireModel):
    """What could be seen of both sides when an operator gave a word."""

    phase: str
    """Of this host's side."""
    cause: str | None
    """Code of what had called for a person."""
    run_state: str | None
    """Of the VMM on this host; `dead` on proof, null: it did not say."""
    pid: int | None
    peer: str
    """The other host."""
    peer_phase: str | None
    """What migrd there said of its side; null: it did not answer."""
    peer_vmm_died: bool | None
    peer_guest_running: bool | None
    peer_problem: str | None


class OperatorWord(WireModel):
    """One word of an operator: it was written down before it was carried out."""

    resolution: Resolution
    evidence: str
    by: str
    """Who said it: the uid, or the token's name."""
    host: str
    """The host that it was said to."""
    said_at: At
    known: KnownThen
    outcome: ResolutionOutcome
    carried_out_at: At | None

    @classmethod
    def of(cls, word: service.ResolutionView) -> Self:
        stored, done = word.stored, word.carried_out_wall_s
        outcome = ResolutionOutcome.PENDING if word.is_pending else ResolutionOutcome.OVERTAKEN
        return cls(
            resolution=Resolution(stored.resolution),
            evidence=stored.evidence,
            by=stored.by,
            host=stored.host,
            said_at=at(stored.wall_s),
            known=KnownThen(**vars(stored.known)),
            outcome=outcome if done is None else ResolutionOutcome.CARRIED_OUT,
            carried_out_at=None if done is None else at(done),
        )
