"""No label value from outside adds series without a bound."""

from migrd.metrics.labels import OTHER, AtMost, OneOf


def test_a_closed_set_calls_everything_else_other() -> None:
    role = OneOf(("source", "destination"))
    assert [role("source"), role("x-injected"), role(None), role("")] == ["source", *[OTHER] * 3]


def test_an_open_set_keeps_its_first_codes_and_calls_later_ones_other() -> None:
    reason = AtMost(2)
    assert [reason(c) for c in ("a", "b", "c", "a", "b")] == ["a", "b", OTHER, "a", "b"]


def test_what_is_no_code_is_other_and_takes_no_place() -> None:
    reason = AtMost(1)
    for odd in ("No Code", "x" * 60, "", 'q"uote', "ümlaut", None):
        assert reason(odd) == OTHER
    assert reason("link_stalled") == "link_stalled"
