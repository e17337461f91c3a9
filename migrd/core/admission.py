"""May a client's wish about a migration still be met? Pure answers with a named reason.

The wish itself is carried out by the migration's owner task, which may have moved on meanwhile:
`queued` means "handed over", and the migration's final state says what became of it.
"""

from enum import StrEnum

from migrd.core.migration import MigrationState, Mode
from migrd.core.phases import PAST_NO_RETURN, Phase


class Admission(StrEnum):
    """What becomes of a client's wish."""

    QUEUED = "queued"
    ALREADY_SO = "already_so"
    DENIED = "denied"


def admit_cancel(state: MigrationState) -> tuple[Admission, str]:
    """May this migration still be cancelled? Pure; (answer, reason code)."""
    if state.phase is Phase.CANCELLED or (state.undoing and state.cancelled):
        return Admission.ALREADY_SO, "cancelled"
    if state.phase in PAST_NO_RETURN or state.granted:
        return Admission.DENIED, "past_point_of_no_return"
    if state.is_terminal:
        return Admission.DENIED, "already_ended"
    if state.phase is Phase.ROLLING_BACK or state.undoing:
        return Admission.ALREADY_SO, "rolling_back"
    if state.phase is Phase.NEEDS_OPERATOR:
        return Admission.DENIED, "needs_operator"
    if state.mode is Mode.POSTCOPY:
        return Admission.DENIED, "postcopy_started"
    return Admission.QUEUED, "cancelling"


def admit_switchover(state: MigrationState) -> tuple[Admission, str]:
    """May a client force the switchover now?"""
    if state.is_terminal:
        return Admission.DENIED, "already_ended"
    if state.switchover_forced or state.phase in (
        Phase.SWITCHOVER,
        Phase.GRANTED,
        Phase.COMPLETING,
    ):
        return Admission.ALREADY_SO, "switching_over"
    if state.phase is not Phase.PRECOPY:
        return Admission.DENIED, "not_in_precopy"
    return Admission.QUEUED, "switching_over"


def admit_policy(state: MigrationState) -> tuple[Admission, str]:
    """May the policy still be changed?"""
    if state.phase in (Phase.PENDING, Phase.PREFLIGHT, Phase.PREPARING, Phase.PRECOPY):
        return Admission.QUEUED, "policy_changed"
    return Admission.DENIED, "already_ended" if state.is_terminal else "past_precopy"
