"""A profile as its model: what pydantic finds wrong with it, in words for the administrator."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from migrd.profiles.files import ProfileFile, refused, shown
from migrd.profiles.parameters import (
    BooleanParameter,
    IntegerParameter,
    PathParameter,
    StringParameter,
)

M = TypeVar("M", bound=BaseModel)

_MODELS: Final[Mapping[str, type[BaseModel]]] = {
    "integer": IntegerParameter,
    "boolean": BooleanParameter,
    "string": StringParameter,
    "path": PathParameter,
}


def validated(
    file: ProfileFile,
    model: type[M],
    unfit: Callable[[Mapping[str, object]], Iterable[tuple[str, str]]],
    cures: Mapping[str, str],
    sections: Mapping[str, type[BaseModel]] = MappingProxyType({}),
) -> M:
    """The file's profile. `unfit` tells of what cannot be seen in one key alone: (key, what).
    `cures`: key -> what is said where its pattern does not fit; `sections`: the models of sections
    other than [parameters]. Raises ConfigError with every problem, one per line."""
    problems = list(file.problems)
    try:
        profile = model.model_validate(file.table)
    except ValidationError as failure:
        errors = failure.errors(include_url=False)
        problems += [
            f"{file.path}: {line}"
            for error in errors
            for line in _lines(error, model, cures, sections)
        ]
        if all(error["type"] != "profile" for error in errors):  # else they are among the lines
            problems += [f"{file.path}: {key} {what}" for key, what in unfit(file.table)]
        raise refused(problems) from failure
    if problems:
        raise refused(problems)
    return profile


def _lines(
    error: ErrorDetails,
    model: type[BaseModel],
    cures: Mapping[str, str],
    sections: Mapping[str, type[BaseModel]],
) -> Iterator[str]:
    """Pydantic's own words where they are plain enough."""
    if error["type"] == "profile":
        for key, problem in error["ctx"]["problems"]:
            yield f"{key} {problem}"
        return
    loc = error["loc"]
    in_parameter = len(loc) > 2 and loc[0] == "parameters" and loc[2] in _MODELS
    if in_parameter:
        model = _MODELS[str(loc[2])]
        loc = (*loc[:2], *loc[3:])  # without the tag of the union
    elif len(loc) > 1:
        model = sections.get(str(loc[0]), model)
    key = _dotted(loc)
    match error["type"]:
        case "extra_forbidden":
            known = list(model.model_fields)
            near = difflib.get_close_matches(str(loc[-1]), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
            yield f"{key} is no key of a launch profile; {hint}"
        case "missing":
            yield f"{key} is missing"
        case "union_tag_invalid" | "union_tag_not_found":
            yield f'{key}.type should be "integer", "boolean", "string" or "path"'
        case _:
            yield f"{key} = {shown(error['input'])} {_cure(error, cures.get(str(loc[0])))}"


def _cure(error: ErrorDetails, known: str | None) -> str:
    if error["type"] == "string_pattern_mismatch":
        return known or "has characters in it that do not belong there"
    text: Any = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{text[:1].lower()}{text[1:]}"


def _dotted(loc: tuple[int | str, ...]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
