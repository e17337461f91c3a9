"""From the sources to Settings, or to one ConfigError that lists everything that is wrong."""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from migrd.config.checks import conflicts
from migrd.config.settings import Settings
from migrd.config.sources import KeyPath, Merged, Table, merge
from migrd.errors import ConfigError

DEFAULT_PATH: Final = Path("/etc/migrd/migrd.toml")
MAX_VALUE_CHARS: Final = 120
_USER_OF_URL: Final = re.compile(r"(?<=://)[^\s\"']*@")
_NAMES_A_SECRET: Final = re.compile(r"password|token")
_HIDDEN: Final = "…"


@dataclass(frozen=True)
class Explained:
    """One setting in force."""

    key: str
    value: str
    """As it would stand in the TOML file."""
    origin: str
    """Where it was set; "default" when nobody did."""
    is_default: bool


def load(path: Path | None, environ: Mapping[str, str]) -> Settings:
    """Read, merge and check the settings.

    `path` None means /etc/migrd/migrd.toml where it exists, else the defaults; a path that is named
    must exist. Raises ConfigError with every problem at once, one per line.
    """
    if path is None and DEFAULT_PATH.exists():
        path = DEFAULT_PATH
    merged = merge(path, environ)
    try:
        settings = Settings.model_validate(merged.table)
    except ValidationError as failure:
        raise _config_error(_problems(failure, merged)) from failure
    settings.with_origins({".".join(leaf): place for leaf, place in merged.origins.items()})
    broken = _conflict_lines(settings, merged)
    if broken:
        raise _config_error(broken)
    return settings


def explain(settings: Settings) -> tuple[Explained, ...]:
    """Every setting in force, in the order of the reference file, and where it came from."""
    return tuple(_explain(settings, (), settings.origins))


def _explain(section: BaseModel, above: KeyPath, origins: Mapping[str, str]) -> Iterator[Explained]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        path = (*above, name)
        if isinstance(value, BaseModel):
            yield from _explain(value, path, origins)
        elif isinstance(value, dict):
            for key, inner in value.items():
                yield from _explain(inner, (*path, key), origins)
        else:
            origin = origins.get(".".join(path))
            yield Explained(
                key=".".join(path),
                value=as_toml(value, name),
                origin=origin or "default",
                is_default=origin is None,
            )


def as_toml(value: object, key: str = "") -> str:
    """A value as it would stand in the file; "" for one that is not set."""
    match value:
        case None:
            return ""
        case int() if key.endswith("_mode"):
            return f'"{value:04o}"'
        case int() | float():
            return repr(value)
        case list() | tuple():
            return "[" + ", ".join(as_toml(item) for item in value) + "]"
        case _:
            text = str(value).replace("\\", "\\\\").replace('"', '\\"')
            return f'"{text}"'


def _config_error(lines: list[str]) -> ConfigError:
    if len(lines) == 1:
        return ConfigError(f"the configuration has a problem: {lines[0]}")
    listed = "".join(f"\n  {line}" for line in lines)
    return ConfigError(f"the configuration has {len(lines)} problems:{listed}")


def _problems(failure: ValidationError, merged: Merged) -> list[str]:
    """All problems: of single settings, and the conflicts among those that are right."""
    errors = failure.errors(include_url=False, include_context=True)
    lines = list(dict.fromkeys(_line(error, merged) for error in errors))
    touched = {_dotted(error["loc"]) for error in errors}
    touched |= {_dotted(tuple(p for p in e["loc"] if not isinstance(p, int))) for e in errors}
    rest = _what_is_right(merged.table, errors)
    return lines + ([] if rest is None else _conflict_lines(rest, merged, but_not=touched))


def _what_is_right(table: Table, errors: list[ErrorDetails]) -> Settings | None:
    """The settings without the wrong ones; taking out a url leaves a peer without one, so twice."""
    for _ in range(3):
        table = _without(table, errors)
        try:
            return Settings.model_validate(table)
        except ValidationError as failure:
            errors = failure.errors(include_url=False)
    return None


def _conflict_lines(
    settings: Settings, merged: Merged, but_not: frozenset[str] | set[str] = frozenset()
) -> list[str]:
    lines = []
    for conflict in conflicts(settings):
        if conflict.key in but_not:
            continue
        origin = merged.origin(tuple(conflict.key.split(".")))
        place = f" ({origin})" if origin else ""
        lines.append(f"{conflict.key} {conflict.message}{place}")
    return lines


def _dotted(loc: tuple[int | str, ...]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text.removesuffix(".[key]")


def _line(error: ErrorDetails, merged: Merged) -> str:
    path = tuple(str(part) for part in error["loc"] if isinstance(part, str) and part != "[key]")
    origin = merged.origin(path)
    place = f" ({origin})" if origin else ""
    key = _dotted(error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{key} is not a setting{place}{_nearest(path)}"
    if error["type"] == "missing":
        return f"{key} is missing; {_meaning(path)}{place}"
    if error["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return f"{key} = {_shown(error['input'])} should be a table, [{key}]{place}"
    return f"{key} = {_shown(error['input'], path[-1])} {_cure(error)}{place}; {_meaning(path)}"


def _cure(error: ErrorDetails) -> str:
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    if error["type"] == "string_pattern_mismatch":
        return "should be a plain name or address: letters, digits, and . _ - inside"
    if error["type"] == "finite_number":
        return "should be a finite number"
    text = error["msg"].removeprefix("Input ").replace("a valid tuple", "a valid list")
    return text if text.startswith("should") else f"is wrong: {text[:1].lower()}{text[1:]}"


def _shown(value: object, key: str = "") -> str:
    """What was given, without what may be a secret: a user of a URL with its password, or a secret
    itself where the name of its file is asked for."""
    if _NAMES_A_SECRET.search(key):
        return _HIDDEN
    is_plain = isinstance(value, str | int | float | list | tuple)
    text = as_toml(value, key) if is_plain else repr(value)
    text = _USER_OF_URL.sub(f"{_HIDDEN}@", text)
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 1] + "…"


def _meaning(path: KeyPath) -> str:
    section: type[BaseModel] = Settings
    for part in path:
        field = section.model_fields.get(part)
        if field is None:
            continue  # a name in the roster
        inner = section_of(field.annotation)
        if inner is None:
            return (field.description or "").split(". ")[0].rstrip(".")
        section = inner
    return (section.__doc__ or "").split("\n")[0].rstrip(".")


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The model of a section, also where it is optional or one of many; None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (section_of(part) for part in get_args(annotation))
    return next((model for model in found if model is not None), None)


def known_keys(section: type[BaseModel] = Settings, above: str = "") -> Iterator[str]:
    """Every key there is, dotted; `<name>` stands for a name in the roster."""
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is None:
            yield f"{above}{name}"
        elif str(field.annotation).startswith("dict"):
            yield from known_keys(inner, f"{above}{name}.<name>.")
        else:
            yield f"{above}{name}"
            yield from known_keys(inner, f"{above}{name}.")


def _nearest(path: KeyPath) -> str:
    """ ", did you mean …?": among the keys beside it first, then among all by their last name."""
    every = list(known_keys())
    dotted = ".".join(path)
    if path[0] == "peers" and len(path) > 2:
        dotted = ".".join(("peers", "<name>", *path[2:]))
    by_whole = difflib.get_close_matches(dotted, every, n=1, cutoff=0.75)
    if by_whole:
        return f"; did you mean {by_whole[0]}?"
    same_name = [key for key in every if key.rsplit(".", 1)[-1] == path[-1]]
    if same_name:
        return f"; did you mean {same_name[0]}?"
    lasts = {key.rsplit(".", 1)[-1]: key for key in reversed(every)}
    by_last = difflib.get_close_matches(path[-1], lasts, n=1, cutoff=0.75)
    return f"; did you mean {lasts[by_last[0]]}?" if by_last else ""


def _without(table: Table, errors: list[ErrorDetails]) -> Table:
    """The table with every wrong value taken out, so that defaults stand in for them."""
    copy = _deep_copy(table)
    for error in errors:
        here: Any = copy
        names = [part for part in error["loc"] if isinstance(part, str) and part != "[key]"]
        if error["type"] == "missing":
            names.pop()  # what lacks it goes
        for part in names[:-1]:
            here = here.get(part) if isinstance(here, dict) else None
        if isinstance(here, dict) and names:
            here.pop(names[-1], None)
    return copy


def _deep_copy(table: Table) -> Table:
    return {k: _deep_copy(v) if isinstance(v, dict) else v for k, v in table.items()}
