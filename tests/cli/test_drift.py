"""The command line reads no field that the API does not send, and offers no word it does not take.

Answers are read leniently (`seen`), so a renamed field would not fail: it would read as not known.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import migrd.cli
from migrd.api import models, problems
from migrd.cli.commands.migrations import RESOLUTIONS
from migrd.cli.story import MEANING_OF_PHASE
from migrd.core.handover import DestinationPhase
from migrd.core.phases import Phase
from migrd.engine.service import Resolution

READS = {"raw", "text", "number", "whole", "flag", "part", "parts", "words", "pairs", "moment"}
CHANGE = {"before", "after", "appeared", "disappeared"}
NOT_OURS = {"cure", "refusals", "round", "decision"} | CHANGE
"""Of problems that are not migrd's own, and of the bodies of events, which are open by design."""


def fields_read() -> Iterator[tuple[str, str]]:
    """(where, field) of each literal name that is read from an answer."""
    for path in Path(migrd.cli.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                if node.func.attr in READS:
                    yield f"{path.name}:{node.lineno}", name.value
                elif node.func.attr == "seconds":
                    yield f"{path.name}:{node.lineno}", f"{name.value}_ms"


def fields_sent() -> set[str]:
    """Every field of every model of the API."""
    wire = [problems.Violation, *(getattr(models, name) for name in models.__all__)]
    kinds = [k for k in wire if isinstance(k, type) and issubclass(k, models.WireModel)]
    names = {name for kind in kinds for name in kind.model_fields}
    return names | {f"{n.removesuffix('_s')}_ms" for n in names if n.endswith("_s")}


def test_every_field_that_is_read_is_one_that_the_api_sends() -> None:
    read = list(fields_read())
    assert len(read) > 80, "the search finds what it looks for"
    sent = fields_sent() | NOT_OURS
    assert [(where, name) for where, name in read if name not in sent] == []


def test_a_field_that_is_not_sent_would_be_found() -> None:
    assert "no_such_field" not in fields_sent() | NOT_OURS


def test_the_resolutions_on_offer_are_those_of_the_daemon() -> None:
    assert set(RESOLUTIONS) == {resolution.value for resolution in Resolution}


def test_every_phase_that_is_explained_exists() -> None:
    assert set(MEANING_OF_PHASE) <= {p.value for p in Phase} | {p.value for p in DestinationPhase}
