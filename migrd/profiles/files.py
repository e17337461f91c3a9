"""Reading launch profiles: a directory of TOML files, each of one engine, each whole or refused.

    engine = "qemu"      (or left out) what QEMU is launched with: migrd.qemu.profile
    engine = "direct"    a process that hands its guest over: migrd.direct.profile

Each adapter reads the files of its engine; a file of an engine that there is not is refused by all.
Files that do not end in `.toml` are not looked at. A directory that is not there has no profiles:
a host may only adopt VMs that others launch.
"""

import logging
import re
import stat
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from migrd.errors import ConfigError

FILE_LIMIT_BYTES: Final = 64 * 1024
NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
PARAMETER_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,62}")
SHOWN_CHARS: Final = 120
ENGINES: Final = ("qemu", "direct")

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProfileFile:
    """One file as it was read; `table` without its engine, and with its name."""

    path: Path
    engine: str
    table: dict[str, Any]
    problems: tuple[str, ...]
    """What is wrong with the file itself, one line each."""


def load_directory(
    directory: Path, engine: str, load: Callable[[ProfileFile], T]
) -> dict[str, T] | None:
    """The profiles of one engine, by name; None when the directory is not there. Blocking.

    `load` raises ConfigError; so does this, with every problem of every file.
    """
    if not directory.exists():
        log.info("no launch profiles: %s is not there", directory)
        return None
    profiles: dict[str, T] = {}
    problems: list[str] = []
    try:
        files = sorted(path for path in directory.iterdir() if path.suffix == ".toml")
    except OSError as failure:
        text = f"{directory}: cannot be read: {failure.strerror}"
        raise ConfigError(text, code="bad_profile") from failure
    for path in files:
        try:
            file = read_file(path)
            if file.engine == engine:
                profiles[path.stem] = load(file)
        except ConfigError as error:
            problems.append(error.message)
    if problems:
        raise refused(problems)
    return profiles


def read_file(path: Path) -> ProfileFile:
    """Blocking. Raises ConfigError for what cannot be read, or is of no engine."""
    table = _read(path)
    engine = table.pop("engine", ENGINES[0])
    if engine not in ENGINES:
        raise refused([f'{path}: engine = {shown(engine)} should be "qemu" or "direct"'])
    table.setdefault("name", path.stem)
    problems = []
    if not NAME.fullmatch(path.stem):
        problems.append(f"{path}: the file's name is no name for a profile: a-z, 0-9, _ and -")
    elif table["name"] != path.stem:
        text = f"is not that of the file; write {path.stem!r} or leave it out"
        problems.append(f"{path}: name = {shown(table['name'])} {text}")
    return ProfileFile(path, engine, table, tuple(problems))


def refused(problems: list[str]) -> ConfigError:
    """Each problem once, one a line."""
    return ConfigError("\n".join(dict.fromkeys(problems)), code="bad_profile")


def shown(value: object) -> str:
    """A value for an error message, not longer than it helps."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 1] + "…"


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            mode = path.stat().st_mode
            raw = file.read(FILE_LIMIT_BYTES + 1)
    except OSError as failure:
        raise refused([f"{path}: cannot be read: {failure.strerror}"]) from failure
    if mode & stat.S_IWOTH:
        raise refused([f"{path}: everybody may write it; `chmod o-w` it, and look what it says"])
    if len(raw) > FILE_LIMIT_BYTES:
        raise refused([f"{path}: longer than {FILE_LIMIT_BYTES} bytes; is it a launch profile?"])
    try:
        return tomllib.loads(raw.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as failure:
        raise refused([f"{path}: not TOML: {failure}"]) from failure
