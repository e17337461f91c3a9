"""Rounds and decisions as the journal keeps them, read back."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from migrd.core.convergence import Decision, Estimate, Verdict
from migrd.core.facts import Round


def as_round(row: Mapping[str, Any]) -> Round:
    """A round as it was kept; what an older or newer migrd kept besides is left out."""
    known = {field.name for field in fields(Round)}
    return Round(**{name: value for name, value in row.items() if name in known})


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
