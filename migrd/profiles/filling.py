"""Filling a profile's parameters: what a request gave against what the profile declares."""

import difflib
from collections.abc import Iterator, Mapping

from migrd.errors import Violation
from migrd.profiles.files import PARAMETER_NAME
from migrd.profiles.parameters import BadValue, Parameter, Value


def checked_values(
    profile: str, parameters: Mapping[str, Parameter], given: Mapping[str, Value]
) -> tuple[dict[str, Value], list[Violation]]:
    """Each parameter's value, given or by default, and everything that is wrong. Blocking."""
    violations: list[Violation] = []
    values: dict[str, Value] = {}
    for name in sorted(set(given) - set(parameters)):
        known = ", ".join(sorted(parameters)) or "none"
        text = f"profile {profile} has no parameter {name}; it has: {known}"
        violations.append(Violation(f"parameters.{name}", "unknown_parameter", text))
    for name, parameter in parameters.items():
        value = given.get(name, parameter.default)
        if value is None:
            text = f"is required by profile {profile}: {parameter.description}"
            violations.append(Violation(f"parameters.{name}", "missing_parameter", text))
            continue
        try:
            values[name] = parameter.check(value)
        except BadValue as bad:
            violations.append(Violation(f"parameters.{name}", bad.code, str(bad)))
    return values, violations


def name_problems(
    used: set[str], declared: Mapping[str, object], *, look_for_unused: bool
) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) where the names used in a profile and those declared do not agree."""
    for name in sorted(used - set(declared)):
        near = difflib.get_close_matches(name, declared, 1)
        hint = f"; did you mean {{{near[0]}}}?" if near else f"; add [parameters.{name}]"
        yield f"parameters.{name}", f"is missing, but {{{name}}} is used{hint}"
    for name in declared:
        if not PARAMETER_NAME.fullmatch(name):
            yield f"parameters.{name}", "is no name: small letters, digits and _ only"
        elif look_for_unused and name not in used:
            yield f"parameters.{name}", f"is used nowhere; write {{{name}}} or take it out"
