"""Reading answers that are newer, older or hostile."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from migrd.cli import story
from migrd.cli.printing import Printer
from migrd.cli.screens import region
from migrd.cli.seen import Seen

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
FIELDS = [
    "id",
    "vm",
    "source",
    "destination",
    "phase",
    "role",
    "guest_runs_on",
    "timeline",
    "progress",
    "estimate",
    "policy",
    "cause",
    "refusals",
    "conditions",
    "created_at",
    "is_terminal",
    "elapsed_ms",
    "total_ms",
    "blackout_ms",
    "next_step",
    "last_decision",
    "requested_by",
    "queue_position",
]


def test_a_missing_or_wrong_field_reads_as_not_known() -> None:
    seen = Seen({"a": 1, "b": "text", "c": [1], "d": float("inf"), "e": True, "f": 10**400})
    assert seen.number("b") is None
    assert seen.number("d") is None
    assert seen.number("e") is None
    assert seen.number("f") is None
    assert seen.text("zz") == "-"
    assert seen.text("c") == "-"
    assert seen.flag("a") is None
    assert not seen.part("b")
    assert seen.parts("c") == []
    assert seen.moment("b") is None


def test_a_duration_is_read_in_milliseconds_or_seconds() -> None:
    assert Seen({"total_ms": 1500}).seconds("total") == 1.5
    assert Seen({"total_s": 1.5}).seconds("total") == 1.5


def test_a_moment_is_read_with_its_offset() -> None:
    assert Seen({"at": "1970-01-01T01:00:01+01:00"}).moment("at") == 1.0
    assert Seen({"at": "1970-01-01T00:00:01Z"}).moment("at") == 1.0


def test_text_comes_out_harmless_and_raw_text_as_it_is() -> None:
    seen = Seen({"vm": "\x1b[2J"})
    assert seen.text("vm") == "\\x1b[2J"
    assert seen.raw("vm") == "\x1b[2J"


@given(st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_whatever_a_daemon_sends_a_migration_can_be_shown(body: dict[str, Any]) -> None:
    migration, printer = Seen(body), Printer()
    with printer.out.capture() as shown, printer.err.capture():
        story.summarise(printer, migration)
        story.describe(printer, migration)
        printer.out.print(region(migration, [migration], "gone"))
    assert "\x1b[2J" not in shown.get()
