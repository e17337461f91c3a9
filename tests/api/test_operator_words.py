"""What operators have said of a migration, as clients and people see it."""

from migrd.api.models_words import OperatorWord
from migrd.cli import story
from migrd.cli.seen import Seen
from migrd.engine.ports import KnownThen, StoredResolution
from migrd.engine.service import ResolutionView

KNOWN = KnownThen("needs_operator", "grant_unanswered", "postmigrate", 4711, "host-b")
STORED = StoredResolution(
    "m1",
    "source",
    "destination_fenced",
    "off at the PDU",
    "token:ops",
    "host-a",
    1000.0,
    7.0,
    KNOWN,
)


def shown(view: ResolutionView) -> dict[str, object]:
    return OperatorWord.of(view).model_dump(mode="json")


def test_a_word_is_shown_with_who_when_why_and_what_could_be_seen() -> None:
    told = shown(ResolutionView(STORED, 1000.5, is_pending=False))
    assert told["by"] == "token:ops"
    assert told["evidence"] == "off at the PDU"
    assert told["outcome"] == "carried_out"
    assert str(told["carried_out_at"]).startswith("1970-01-01T00:16:40.5")
    known = told["known"]
    assert isinstance(known, dict)
    assert (known["peer"], known["peer_phase"], known["pid"]) == ("host-b", None, 4711)


def test_a_word_that_waits_and_one_that_came_too_late_are_told_apart() -> None:
    assert shown(ResolutionView(STORED, None, is_pending=True))["outcome"] == "pending"
    assert shown(ResolutionView(STORED, None, is_pending=False))["outcome"] == "overtaken"


def test_a_person_reads_it_as_one_sentence() -> None:
    line = story.word_line(Seen(shown(ResolutionView(STORED, 1000.5, is_pending=False))))
    assert "token:ops said destination_fenced at " in line
    assert "off at the PDU (VMM here: postmigrate; host-b: silent) - carried out at " in line
