"""Reading launch profiles: a directory of TOML files, each one whole or refused.

Every problem of every file is told at once, with the file, the key, the value found and the cure.
Files that do not end in `.toml` are not looked at. A directory that is not there has no profiles:
a host may only adopt VMs that others launch.
"""

import difflib
import logging
import stat
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from migrd.core.facts import VmSpec
from migrd.core.vfio_launch import VfioLaunch
from migrd.errors import ConfigError, Invalid, NotFound, Violation
from migrd.qemu.allowance import PassthroughRules
from migrd.qemu.parameters import (
    BooleanParameter,
    IntegerParameter,
    PathParameter,
    StringParameter,
)
from migrd.qemu.profile import NAME, LaunchProfile, Resolved, shown, template_problems

FILE_LIMIT_BYTES: Final = 64 * 1024

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Profiles:
    """All launch profiles of this host, by name."""

    by_name: Mapping[str, LaunchProfile] = field(default_factory=dict)
    directory: Path | None = None

    def find(self, name: str) -> LaunchProfile:
        """Raises NotFound, with the names there are."""
        if name in self.by_name:
            return self.by_name[name]
        known = ", ".join(sorted(self.by_name)) or "none"
        where = f" in {self.directory}" if self.directory is not None else ""
        raise NotFound(
            f"no launch profile {name!r}{where}; there are: {known}", code="unknown_profile"
        )

    def resolve(self, spec: VmSpec, devices: VfioLaunch | None = None) -> Resolved:
        """Fill the profile that a VM names; `devices`: as they are to be given to QEMU, where that
        is decided already. Blocking (looks at files).

        Raises NotFound for the profile, Invalid with every parameter that is wrong and every
        passthrough device that it does not allow.
        """
        if spec.profile is None:
            text = f"VM {spec.name} names no launch profile"
            raise Invalid(text, [Violation("profile", "no_launch_profile", text)])
        wanted = spec.devices if devices is None else devices.devices
        return self.find(spec.profile).resolve(spec.parameters, wanted)


def load_profiles(directory: Path) -> Profiles:
    """Read all profiles. Blocking. Raises ConfigError with every problem of every file."""
    if not directory.exists():
        log.info("no launch profiles: %s is not there", directory)
        return Profiles({}, directory)
    profiles: dict[str, LaunchProfile] = {}
    problems: list[str] = []
    try:
        files = sorted(path for path in directory.iterdir() if path.suffix == ".toml")
    except OSError as failure:
        text = f"{directory}: cannot be read: {failure.strerror}"
        raise ConfigError(text, code="bad_profile") from failure
    for path in files:
        try:
            profiles[path.stem] = load_profile(path)
        except ConfigError as error:
            problems.append(error.message)
    if problems:
        raise ConfigError("\n".join(problems), code="bad_profile")
    return Profiles(profiles, directory)


def load_profile(path: Path) -> LaunchProfile:
    """Read one profile. Blocking. Raises ConfigError with every problem, one per line."""
    table = _read(path)
    table.setdefault("name", path.stem)
    problems = []
    if not NAME.fullmatch(path.stem):
        problems.append(f"{path}: the file's name is no name for a profile: a-z, 0-9, _ and -")
    elif table["name"] != path.stem:
        text = f"is not that of the file; write {path.stem!r} or leave it out"
        problems.append(f"{path}: name = {shown(table['name'])} {text}")
    try:
        profile = LaunchProfile.model_validate(table)
    except ValidationError as failure:
        errors = failure.errors(include_url=False)
        problems += [f"{path}: {line}" for error in errors for line in _lines(error)]
        if all(error["type"] != "profile" for error in errors):  # else they are among the lines
            problems += [f"{path}: {key} {what}" for key, what in template_problems(table)]
        raise _refused(problems) from failure
    if problems:
        raise _refused(problems)
    return profile


def _refused(problems: list[str]) -> ConfigError:
    return ConfigError("\n".join(dict.fromkeys(problems)), code="bad_profile")


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            mode = path.stat().st_mode
            raw = file.read(FILE_LIMIT_BYTES + 1)
    except OSError as failure:
        raise _refused([f"{path}: cannot be read: {failure.strerror}"]) from failure
    if mode & stat.S_IWOTH:
        raise _refused([f"{path}: everybody may write it; `chmod o-w` it, and look what it says"])
    if len(raw) > FILE_LIMIT_BYTES:
        raise _refused([f"{path}: longer than {FILE_LIMIT_BYTES} bytes; is it a launch profile?"])
    try:
        return tomllib.loads(raw.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as failure:
        raise _refused([f"{path}: not TOML: {failure}"]) from failure


_MODELS: Final[Mapping[str, type[BaseModel]]] = {
    "integer": IntegerParameter,
    "boolean": BooleanParameter,
    "string": StringParameter,
    "path": PathParameter,
}


def _lines(error: ErrorDetails) -> Iterator[str]:
    """What is wrong, for people; pydantic's own words where they are plain enough."""
    if error["type"] == "profile":
        for key, problem in error["ctx"]["problems"]:
            yield f"{key} {problem}"
        return
    loc = error["loc"]
    in_parameter = len(loc) > 2 and loc[0] == "parameters" and loc[2] in _MODELS
    model: type[BaseModel] = _MODELS[str(loc[2])] if in_parameter else LaunchProfile
    if len(loc) > 1 and loc[0] == "passthrough":
        model = PassthroughRules
    if in_parameter:
        loc = (*loc[:2], *loc[3:])  # without the tag of the union
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
            yield f"{key} = {shown(error['input'])} {_cure(error, str(loc[0]))}"


_PATTERN_CURES: Final = {
    "binary": "should be the absolute path of a QEMU",
    "machine": "should be a versioned machine type, e.g. pc-q35-7.2",
    "accelerator": 'should be "kvm" or "tcg" (with its own options: "tcg,thread=single")',
    "parameters": "should be an absolute path",
}


def _cure(error: ErrorDetails, key: str) -> str:
    if error["type"] == "string_pattern_mismatch":
        return _PATTERN_CURES.get(key, "has characters in it that do not belong there")
    text = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return text[:1].lower() + text[1:]


def _dotted(loc: tuple[int | str, ...]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
