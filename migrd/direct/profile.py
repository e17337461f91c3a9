"""Launch profiles of the direct engine: a command with typed parameters, and what it may have.

    engine = "direct"
    kind = "counter-1"                      what the guest's state is, with its version
    command = ["/usr/lib/counter", "--memory-mib", "{memory_mib}"]
    memory_mib = "{memory_mib}"             the most memory a guest of it may have
    user = "counter"                        whom it runs as; left out: as migrd does
    output = true                           what it prints is kept in output.log of the instance

Rules
1. A request names a profile and fills typed parameters; it never writes an argument. A value fills
   its place in one argument of the command and reaches no shell. One that would begin an argument
   may not begin with "-": nobody adds an option by a value.
2. `kind` stands for what QEMU's machine type is: who changes what a process saves as its state
   changes the kind, and a guest moves only between hosts whose profiles name the same.
3. The digest covers what the guest can tell: kind, memory and arguments, but not where files lie.
   Values of path parameters are left out of it, unless both hosts must have the same content.
4. The limit of memory holds for what a process hands over and, on a destination, for what a
   source wants to be rebuilt, which is checked before a page of it is made.

The profile says nothing of passthrough devices: the process brings its own (`DEVICE` of the
hand-over), and a request for others is refused.
"""

import grp
import hashlib
import json
import os
import pwd
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from migrd.core.facts import SpecDevice
from migrd.errors import Invalid, Violation
from migrd.processes.spawn import RunAs
from migrd.profiles.content import content_digest
from migrd.profiles.files import shown
from migrd.profiles.filling import checked_values, name_problems
from migrd.profiles.parameters import IntegerParameter, Parameter, PathParameter, Value

MIB: Final = 1 << 20
RESERVED: Final = "MIGRD_"
"""Variables of the environment that begin so are the hand-over's."""
_PIECE: Final = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_VERSION: Final = 1

Pieces = tuple[tuple[str, bool], ...]
"""(text, is the name of a parameter) each, of one argument."""


class DirectProfile(BaseModel):
    """One file of `profiles_dir` with `engine = "direct"`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    description: str = Field(min_length=1)
    kind: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    command: tuple[Annotated[str, Field(pattern=r"^[^\x00]*$")], ...] = Field(
        min_length=1, strict=False
    )
    memory_mib: int | str
    """A number, or `{parameter}` of an integer parameter."""
    user: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,31}$")
    output: bool = False
    parameters: Mapping[str, Parameter] = Field(default_factory=dict)
    environment: Mapping[
        Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")],
        Annotated[str, Field(pattern=r"^[^\x00]*$")],
    ] = Field(default_factory=dict)

    @field_validator("memory_mib")
    @classmethod
    def _is_memory(cls, memory: int | str) -> int | str:
        if isinstance(memory, int) and memory < 1:
            raise ValueError("is no size of memory in MiB")
        if isinstance(memory, str) and not re.fullmatch(r"\{[^{}]+\}", memory):
            raise ValueError('is neither a number nor one "{parameter}"')
        return memory

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = list(template_problems(dict(self)))
        if problems:
            raise PydanticCustomError("profile", "parts do not fit", {"problems": problems})
        return self

    @cached_property
    def template(self) -> tuple[Pieces, ...]:
        """`command`, parsed."""
        return tuple(_parse(argument) for argument in self.command)

    def resolve(self, given: Mapping[str, Value], devices: tuple[SpecDevice, ...]) -> "Resolved":
        """Fill the profile. Raises Invalid with everything that is wrong. Blocking."""
        values, violations = checked_values(self.name, self.parameters, given)
        violations += _unfit(self, values)
        if devices:
            text = (
                f"profile {self.name} is of the direct engine: its process brings its passthrough "
                "devices itself; define the VM without devices"
            )
            violations.append(Violation("devices", "devices_not_taken", text))
        try:
            run_as = _run_as(self.user)
        except LookupError as error:
            violations.append(Violation("profile", "user_unusable", str(error)))
            run_as = None
        if violations:
            told = "; ".join(f"{v.field}: {v.message}" for v in violations)
            raise Invalid(f"profile {self.name} cannot be used so: {told}", violations)
        return Resolved(self, values, run_as)


@dataclass(frozen=True)
class Resolved:
    """A profile with checked values."""

    profile: DirectProfile
    values: Mapping[str, Value]
    run_as: RunAs | None

    def argv(self) -> tuple[str, ...]:
        """The command; no shell is to read it."""
        return tuple(self._fill(pieces, self._rendered) for pieces in self.profile.template)

    @property
    def memory_bytes(self) -> int:
        memory = self.profile.memory_mib
        return (memory if isinstance(memory, int) else int(self.values[memory[1:-1]])) * MIB

    def digest(self) -> str:
        """sha256 of what the guest can tell; equal on both hosts, or it cannot move there.

        Blocking: reads files of which both hosts must have the same. Raises Invalid.
        """
        seen = [_without_paths(self._fill(p, self._visible)) for p in self.profile.template[1:]]
        machine = {
            "version": _VERSION,
            "engine": "direct",
            "kind": self.profile.kind,
            "memory_bytes": self.memory_bytes,
            "arguments": seen,
        }
        return hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()

    def _fill(self, pieces: Pieces, render: Any) -> str:
        return "".join(render(text) if is_name else text for text, is_name in pieces)

    def _rendered(self, name: str) -> str:
        return self.profile.parameters[name].render(self.values[name])

    def _visible(self, name: str) -> str:
        parameter = self.profile.parameters[name]
        if not isinstance(parameter, PathParameter):
            return self._rendered(name)
        if parameter.same_content:
            return content_digest(Path(str(self.values[name])), name)
        return "<path>"


def template_problems(profile: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) of all that cannot be seen in one key alone.

    Takes the keys as they were read: those of a wrong type are passed over, so that one mistake
    does not hide the next.
    """
    command = profile.get("command", ())
    is_list = isinstance(command, list | tuple) and all(isinstance(a, str) for a in command)
    texts: tuple[str, ...] = tuple(command) if is_list else ()  # type: ignore[arg-type]  # just tested
    if texts and not texts[0].startswith("/"):
        yield "command[0]", f"= {shown(texts[0])} should be the absolute path of a program"
    if texts and _names(texts[0]):
        yield "command[0]", "names a parameter: which program runs is for the profile to say"
    used: set[str] = set()
    is_parsed = is_list
    for index, text in enumerate(texts):
        try:
            used |= _names(text)
        except ValueError as error:
            is_parsed = False
            yield f"command[{index}]", f"= {shown(text)} {error}"
    memory, parameters = profile.get("memory_mib"), profile.get("parameters", {})
    declared = parameters if isinstance(parameters, Mapping) else {}
    if isinstance(memory, str) and memory.startswith("{"):
        name = memory.strip("{}")
        used.add(name)
        kind = declared.get(name)
        word = kind.get("type") if isinstance(kind, Mapping) else None
        if kind is not None and word != "integer" and not isinstance(kind, IntegerParameter):
            yield "memory_mib", f"= {shown(memory)} names no integer parameter"
    environment = profile.get("environment", {})
    for name in environment if isinstance(environment, Mapping) else ():
        if str(name).startswith(RESERVED):
            yield f"environment.{name}", f"is migrd's own: {RESERVED}... is what it tells a process"
    yield from name_problems(used, declared, look_for_unused=is_parsed)


def _parse(argument: str) -> Pieces:
    """Raises ValueError, with what is wrong for people."""
    pieces: list[tuple[str, bool]] = []
    at = 0
    for found in _PIECE.finditer(argument):
        pieces.append((argument[at : found.start()], False))
        at = found.end()
        if found[0] in ("{{", "}}"):
            pieces.append((found[0][0], False))
        elif found[1]:
            pieces.append((found[1], True))
        else:
            raise ValueError('has a single brace in it; write "{{" or "}}" for a plain one')
    pieces.append((argument[at:], False))
    return tuple((text, is_name) for text, is_name in pieces if text)


def _names(argument: str) -> set[str]:
    return {text for text, is_name in _parse(argument) if is_name}


def _unfit(profile: DirectProfile, values: Mapping[str, Value]) -> Iterator[Violation]:
    """Values that would be taken for an option."""
    for pieces in profile.template:
        first, is_name = pieces[0] if pieces else ("", False)
        if is_name and first in values:
            text = profile.parameters[first].render(values[first])
            if text.startswith("-"):
                told = f"{text!r} begins with '-', and would be taken for an option"
                yield Violation(f"parameters.{first}", "not_allowed", told)


def _without_paths(argument: str) -> str:
    if argument.startswith("/"):
        return "<path>"
    return re.sub(r"=/.*", "=<path>", argument)


def _run_as(user: str | None) -> RunAs | None:
    """Raises LookupError. Blocking (the user database)."""
    if user is None:
        return None
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise LookupError(f"user {user!r} is not there; create it, or mend `user`") from None
    if entry.pw_uid == os.geteuid():
        return None
    if os.geteuid() != 0:
        raise LookupError(f"migrd does not run as root, so it can start nothing as {user!r}")
    groups = tuple(group.gr_gid for group in grp.getgrall() if user in group.gr_mem)
    return RunAs(entry.pw_uid, entry.pw_gid, groups)
