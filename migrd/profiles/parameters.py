"""The typed parameters of a launch profile: what a value must be, and how it is written.

    [parameters.memory_mib]
    type = "integer"        min, max, unit, default
           "boolean"        default                                      written on / off
           "string"         choices or pattern (the whole value), max_length, default
           "path"           below, kind ("file" or "directory"), same_content, default

No type is converted into another: "256" is no integer, and 1 is no boolean. Whoever sends a value
means it, or is told.

Path values are checked against the file system (blocking: off the event loop).
"""

import os
import re
import stat
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

T = TypeVar("T", "IntegerParameter", "StringParameter")
Value: TypeAlias = str | int | bool
TEXT_LIMIT_CHARS = 4096


class BadValue(ValueError):
    """A value that its parameter does not allow; `code` for programs, the text for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Parameter(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    description: str = Field(min_length=1)


class IntegerParameter(_Parameter):
    type: Literal["integer"]
    min: int
    max: int
    unit: str = ""
    default: int | None = None

    @model_validator(mode="after")
    def _is_sound(self) -> "IntegerParameter":
        if self.min > self.max:
            raise ValueError(f"min = {self.min} is above max = {self.max}")
        return _with_sound_default(self)

    def check(self, value: object) -> int:
        """The value, if it is allowed. Raises BadValue."""
        if type(value) is not int:
            raise BadValue("wrong_type", f"{value!r} is no integer")
        if not self.min <= value <= self.max:
            unit = f" {self.unit}" if self.unit else ""
            raise BadValue("out_of_range", f"{value} is not in {self.min} to {self.max}{unit}")
        return value

    def render(self, value: Value) -> str:
        return str(value)


class BooleanParameter(_Parameter):
    type: Literal["boolean"]
    default: bool | None = None

    def check(self, value: object) -> bool:
        """The value, if it is allowed. Raises BadValue."""
        if type(value) is not bool:
            raise BadValue("wrong_type", f"{value!r} is neither true nor false")
        return value

    def render(self, value: Value) -> str:
        return "on" if value else "off"


class StringParameter(_Parameter):
    type: Literal["string"]
    choices: tuple[str, ...] | None = Field(default=None, min_length=1, strict=False)
    pattern: str | None = None
    """A regular expression (Python's) for the whole value."""
    max_length: int = Field(default=256, ge=1, le=TEXT_LIMIT_CHARS)
    default: str | None = None

    @model_validator(mode="after")
    def _is_sound(self) -> "StringParameter":
        if (self.choices is None) == (self.pattern is None):
            raise ValueError("needs either choices or a pattern: a free text is no parameter")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"pattern = {self.pattern!r} is none: {error}") from None
        return _with_sound_default(self)

    def check(self, value: object) -> str:
        """The value, if it is allowed. Raises BadValue."""
        text = _text(value, self.max_length)
        if self.choices is not None and text not in self.choices:
            raise BadValue("not_allowed", f"{text!r} is none of {', '.join(self.choices)}")
        if self.pattern is not None and not re.fullmatch(self.pattern, text):
            raise BadValue("not_allowed", f"{text!r} does not match {self.pattern}")
        return text

    def render(self, value: Value) -> str:
        return str(value)


class PathParameter(_Parameter):
    type: Literal["path"]
    below: str = Field(pattern=r"^/")
    """Absolute directory that the file must be in."""
    kind: Literal["file", "directory"] = "file"
    """A file may be a block device too."""
    same_content: bool = False
    """Both hosts must have the same bytes (firmware); implied for -bios, -kernel and the like."""
    default: str | None = None

    def check(self, value: object) -> str:
        """The resolved, absolute path, if it is allowed. Raises BadValue. Blocking."""
        text = _text(value, TEXT_LIMIT_CHARS)
        try:
            directory = Path(self.below).resolve(strict=True)
        except (OSError, RuntimeError):
            text = f"{self.below} is not there; create it, or mend `below` in the profile"
            raise BadValue("no_directory", text) from None
        try:
            resolved = Path(self.below, text).resolve(strict=False)
            if not resolved.is_relative_to(directory) or resolved == directory:
                raise BadValue("path_outside", f"{text!r} does not lie below {self.below}")
            mode = resolved.stat().st_mode
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
            reason = getattr(error, "strerror", None) or "it cannot be resolved"
            raise BadValue("no_file", f"{text!r} below {self.below}: {reason}") from None
        is_file = stat.S_ISREG(mode) or stat.S_ISBLK(mode)
        if not (is_file if self.kind == "file" else stat.S_ISDIR(mode)):
            raise BadValue("wrong_kind", f"{text!r} below {self.below} is no {self.kind}")
        return os.fspath(resolved)

    def render(self, value: Value) -> str:
        return str(value)


Parameter: TypeAlias = Annotated[
    IntegerParameter | BooleanParameter | StringParameter | PathParameter,
    Field(discriminator="type"),
]


def _with_sound_default(parameter: T) -> T:
    if parameter.default is not None:
        try:
            parameter.check(parameter.default)
        except BadValue as error:
            raise ValueError(f"the default does not keep the rules: {error}") from None
    return parameter


def _text(value: object, limit: int) -> str:
    if not isinstance(value, str):
        raise BadValue("wrong_type", f"{value!r} is no text")
    if len(value) > limit:
        raise BadValue("too_long", f"has {len(value)} characters; at most {limit} are allowed")
    if not value.isprintable():
        raise BadValue("not_allowed", f"{value!r} has a control character in it")
    return value
