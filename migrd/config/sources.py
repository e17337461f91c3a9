"""Where settings come from: one nested table per source, merged, with the origin of each value.

Nothing is validated here, except what makes a source unreadable as a whole.

Lines of the TOML file are found by a look at the text (table headers and `key =` at the start of a
line), not by a parser: it serves the messages, and where it finds nothing the line is left out.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from migrd.errors import ConfigError

PREFIX: Final = "MIGRD_"
NOT_SETTINGS: Final = frozenset(
    {
        "CONFIG",
        "FAILPOINTS",
        "HOST",
        "OUTPUT",
        "PYTHON",
        "SOCKET",
        "TOKEN",
        "TOKEN_FILE",
        "URL",
        "VENV",
    }
)
"""MIGRD_… variables that belong to the command line and to tests, not to the daemon's settings."""
NOT_SETTINGS_PREFIXES: Final = ("TEST_", "DEMO_", "CLI_", "BENCH_")

CREDENTIALS: Final[Mapping[str, tuple[str, ...]]] = {
    "api-token": ("api", "tcp", "token_file"),
    "api-tls-cert": ("api", "tcp", "tls_cert"),
    "api-tls-key": ("api", "tcp", "tls_key"),
    "peer-cert": ("peer", "cert"),
    "peer-key": ("peer", "key"),
    "peer-ca": ("peer", "ca"),
    "etcd-ca": ("arbiter", "ca"),
    "etcd-cert": ("arbiter", "cert"),
    "etcd-key": ("arbiter", "key"),
    "etcd-password": ("arbiter", "password_file"),
}
"""systemd credentials (LoadCredential=) that name themselves; the setting is the path."""

MAX_FILE_BYTES: Final = 1 << 20

Table = dict[str, Any]
KeyPath = tuple[str, ...]


@dataclass
class Merged:
    """All sources as one table, and where each leaf came from."""

    table: Table = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def origin(self, path: KeyPath) -> str:
        """Where this key, or the nearest thing above it, was set; "" when nobody set it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return ""


def merge(path: Path | None, environ: Mapping[str, str]) -> Merged:
    """Read all sources; the later wins: credentials, file, environment.

    Raises ConfigError when the file cannot be read or is not TOML.
    """
    merged = Merged()
    if path is not None:
        text, table = _read_toml(path)
        lines = find_lines(text)
        for leaf, value in _leaves(table, ()):
            _put(merged, leaf, value, _place(path, lines, leaf))
    for leaf, variable, value in _read_environment(environ):
        _put(merged, leaf, value, f"environment variable {variable}")
    _add_credentials(merged, environ)
    return merged


def _place(path: Path, lines: Mapping[KeyPath, int], leaf: KeyPath) -> str:
    for length in range(len(leaf), 0, -1):
        if leaf[:length] in lines:
            return f"{path}:{lines[leaf[:length]]}"
    return str(path)


def _read_toml(path: Path) -> tuple[str, Table]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as failure:
        raise ConfigError(
            f"{path}: cannot be read: {failure.strerror}; name another file with --config",
            code="config_unreadable",
        ) from failure
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: longer than {MAX_FILE_BYTES} bytes; is this the right file?")
    try:
        text = raw.decode()
        return text, tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as failure:
        raise ConfigError(f"{path}: not TOML: {failure}", code="config_not_toml") from failure


def _leaves(table: Table, above: KeyPath) -> list[tuple[KeyPath, Any]]:
    found: list[tuple[KeyPath, Any]] = []
    for key, value in table.items():
        if isinstance(value, dict):
            found.append(((*above, key), {}))
            found.extend(_leaves(value, (*above, key)))
        else:
            found.append(((*above, key), value))
    return found


def _put(merged: Merged, path: KeyPath, value: Any, origin: str) -> None:
    """Set a leaf; an empty table only makes sure that the section exists."""
    table = merged.table
    for key in path[:-1]:
        inner = table.get(key)
        if not isinstance(inner, dict):
            inner = table[key] = {}
        table = inner
    if value == {} and isinstance(table.get(path[-1]), dict):
        return
    table[path[-1]] = value
    merged.origins[path] = origin


def _read_environment(environ: Mapping[str, str]) -> list[tuple[KeyPath, str, Any]]:
    """(key path, variable, value) of each MIGRD_ variable that is meant as a setting."""
    found: list[tuple[KeyPath, str, Any]] = []
    for variable in sorted(environ):
        rest = variable.removeprefix(PREFIX)
        if rest == variable or rest in NOT_SETTINGS or rest.startswith(NOT_SETTINGS_PREFIXES):
            continue
        path = tuple(rest.lower().split("__"))
        found.append((path, variable, _from_text(environ[variable])))
    return found


def _from_text(text: str) -> Any:
    """Lists are JSON; all else stays text, and the setting's own type makes sense of it."""
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return text


def _add_credentials(merged: Merged, environ: Mapping[str, str]) -> None:
    directory = environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        return
    for name, path in CREDENTIALS.items():
        file = Path(directory) / name
        section: Any = merged.table
        for key in path[:-1]:
            section = section.get(key) if isinstance(section, dict) else None
        # an absent [api.tcp] means no TCP port: a credential alone does not open one
        if isinstance(section, dict) and path[-1] not in section and file.is_file():
            _put(merged, path, str(file), f"systemd credential {name}")


_HEADER: Final = re.compile(r"^\s*\[([^\[\]]+)\]")
_KEY: Final = re.compile(r"""^\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"))*)\s*=""")
_PART: Final = re.compile(r""""([^"]*)"|'([^']*)'|([\w-]+)""")


def find_lines(text: str) -> Mapping[KeyPath, int]:
    """Line numbers of tables and keys, as far as a look at the text shows them."""
    found: dict[KeyPath, int] = {}
    above: KeyPath = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            above = _parts(header.group(1))
            found.setdefault(above, number)
        elif key := _KEY.match(line):
            found.setdefault((*above, *_parts(key.group(1))), number)
    return found


def _parts(dotted: str) -> KeyPath:
    return tuple(next(filter(None, groups), "") for groups in _PART.findall(dotted))
