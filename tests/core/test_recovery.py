"""What recovery decides: a table that a person can read, and properties over the whole domain."""

from __future__ import annotations

import pytest

from migrd.core.handover import DestinationPhase
from migrd.core.migration import Mode
from migrd.core.phases import INSTRUCTION_OF, TERMINAL, Phase
from migrd.core.recovery import decide
from migrd.core.recovery_action import Action, Deed, DestinationStep, Proof
from migrd.core.recovery_facts import (
    Aim,
    AtRest,
    DestinationFound,
    DiedStarting,
    Fate,
    Granted,
    Guest,
    Known,
    NoWord,
    Own,
    Record,
    SaidByDestination,
    SaidBySource,
    SourceFound,
    Stray,
    Transfer,
)
from tests.core import recovery_domain as domain
from tests.core.recovery_domain import at_rest, destinations, sources, strays

D = DestinationPhase
OWN = {
    "dead": Own(Fate.DEAD),
    "booted": Own(Fate.EARLIER_BOOT),
    "lost": Own(Fate.NOT_FOUND),
    "silent": Own(Fate.SILENT),
    "never": Own(Fate.NEVER),
    "idle": Own(Fate.ANSWERS, Transfer.NONE, Guest.RUNS),
    "moving": Own(Fate.ANSWERS, Transfer.MOVING, Guest.RUNS),
    "failed": Own(Fate.ANSWERS, Transfer.BROKEN, Guest.RUNS),
    "waiting": Own(Fate.ANSWERS, Transfer.WAITING, Guest.STANDS),
    "over": Own(Fate.ANSWERS, Transfer.OVER, Guest.GAVE_AWAY),
    "by_postcopy": Own(Fate.ANSWERS, Transfer.POSTCOPY, Guest.STANDS),
    "receiving": Own(Fate.ANSWERS, Transfer.MOVING, Guest.AWAITED),
    "loaded": Own(Fate.ANSWERS, Transfer.OVER, Guest.STANDS),
    "runs": Own(Fate.ANSWERS, Transfer.OVER, Guest.RUNS),
    "gave_away": Own(Fate.ANSWERS, guest=Guest.GAVE_AWAY),
    "awaits": Own(Fate.ANSWERS, guest=Guest.AWAITED),
}
"""Short words of the tables."""
AIMS = {"away": Aim.AWAY, "back": Aim.BACK, "cancel": Aim.BACK_BY_CANCEL}
GRANTED = {
    "no": Granted.NO,
    "fenced": Granted.FENCED,
    "yes": Granted.YES,
    "died": Granted.YES_SOURCE_DIED,
}
NOT_SAID = {"silent": NoWord.SILENT, "knows_no": NoWord.KNOWS_NOTHING}
WORDS: dict[str, SaidByDestination] = {"died": DiedStarting.DIED_STARTING, **NOT_SAID}
RECORDS = {
    "-": Record.JOURNALS,
    "unreachable": Record.UNREACHABLE,
    "mine": Record.MINE,
    "mine_started": Record.MINE_STARTED,
    "theirs": Record.THEIRS,
    "theirs_started": Record.THEIRS_STARTED,
    "taken_back": Record.TAKEN_BACK,
    "none": Record.ABSENT,
}
DEEDS = {
    "go_on": Deed.GO_ON,
    "operator": Deed.CALL_OPERATOR,
    "show": Deed.SHOW,
    "REAP": Deed.REAP,
    "nothing": Deed.NOTHING_LEFT,
    "adopt": Deed.ADOPT,
    "alone": Deed.LEAVE_ALONE,
}
ENDS = {"-": None, "needs_op": Phase.NEEDS_OPERATOR, **{phase.value: phase for phase in Phase}}
PROOFS = {"refused": Proof.REFUSED, "source_ended": Proof.SOURCE_ENDED, "-": None}

SOURCE_TABLE = """
phase          mode     aim    granted own         there     arbiter        deed     expects
pending        precopy  away   no      idle        knows_no  -              go_on    -
preflight      precopy  away   no      idle        knows_no  -              go_on    -
preparing      precopy  away   no      idle        receiving -              go_on    -
preparing      precopy  away   no      dead        silent    -              go_on    guest_lost
precopy        precopy  away   no      idle        receiving -              go_on    -
precopy        precopy  away   no      moving      receiving -              go_on    -
precopy        precopy  away   no      moving      silent    -              go_on    -
precopy        precopy  away   no      moving      refused   -              go_on    rolled_back
precopy        precopy  away   no      failed      silent    -              go_on    rolled_back
precopy        precopy  away   no      failed      silent    unreachable    go_on    rolled_back
precopy        precopy  away   no      over        loaded    -              go_on    succeeded
precopy        precopy  away   no      dead        refused   -              go_on    guest_lost
precopy        precopy  away   no      dead        loaded    -              go_on    needs_op
precopy        precopy  away   no      dead        receiving -              go_on    -
precopy        precopy  away   no      booted      loaded    -              go_on    needs_op
precopy        precopy  away   no      lost        receiving -              go_on    needs_op
precopy        precopy  away   no      silent      receiving -              go_on    -
switchover     precopy  away   no      waiting     receiving -              go_on    -
switchover     precopy  away   no      over        loaded    -              go_on    succeeded
switchover     precopy  away   no      over        loaded    mine_started   go_on    succeeded
switchover     precopy  away   no      over        loaded    unreachable    go_on    -
switchover     precopy  away   no      over        silent    -              go_on    -
switchover     precopy  away   no      over        refused   -              go_on    rolled_back
switchover     precopy  away   no      idle        silent    -              go_on    rolled_back
switchover     postcopy away   no      by_postcopy loaded    -              go_on    succeeded
switchover     postcopy away   no      by_postcopy refused   -              go_on    guest_lost
switchover     precopy  away   no      dead        loaded    -              go_on    needs_op
granted        precopy  away   yes     over        loaded    -              go_on    succeeded
granted        precopy  away   yes     over        starting  -              go_on    succeeded
granted        precopy  away   yes     over        loaded    theirs         go_on    succeeded
granted        precopy  away   yes     over        loaded    unreachable    go_on    -
granted        precopy  away   yes     over        running   unreachable    go_on    succeeded
granted        precopy  away   yes     over        loaded    mine_started   go_on    succeeded
granted        precopy  away   yes     over        loaded    none           go_on    -
granted        precopy  away   yes     over        silent    theirs         go_on    -
granted        precopy  away   yes     over        silent    taken_back     go_on    rolled_back
granted        precopy  away   yes     over        refused   unreachable    go_on    rolled_back
granted        precopy  away   yes     dead        running   -              go_on    succeeded
granted        precopy  away   yes     over        silent    -              go_on    -
granted        precopy  away   yes     over        refused   -              go_on    rolled_back
granted        precopy  away   died    dead        refused   -              go_on    guest_lost
granted        precopy  away   yes     lost        refused   -              go_on    needs_op
granted        precopy  away   yes     over        died      -              go_on    needs_op
granted        postcopy away   yes     by_postcopy running   -              go_on    -
granted        postcopy away   yes     by_postcopy refused   -              go_on    guest_lost
needs_operator precopy  away   yes     over        silent    -              operator -
needs_operator precopy  away   yes     over        died      -              operator -
needs_operator precopy  away   yes     over        running   -              go_on    succeeded
needs_operator precopy  away   yes     over        loaded    theirs         go_on    -
needs_operator precopy  away   yes     over        starting  theirs_started go_on    succeeded
needs_operator precopy  away   yes     over        refused   -              go_on    rolled_back
needs_operator precopy  back   no      idle        silent    -              go_on    rolled_back
needs_operator precopy  back   no      lost        silent    -              operator -
needs_operator precopy  away   no      dead        loaded    -              operator -
needs_operator precopy  away   no      dead        refused   -              go_on    guest_lost
completing     precopy  away   yes     over        silent    -              go_on    succeeded
completing     postcopy away   yes     by_postcopy running   -              go_on    -
rolling_back   precopy  back   no      waiting     silent    -              go_on    rolled_back
rolling_back   precopy  cancel no      waiting     silent    -              go_on    cancelled
rolling_back   precopy  back   no      over        refused   theirs         go_on    rolled_back
rolling_back   precopy  back   no      over        silent    theirs         go_on    rolled_back
rolling_back   precopy  back   no      over        silent    unreachable    go_on    rolled_back
rolling_back   precopy  back   fenced  over        silent    unreachable    go_on    -
rolling_back   precopy  back   fenced  over        silent    theirs_started go_on    -
rolling_back   precopy  back   fenced  over        silent    taken_back     go_on    rolled_back
rolling_back   precopy  back   no      dead        knows_no  -              go_on    guest_lost
rolling_back   precopy  back   no      dead        loaded    -              go_on    needs_op
succeeded      precopy  away   yes     silent      running   -              show     -
"""
"""Columns 1-7 are found, 8-9 decided; the step is always that of the phase."""

DESTINATION_TABLE = """
phase     mode     own       source      arbiter        deed     step        expects proof
preparing precopy  never     preparing   -              go_on    prepare     -       -
preparing precopy  never     cancelled   -              REAP     prepare     refused source_ended
receiving precopy  receiving precopy     -              go_on    receive     -       -
receiving precopy  receiving silent      -              go_on    receive     -       -
receiving precopy  silent    silent      -              go_on    receive     -       -
receiving precopy  lost      silent      -              go_on    receive     -       -
receiving precopy  receiving knows_no    -              go_on    receive     refused -
receiving precopy  receiving rolled_back -              REAP     receive     refused source_ended
receiving precopy  loaded    guest_lost  -              REAP     receive     refused source_ended
receiving precopy  loaded    succeeded   -              operator receive     -       -
receiving precopy  dead      precopy     -              go_on    receive     refused -
receiving precopy  booted    silent      -              go_on    receive     refused -
loaded    precopy  loaded    granted     -              go_on    await_grant -       -
loaded    precopy  loaded    silent      -              go_on    await_grant -       -
loaded    precopy  loaded    knows_no    -              operator await_grant -       -
loaded    precopy  loaded    cancelled   -              REAP     await_grant refused source_ended
loaded    precopy  loaded    cancelled   mine           go_on    await_grant -       -
loaded    precopy  runs      silent      -              operator await_grant -       -
owned     precopy  loaded    silent      -              go_on    start_guest running -
owned     precopy  loaded    silent      mine           go_on    start_guest running -
owned     precopy  loaded    silent      unreachable    go_on    start_guest -       -
owned     precopy  dead      silent      mine_started   go_on    start_guest refused -
owned     precopy  dead      silent      -              go_on    start_guest -       -
owned     precopy  loaded    silent      theirs_started go_on    start_guest refused -
starting  precopy  loaded    silent      -              go_on    start_guest running -
starting  precopy  runs      granted     -              go_on    start_guest running -
starting  precopy  loaded    silent      mine_started   go_on    start_guest running -
starting  precopy  loaded    silent      unreachable    go_on    start_guest running -
starting  precopy  loaded    silent      theirs_started alone    -           -       -
starting  precopy  dead      granted     -              operator start_guest -       -
starting  precopy  booted    granted     -              operator start_guest -       -
starting  precopy  lost      granted     -              operator start_guest -       -
running   precopy  runs      granted     -              show     -           -       -
running   postcopy runs      completing  -              go_on    await_rest  -       -
running   postcopy lost      completing  -              operator await_rest  -       -
refused   precopy  loaded    silent      -              REAP     -           -       refused
refused   precopy  silent    silent      -              REAP     -           -       refused
refused   precopy  dead      silent      -              nothing  -           -       -
refused   precopy  never     silent      -              nothing  -           -       -
"""
"""Columns 1-5 are found, 6-9 decided."""

STRAY_TABLE = """
known                     managed own       released deed    alarm
not_at_all                -       silent    -        adopt   -
not_at_all                yes     idle      -        adopt   -
not_at_all                yes     awaits    -        adopt   yes
not_at_all                yes     gave_away -        adopt   yes
here_without_a_process    yes     idle      -        adopt   -
here_with_another_process yes     idle      yes      alone   yes
in_a_migration            yes     gave_away yes      alone   yes
departed                  yes     gave_away yes      REAP    -
departed                  yes     gave_away -        alone   yes
departed                  yes     idle      yes      alone   yes
departed                  yes     silent    yes      alone   yes
departed                  yes     awaits    yes      alone   yes
departed                  -       gave_away yes      alone   yes
departed                  -       silent    yes      adopt   yes
departed                  -       idle      -        adopt   yes
departed                  yes     dead      yes      nothing -
"""
"""Columns 1-4 are found, 5-6 decided."""

VM_ROWS = [
    (True, Fate.NEVER, Deed.SHOW),
    (True, Fate.SILENT, Deed.ADOPT),
    (True, Fate.ANSWERS, Deed.ADOPT),
    (True, Fate.DEAD, Deed.SHOW),
    (True, Fate.EARLIER_BOOT, Deed.SHOW),
    (True, Fate.NOT_FOUND, Deed.LEAVE_ALONE),
    (False, Fate.NEVER, Deed.SHOW),
]


def rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.strip().splitlines()[1:]]


@pytest.mark.parametrize("row", rows(SOURCE_TABLE), ids=" ".join)
def test_a_migration_away_goes_on_as_the_table_says(row: list[str]) -> None:
    phase, mode, aim, granted, own, there, arbiter, deed, expects = row
    said: SaidByDestination = WORDS[there] if there in WORDS else D(there)
    found = SourceFound(
        Phase(phase), Mode(mode), AIMS[aim], GRANTED[granted], OWN[own], said, RECORDS[arbiter]
    )
    action = decide(found)
    assert action.deed is DEEDS[deed]
    assert action.step is INSTRUCTION_OF.get(found.phase)
    assert action.expects is ENDS[expects]


@pytest.mark.parametrize("row", rows(DESTINATION_TABLE), ids=" ".join)
def test_a_migration_to_here_goes_on_as_the_table_says(row: list[str]) -> None:
    phase, mode, own, source, arbiter, deed, step, expects, proof = row
    said: SaidBySource = NOT_SAID[source] if source in NOT_SAID else Phase(source)
    found = DestinationFound(D(phase), Mode(mode), OWN[own], said, RECORDS[arbiter])
    action = decide(found)
    assert action.deed is DEEDS[deed]
    assert action.step == (None if step == "-" else DestinationStep(step))
    assert action.expects == (None if expects == "-" else D(expects))
    assert action.proof is PROOFS[proof]


@pytest.mark.parametrize("row", rows(STRAY_TABLE), ids=" ".join)
def test_a_process_in_no_journal_is_treated_as_the_table_says(row: list[str]) -> None:
    known, managed, own, released, deed, alarm = row
    action = decide(Stray(Known(known), managed == "yes", OWN[own], released == "yes"))
    assert (action.deed, action.alarm) == (DEEDS[deed], alarm == "yes")


@pytest.mark.parametrize(("here", "fate", "deed"), VM_ROWS)
def test_a_vm_at_rest_is_shown_as_the_table_says(here: bool, fate: Fate, deed: Deed) -> None:
    action = decide(AtRest(here, fate))
    assert (action.deed, action.alarm) == (deed, deed is Deed.LEAVE_ALONE)


# The whole domain --------------------------------------------------------------------------------


AT_REST = frozenset({Deed.SHOW, Deed.NOTHING_LEFT, Deed.ADOPT, Deed.LEAVE_ALONE})


BY_RECORD = frozenset({Record.JOURNALS, Record.MINE, Record.MINE_STARTED})


def well_formed(action: Action) -> bool:
    """What every action keeps, whoever it is about."""
    if action.deed is Deed.CALL_OPERATOR and not (action.settles and action.step):
        return False  # a person is told what would settle it, and it is asked on
    if (action.deed is Deed.REAP) is not (action.proof is not None):
        return False
    if action.expects is Phase.NEEDS_OPERATOR and not action.settles:
        return False
    if action.deed in AT_REST and (action.step or action.expects):
        return False
    return bool(action.why)


def is_ours(found: SourceFound) -> bool:
    """By this host's journal; by the arbiter's record too, where a person's word gave it back."""
    agrees = (Record.JOURNALS, Record.MINE_STARTED, Record.TAKEN_BACK)
    fenced = found.granted is Granted.FENCED and found.record in agrees
    return found.granted is Granted.NO or fenced


@pytest.mark.parametrize("phase", Phase)
def test_every_fact_about_a_migration_away_has_one_safe_action(phase: Phase) -> None:
    for found in sources(phase):
        action = decide(found)
        safe = well_formed(action) and action.deed is not Deed.REAP
        safe &= action.step is INSTRUCTION_OF.get(phase)
        safe &= (action.deed is Deed.SHOW) is (phase in TERMINAL)
        # a copy is ended only when the destination's run is journalled
        safe &= not action.ends_process or phase is Phase.COMPLETING
        # no run without ownership
        if action.may_run:
            safe &= is_ours(found) and not found.own.fate.is_dead
        if action.expects in (Phase.ROLLED_BACK, Phase.CANCELLED):
            proven = found.there is D.REFUSED or found.record is Record.TAKEN_BACK
            safe &= is_ours(found) or proven
        if action.expects is Phase.GUEST_LOST:  # only on proof that no whole copy is left
            proven = found.own.fate.is_dead or found.granted is Granted.YES_SOURCE_DIED
            safe &= proven or found.own.transfer is Transfer.POSTCOPY
        assert safe, (found, action)


@pytest.mark.parametrize("phase", D)
def test_every_fact_about_a_migration_to_here_has_one_safe_action(phase: D) -> None:
    stays = TERMINAL - {Phase.SUCCEEDED}
    for found in destinations(phase):
        action = decide(found)
        safe = well_formed(action)
        if action.deed is Deed.REAP:
            refused = action.proof is Proof.REFUSED and phase is D.REFUSED
            ended = action.proof is Proof.SOURCE_ENDED and found.source in stays
            never_granted = phase in (D.PREPARING, D.RECEIVING, D.LOADED)
            safe &= refused or (ended and never_granted)
            safe &= action.alarm or found.own.guest is not Guest.RUNS
        if action.may_run or action.expects is D.RUNNING:
            owns = phase is D.STARTING or found.record in BY_RECORD
            safe &= phase in (D.OWNED, D.STARTING) and owns and not found.own.fate.is_dead
            safe &= not found.record.is_theirs
        if action.expects is D.REFUSED:
            safe &= phase not in (D.STARTING, D.RUNNING, D.REFUSED)
        assert safe, (found, action)


def test_every_fact_about_a_process_in_no_journal_has_one_safe_action() -> None:
    for found in strays():
        action = decide(found)
        assert well_formed(action), (found, action)
        assert not action.may_run
        if action.deed is Deed.REAP:
            assert found.managed, found
            assert found.released, found
            assert found.own == Own(Fate.ANSWERS, found.own.transfer, Guest.GAVE_AWAY), found
            assert found.known is Known.DEPARTED
        if action.deed is Deed.NOTHING_LEFT:
            assert found.own.fate.is_dead, found
    assert all(well_formed(decide(found)) for found in at_rest())


@pytest.mark.parametrize("own", [OWN["silent"], OWN["lost"], OWN["never"]], ids=str)
def test_nothing_is_ended_because_nothing_is_known(own: Own) -> None:
    """The process does not say what it is, the other side is silent, the arbiter is away."""
    for phase in D:
        for mode in Mode:
            found = DestinationFound(phase, mode, own, NoWord.SILENT, Record.UNREACHABLE)
            assert decide(found).deed is not Deed.REAP or phase is D.REFUSED
    for known in Known:
        assert decide(Stray(known, True, own, released=True)).deed is not Deed.REAP


def test_the_domain_is_as_large_as_it_looks() -> None:
    """So that a fact which is added is enumerated with the others."""
    assert len(list(sources(Phase.PRECOPY))) == 2 * 3 * 4 * len(domain.OWN) * 11 * 8
    assert len(list(destinations(D.LOADED))) == 2 * len(domain.OWN) * 17 * 8
    assert len(domain.OWN) == len(Fate) - 1 + len(Transfer) * len(Guest)
