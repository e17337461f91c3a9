"""Rounds and decisions as the journal keeps them, read back."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from migrd.core.convergence import Decision, Estimate, Verdict
from migrd.core.facts import Round
from migrd.core.harvest_round import ReadOutcome, SourceRead, Tracker


def as_round(row: Mapping[str, Any]) -> Round:
    """A round as it was kept; what an older or newer migrd kept besides is left out."""
    known = {field.name for field in fields(Round)}
    kept = {name: value for name, value in row.items() if name in known}
    return Round(**{**kept, "sources": tuple(map(_as_read, row.get("sources") or ()))})


def _as_read(row: Mapping[str, Any]) -> SourceRead:
    known = {field.name for field in fields(SourceRead)}
    kept = {name: value for name, value in row.items() if name in known}
    return SourceRead(
        **{**kept, "tracker": Tracker(row["tracker"]), "outcome": ReadOutcome(row["outcome"])}
    )


def as_decision(row: Mapping[str, Any]) -> Decision:
    """A decision as it was kept."""
    guess = row.get("estimate") or {}
    return Decision(
        verdict=Verdict(row["verdict"]),
        reason=row["reason"],
        message=row["message"],
        round_number=row["round_number"],
        at_s=row["at_s"],
        estimate=Estimate(**guess),
        throttle_percent=row.get("throttle_percent"),
    )
