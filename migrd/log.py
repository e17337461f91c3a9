"""Logging: one line per fact, for the operator and for programs.

    structlog loggers (ours) --------+
                                     +--> context, level, time, hide secrets --> JSON or console
    logging (asyncio, aiohttp, ours) +                                                |
                                                        bounded queue --> writer thread --> stderr

Rules
1. info: a phase changed, a request was refused. warning: odd, but going on. error: what was asked
   did not happen. Nothing per round at info.
2. A line about a VM or migration says which: bind `vm`, `migration_id`, or be inside `about()`.
3. No secret: values under telling keys are replaced, and so are bearer tokens, private keys,
   passwords in URLs and all that was handed to `keep_secret`, wherever in a line they stand.
4. A reader of the log that is stuck (a full pipe, a journald that hangs) must not stop a guest: the
   event loop never writes. Lines that find the queue full are dropped, and counted.

Under systemd, where stderr is a stream of the journal (JOURNAL_STREAM), each line begins with the
priority that journald understands (sd-daemon(3): `<3>` error ... `<7>` debug).
"""

import atexit
import contextlib
import json
import logging
import os
import queue
import re
import sys
import threading
from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager
from typing import Any, Final, TextIO

import orjson
import structlog
from structlog.contextvars import bound_contextvars, merge_contextvars
from structlog.typing import EventDict, Processor, WrappedLogger

from migrd.config import LogSettings

HIDDEN: Final = "[hidden]"
QUEUE_LINES: Final = 10_000
MAX_VALUE_CHARS: Final = 4_000
MAX_TRACE_CHARS: Final = 16_000
MAX_DEPTH: Final = 6
FLUSH_S: Final = 2.0

_PRIORITY: Final = {"critical": 2, "error": 3, "warning": 4, "info": 6, "debug": 7}
_LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}

_TELLING_KEY: Final = re.compile(
    r"(?i)(token|secret|passw|passphrase|authorization|cookie|credential|private_?key|api_?key)"
)
_PATH_OF_A_SECRET: Final = re.compile(r"(?i)_(file|path|dir|name|count)$")
_SECRET_IN_TEXT: Final = re.compile(
    r"(?i)(bearer\s+)[\w.~+/=-]+"
    r"|(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|(\b[a-z][a-z0-9+.-]*://[^\s/:@]*:)[^\s/@]+(?=@)",
    re.DOTALL,
)
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_CONTROL_BUT_LINES: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def configure(
    settings: LogSettings,
    *,
    stream: TextIO | None = None,
    environ: Mapping[str, str] | None = None,
) -> "Writer":
    """Send everything that is logged, by structlog or logging, to `stream` (stderr) from now on.

    Returns the writer, which `close`s by itself when the interpreter ends.
    """
    stream = sys.stderr if stream is None else stream
    environ = os.environ if environ is None else environ
    is_console = settings.format == "console" or (settings.format == "auto" and stream.isatty())
    writer = Writer(stream.fileno())
    chain = _chain(is_console=is_console, with_priority=_is_journal(stream, environ))
    level = _LEVELS[settings.level]
    structlog.configure(
        processors=chain,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *names: _Named(writer, str(names[0]) if names else "migrd"),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(handlers=[_Bridge(chain, writer)], level=level, force=True)
    logging.captureWarnings(True)
    logging.getLogger("aiohttp.access").setLevel(max(level, logging.WARNING))
    logging.raiseExceptions = False  # a line that cannot be written is no reason to write more
    return writer


def about(**facts: str) -> AbstractContextManager[None]:
    """Every line logged inside says these, e.g. vm and migration_id; also in tasks begun there."""
    return bound_contextvars(**facts)


_kept_secret: set[str] = set()


def keep_secret(text: str) -> None:
    """Never show this text in a line (tokens read from files)."""
    if len(text) >= 4:  # shorter ones would tear holes into everything
        _kept_secret.add(text)


def _chain(*, is_console: bool, with_priority: bool) -> list[Processor]:
    render: Processor
    if is_console:
        render = structlog.dev.ConsoleRenderer(colors=not with_priority, pad_event_to=0)
        return [*_FACTS, _printable, render, _to_bytes]
    return [*_FACTS, _to_json_with_priority if with_priority else _to_json]


def _is_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether `stream` is the very stream of the journal that systemd set up (not inherited by
    something whose stderr leads elsewhere)."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


# What a line says ---------------------------------------------------------------------------------


def _name_logger(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    if isinstance(logger, _Named):
        event.setdefault("logger", logger.name)
    return event


def _hide_secrets(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    for key, value in event.items():
        event[key] = _seemly(value, key, MAX_DEPTH)
    return event


def _seemly(value: Any, key: str, depth: int) -> Any:
    """The value without secrets, and not longer than a line of the journal bears."""
    if _TELLING_KEY.search(key) and not _PATH_OF_A_SECRET.search(key):
        return HIDDEN
    match value:
        case str():
            return _seemly_text(
                str(value), MAX_TRACE_CHARS if key == "exception" else MAX_VALUE_CHARS
            )
        case bool() | int() | float() | None:
            return value
        case _ if depth == 0:
            return "…"
        case Mapping():
            return {str(k): _seemly(v, str(k), depth - 1) for k, v in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_seemly(item, "", depth - 1) for item in value]
        case _:
            return _seemly_text(_said(value), MAX_VALUE_CHARS)


def _said(value: object) -> str:
    try:
        return str(value)
    except Exception:  # its __str__ is broken: the line about it shall not be
        return f"<{type(value).__name__}>"


def _seemly_text(text: str, limit_chars: int) -> str:
    for secret in _kept_secret:
        if secret in text:
            text = text.replace(secret, HIDDEN)
    if "://" in text or "PRIVATE KEY" in text or "earer " in text.lower():
        text = _SECRET_IN_TEXT.sub(lambda m: f"{m[1] or m[2] or m[3]}{HIDDEN}", text)
    if not text.isascii():  # bytes that were no UTF-8 come as lone surrogates
        text = text.encode(errors="backslashreplace").decode()
    if len(text) > limit_chars:  # the end of a traceback is what tells
        text = f"{text[: limit_chars // 3]} … {text[-limit_chars * 2 // 3 :]}"
    return text


_FACTS: Final[list[Processor]] = [
    merge_contextvars,
    _name_logger,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.StackInfoRenderer(),
    structlog.processors.format_exc_info,
    _hide_secrets,
]


# How it is written --------------------------------------------------------------------------------


def _to_json(logger: WrappedLogger, method: str, event: EventDict) -> bytes:
    ordered = {"timestamp": event.pop("timestamp", None), "level": event.pop("level", None)}
    ordered.update(event)
    try:
        return orjson.dumps(ordered, default=_said, option=orjson.OPT_NON_STR_KEYS)
    except (TypeError, ValueError):  # a number beyond 64 bits
        return json.dumps(ordered, default=_said).encode()


def _to_json_with_priority(logger: WrappedLogger, method: str, event: EventDict) -> bytes:
    priority = _PRIORITY.get(str(event.get("level")), 6)
    return b"<%d>%b" % (priority, _to_json(logger, method, event))


def _printable(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """What came from outside may hold escape sequences; a terminal would obey them."""
    for key, value in event.items():
        if isinstance(value, str):
            pattern = _CONTROL_BUT_LINES if key in ("exception", "stack") else _CONTROL
            event[key] = pattern.sub(lambda m: f"\\x{ord(m[0]):02x}", value)
    return event


def _to_bytes(logger: WrappedLogger, method: str, event: Any) -> bytes:
    return str(event).encode(errors="backslashreplace")


class Writer:
    """Writes lines to a file descriptor from a thread of its own."""

    def __init__(self, fd: int, *, queue_lines: int = QUEUE_LINES) -> None:
        self._fd = fd
        self._limit = queue_lines
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._dropped = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def write(self, line: bytes) -> None:
        """Take a line; never waits."""
        if self._is_closed or self._lines.qsize() >= self._limit:
            self._dropped += 1
        else:
            self._lines.put(line)

    def close(self) -> None:
        """Write what is there, for at most FLUSH_S, and end the thread."""
        if not self._is_closed:
            self._is_closed = True
            self._lines.put(None)
            self._thread.join(FLUSH_S)
            atexit.unregister(self.close)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            dropped, self._dropped = self._dropped, 0
            if dropped:
                note = {"level": "warning", "event": "log lines were lost", "lines": dropped}
                self._put(orjson.dumps(note))
            self._put(line)

    def _put(self, line: bytes) -> None:
        rest = memoryview(line + b"\n")
        with contextlib.suppress(OSError):  # nobody is left to be told
            while rest:
                rest = rest[os.write(self._fd, rest) :]


class _Named:
    """What structlog logs to: a name, and the writer."""

    def __init__(self, writer: Writer, name: str) -> None:
        self._writer = writer
        self.name = name

    def msg(self, line: bytes) -> None:
        self._writer.write(line)

    debug = info = warning = warn = error = critical = fatal = exception = log = msg


class _Bridge(logging.Handler):
    """Brings what was logged through `logging` onto the same chain."""

    def __init__(self, chain: list[Processor], writer: Writer) -> None:
        super().__init__()
        self._chain, self._writer = chain, writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._writer.write(self._line(record))
        except Exception:
            self.handleError(record)

    def _line(self, record: logging.LogRecord) -> bytes:
        event: MutableMapping[str, Any] = {"event": record.getMessage(), "logger": record.name}
        for key in ("vm", "migration_id"):
            if hasattr(record, key):  # given as extra=
                event[key] = getattr(record, key)
        if record.exc_info and record.exc_info[0] is not None:
            event["exc_info"] = record.exc_info
        done: Any = event
        for step in self._chain:
            done = step(None, record.levelname.lower(), done)
        return bytes(done)
