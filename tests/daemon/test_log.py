"""What is logged: complete, for programs and people, without secrets, and never in anyone's way."""

import asyncio
import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest
import structlog

from migrd.config import LogSettings
from migrd.log import Writer, about, configure, keep_secret

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, raises = root.handlers[:], root.level, logging.raiseExceptions
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.raiseExceptions = raises
    logging.getLogger("aiohttp.access").setLevel(logging.NOTSET)


class Log:
    """A configured log that ends in a file."""

    def __init__(
        self, path: Path, environ: Mapping[str, str] | None = None, **settings: str
    ) -> None:
        self.file = path.open("w+")
        given = {"format": "json", **settings}
        self.writer = configure(
            LogSettings.model_validate(given), stream=self.file, environ=environ or {}
        )

    def text(self) -> str:
        self.writer.close()
        self.file.seek(0)
        return self.file.read()

    def lines(self) -> list[dict[str, Any]]:
        return [orjson.loads(line) for line in self.text().splitlines()]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    made = Log(tmp_path / "log")
    yield made
    made.writer.close()
    made.file.close()


def test_a_line_is_one_object_with_time_level_logger_and_facts(log: Log) -> None:
    structlog.get_logger("migrd.engine.outgoing").info("phase", phase="granted", after_s=0.25)
    (line,) = log.lines()
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "level": "info", "event": "phase", "logger": "migrd.engine.outgoing",
        "phase": "granted", "after_s": 0.25,
    }  # fmt: skip


async def test_every_line_says_vm_and_migration_also_in_tasks_and_through_logging(
    tmp_path: Path,
) -> None:
    log = Log(tmp_path / "log")

    async def work() -> None:
        structlog.get_logger("a").info("one")
        logging.getLogger("b").warning("two %d", 2)

    with about(vm="web", migration_id="m1"):
        await asyncio.create_task(work())
    structlog.get_logger("a").bind(vm="db", migration_id="m2").info("three")
    logging.getLogger("b").warning("four", extra={"vm": "dns"})
    structlog.get_logger("a").info("five")
    lines = await asyncio.to_thread(log.lines)
    log.file.close()
    assert [(line["event"], line.get("vm"), line.get("migration_id")) for line in lines] == [
        ("one", "web", "m1"),
        ("two 2", "web", "m1"),
        ("three", "db", "m2"),
        ("four", "dns", None),
        ("five", None, None),
    ]


def test_what_asyncio_aiohttp_and_warnings_have_to_say_is_there_but_not_each_request(
    log: Log,
) -> None:
    logging.getLogger("asyncio").error("Task exception was never retrieved")
    logging.getLogger("aiohttp.server").warning("odd")
    logging.getLogger("aiohttp.access").info("GET / 200")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old way", DeprecationWarning, stacklevel=1)
    loggers = [line["logger"] for line in log.lines()]
    assert loggers == ["asyncio", "aiohttp.server", "py.warnings"]


def test_what_is_below_the_level_is_not_written(tmp_path: Path) -> None:
    log = Log(tmp_path / "log", level="warning")
    for logger in (structlog.get_logger("a"), logging.getLogger("b")):
        logger.debug("no")
        logger.info("no")
        logger.warning("yes")
        logger.error("yes")
    assert [line["event"] for line in log.lines()] == ["yes"] * 4
    log.file.close()


def test_an_exception_comes_with_its_traceback_in_the_same_line(log: Log) -> None:
    try:
        raise RuntimeError("planted")
    except RuntimeError:
        structlog.get_logger("a").exception("failed")
        logging.getLogger("b").exception("failed too")
    for line in log.lines():
        assert "RuntimeError: planted" in line["exception"]
        assert line["level"] == "error"


def test_no_secret_reaches_a_line(log: Log) -> None:
    keep_secret("tok-known-from-file")
    logger = structlog.get_logger("a")
    logger.info(
        "x", token="s3cret-1", nested={"Password": "s3cret-2", "deep": [{"api_key": "s3cret-3"}]}
    )
    logger.info("Authorization: Bearer s3cret.4-abc", headers={"Authorization": "Basic s3cret-5"})
    logger.info("x", url="https://user:s3cret-6@host/", said="a tok-known-from-file b")
    logging.getLogger("b").error("key: -----BEGIN RSA PRIVATE KEY-----\ns3cret-7\n")
    logger.info("x", odd=RuntimeError("Bearer s3cret-8"))
    try:
        raise RuntimeError("Bearer s3cret-9")
    except RuntimeError:
        logger.exception("failed")
    text = log.text()
    assert "s3cret" not in text
    assert "tok-known" not in text
    assert text.count("[hidden]") >= 10


def test_the_path_of_a_secret_is_no_secret(log: Log) -> None:
    structlog.get_logger("a").info("x", token_file="/etc/migrd/token", idempotency_key="k1")
    (line,) = log.lines()
    assert (line["token_file"], line["idempotency_key"]) == ("/etc/migrd/token", "k1")


class Broken:
    def __str__(self) -> str:
        raise RuntimeError("planted")


@pytest.mark.parametrize(
    "odd", [b"\xff", "\udc80", 2**80, float("nan"), {1: 2}, Broken(), object(), {"a": Broken()}]
)
def test_no_value_is_too_odd_for_a_line(log: Log, odd: object) -> None:
    structlog.get_logger("a").warning("odd", value=odd)
    (line,) = log.lines()
    assert line["event"] == "odd"


def test_a_value_that_contains_itself_ends(log: Log) -> None:
    loop: list[object] = []
    loop.append(loop)
    structlog.get_logger("a").warning("odd", value=loop)
    assert log.lines()[0]["event"] == "odd"


def test_a_long_value_keeps_its_beginning_and_its_end(log: Log) -> None:
    structlog.get_logger("a").info("x", said="begin" + "x" * 100_000 + "end")
    (line,) = log.lines()
    assert len(line["said"]) < 5_000
    assert line["said"].startswith("begin")
    assert line["said"].endswith("end")


def test_a_broken_format_string_of_a_library_loses_its_own_line_only(log: Log) -> None:
    logging.getLogger("b").warning("%d", "no number")
    logging.getLogger("b").warning("next")
    assert [line["event"] for line in log.lines()] == ["next"]


def test_under_the_journal_each_line_begins_with_its_priority(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.touch()
    status = path.stat()
    log = Log(path, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}, format="auto")
    logger = structlog.get_logger("a")
    for level in ("debug", "info", "warning", "error", "critical"):
        getattr(logger, level)("x")
    logging.getLogger("b").error("line one\nline two")
    text = log.text()
    log.file.close()
    assert [line[:3] for line in text.splitlines()] == ["<6>", "<4>", "<3>", "<2>", "<3>"]
    assert [orjson.loads(line[3:])["level"] for line in text.splitlines()][-1] == "error"


def test_a_journal_stream_that_leads_elsewhere_gives_no_priorities(tmp_path: Path) -> None:
    log = Log(tmp_path / "log", {"JOURNAL_STREAM": "1:1"})
    structlog.get_logger("a").info("x")
    assert log.text().startswith("{")
    log.file.close()


def test_for_people_a_line_is_text_and_obeys_no_escape_sequence_from_outside(
    tmp_path: Path,
) -> None:
    log = Log(tmp_path / "log", format="console")
    structlog.get_logger("a").info("from qemu: \x1b[2J\r\nforged", vm="web", error="\x1b[31m")
    text = log.text()
    log.file.close()
    assert "\\x1b[2J\\x0d\\x0aforged" in text
    assert "\x1b[2J" not in text
    assert "web" in text
    assert text.count("\n") == 1


def test_a_reader_that_is_stuck_stops_nobody_and_is_told_what_it_missed() -> None:
    reader, writer_fd = os.pipe()
    writer = Writer(writer_fd, queue_lines=100)
    begun = time.monotonic()
    for number in range(5_000):
        writer.write(b"x" * 1000 + b" %d" % number)
    took_s = time.monotonic() - begun
    assert took_s < 2

    read: list[bytes] = []

    def drain() -> None:
        while chunk := os.read(reader, 1 << 16):
            read.append(chunk)

    thread = threading.Thread(target=drain)
    thread.start()
    deadline = time.monotonic() + 5
    while writer._lines.qsize() and time.monotonic() < deadline:
        time.sleep(0.01)
    writer.write(b"after")
    writer.close()
    os.close(writer_fd)
    thread.join(5)
    os.close(reader)
    text = b"".join(read)
    assert b"log lines were lost" in text
    assert text.rstrip().endswith(b"after")


def test_closing_waits_for_a_stuck_reader_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migrd.log.FLUSH_S", 0.1)
    reader, writer_fd = os.pipe()
    writer = Writer(writer_fd)
    writer.write(b"x" * (1 << 20))
    begun = time.monotonic()
    writer.close()
    assert time.monotonic() - begun < 2
    os.close(reader)  # the thread's write ends with EPIPE, which is nobody's business
    writer._thread.join(5)
    assert not writer._thread.is_alive()
    os.close(writer_fd)


def test_what_was_logged_last_is_written_before_the_interpreter_ends() -> None:
    program = (
        "import structlog; from migrd.config import LogSettings; from migrd.log import configure\n"
        "configure(LogSettings(format='json'))\n"
        "for n in range(2000): structlog.get_logger('a').info('line', n=n)\n"
        "raise SystemExit(3)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, timeout=60, check=False
    )
    lines = ended.stderr.splitlines()
    assert ended.returncode == 3
    assert len(lines) == 2000
    assert orjson.loads(lines[-1])["n"] == 1999


def test_a_line_costs_microseconds(log: Log) -> None:
    logger = structlog.get_logger("a").bind(vm="web", migration_id="m1")
    begun = time.thread_time()
    for number in range(2000):
        logger.info("phase", phase="precopy", n=number)
    per_line_s = (time.thread_time() - begun) / 2000
    begun = time.thread_time()
    for number in range(2000):
        logger.debug("nothing", n=number)
    per_nothing_s = (time.thread_time() - begun) / 2000
    assert per_line_s < 500e-6
    assert per_nothing_s < 0.2 * per_line_s
