"""Each error has its status, on purpose."""

import inspect
from collections.abc import Iterator

import pytest

from migrd import errors
from migrd.api import problems
from migrd.api.problems import STATUS, Problem, headers_of, problem_of, status_of


def tree(root: type[BaseException]) -> Iterator[type[BaseException]]:
    yield root
    for leaf in root.__subclasses__():
        yield from tree(leaf)


OURS = [kind for kind in tree(errors.MigrdError) if kind.__module__.startswith("migrd.")]


def test_the_walk_finds_every_class_of_the_tree() -> None:
    defined = [
        kind
        for module in (errors, problems)
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, errors.MigrdError)
    ]
    assert set(defined) <= set(OURS)
    assert len(OURS) > 25


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_every_error_class_has_a_status_of_its_own(kind: type[BaseException]) -> None:
    if kind.__module__ in (errors.__name__, problems.__name__):
        assert kind in STATUS, f"{kind.__name__}: name its status in STATUS"
    assert 400 <= status_of(kind) < 600


def test_no_status_is_kept_for_a_class_that_is_gone() -> None:
    assert set(STATUS) <= set(OURS)


def test_a_class_written_tomorrow_inherits_the_status_of_its_base() -> None:
    class StillMoving(errors.Conflict):
        code = "still_moving"

    problem = problem_of(StillMoving("wait"), instance="/v1/vms/a", request_id="r")
    assert (problem.status, problem.code, problem.title) == (409, "still_moving", "Conflict")


def test_each_class_says_what_its_docstring_promises() -> None:
    assert status_of(errors.Invalid) == 422
    assert status_of(errors.NotFound) == 404
    assert status_of(errors.Conflict) == 409
    assert status_of(errors.TooLarge) == 413
    assert status_of(errors.NotAuthorized) == 403
    # "not known whether it took effect" is a gateway time-out, never a refusal
    assert status_of(errors.VmmTimedOut) == status_of(errors.PeerTimedOut) == 504
    assert status_of(ZeroDivisionError) == 500


def test_violations_of_the_engine_are_all_there() -> None:
    wrong = [errors.Violation("a", "x", "A"), errors.Violation("b.c", "y", "B")]
    problem = problem_of(errors.Invalid("two", wrong), instance="/", request_id="r")
    assert [(v.field, v.code, v.message) for v in problem.violations] == [
        ("a", "x", "A"),
        ("b.c", "y", "B"),
    ]
    assert Problem.model_validate_json(problem.model_dump_json()) == problem


def test_http_gets_the_headers_it_wants_with_an_error() -> None:
    not_allowed = problems.MethodNotAllowed("no", ["POST", "GET"])
    assert headers_of(not_allowed)["Allow"] == "GET, POST"
    assert headers_of(problems.NotAuthenticated("who?"))["WWW-Authenticate"].startswith("Bearer")
    assert "Retry-After" in headers_of(errors.Unavailable("later"))
    assert all(headers_of(error)["Cache-Control"] == "no-store" for error in (not_allowed,))


def test_the_docstring_of_the_module_draws_every_leaf_that_only_http_knows() -> None:
    assert problems.__doc__ is not None
    for _, kind in inspect.getmembers(problems, inspect.isclass):
        if issubclass(kind, errors.MigrdError):
            assert kind.__name__ in problems.__doc__, kind
