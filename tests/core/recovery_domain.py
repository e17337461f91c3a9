"""Every combination of facts that recovery may meet, possible or not."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from migrd.core.handover import DestinationPhase
from migrd.core.migration import Mode
from migrd.core.phases import Phase
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
    SourceFound,
    Stray,
    Transfer,
)

OWN = tuple(
    [Own(fate) for fate in Fate if fate is not Fate.ANSWERS]
    + [Own(Fate.ANSWERS, transfer, guest) for transfer, guest in product(Transfer, Guest)]
)
BY_DESTINATION = (*DestinationPhase, *DiedStarting, *NoWord)
BY_SOURCE = (*Phase, *NoWord)


def sources(phase: Phase) -> Iterator[SourceFound]:
    for mode, aim, granted, own, there, record in product(
        Mode, Aim, Granted, OWN, BY_DESTINATION, Record
    ):
        yield SourceFound(phase, mode, aim, granted, own, there, record)


def destinations(phase: DestinationPhase) -> Iterator[DestinationFound]:
    for mode, own, source, record in product(Mode, OWN, BY_SOURCE, Record):
        yield DestinationFound(phase, mode, own, source, record)


def at_rest() -> Iterator[AtRest]:
    for here, fate in product((True, False), Fate):
        yield AtRest(here, fate)


def strays() -> Iterator[Stray]:
    for known, managed, own, released in product(Known, (True, False), OWN, (True, False)):
        yield Stray(known, managed, own, released)
