"""A monitor that says again what a real QEMU said: recorded traffic, one monitor of it at a time.

    {"mon": "src", "dir": ">", "msg": {"execute": ..., "id": 7}}    waited for, from the client
    {"mon": "src", "dir": "<", "msg": {"return": ..., "id": 7}}     sent, under the client's own id

Polls were thinned out when the traffic was recorded: a reply whose question is missing goes out
with an id the client never used.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRANSCRIPTS = Path(__file__).parent / "transcripts"
NEVER_ASKED = 10_000


@dataclass(frozen=True)
class Line:
    """One message of a recording."""

    is_question: bool
    message: dict[str, Any]

    @property
    def command(self) -> str:
        return str(self.message.get("execute", self.message.get("exec-oob")))


def recorded(name: str, monitor: str = "src") -> list[Line]:
    rows = [json.loads(row) for row in (TRANSCRIPTS / f"{name}.jsonl").read_text().splitlines()]
    return [Line(row["dir"] == ">", row["msg"]) for row in rows if row.get("mon") == monitor]


def one_connection(lines: list[Line]) -> list[Line]:
    """Up to where a second connection begins, if one does."""
    greetings = [at for at, line in enumerate(lines) if "QMP" in line.message]
    return lines[: greetings[1]] if len(greetings) > 1 else lines


def all_answers(name: str, command: str) -> list[dict[str, Any]]:
    """Every answer to `command` in a recording, from all its monitors."""
    rows = [json.loads(row) for row in (TRANSCRIPTS / f"{name}.jsonl").read_text().splitlines()]
    asked: dict[tuple[str, int], str] = {}
    answers = []
    for row in rows:
        message = row.get("msg", {})
        key = (row.get("mon"), message.get("id"))
        if row.get("dir") == ">":
            asked[key] = message.get("execute", "")
        elif "return" in message and asked.get(key, "query-migrate") == command:
            answers.append(message["return"])
    return [answer for answer in answers if isinstance(answer, dict)]


@contextlib.asynccontextmanager
async def replaying(path: Path, lines: list[Line]) -> AsyncIterator[None]:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ids: dict[int, int] = {}
        asked: list[dict[str, Any]] = []

        async def next_of(command: str) -> int:
            """The id of the client's next such question; out-of-band ones overtake others."""
            while True:
                for question in asked:
                    if Line(True, question).command == command:
                        asked.remove(question)
                        return int(question["id"])
                asked.append(json.loads(await reader.readline()))

        try:
            for line in lines:
                message = dict(line.message)
                if line.is_question:
                    ids[message["id"]] = await next_of(line.command)
                    continue
                if "id" in message:
                    message["id"] = ids.get(message["id"], NEVER_ASKED + message["id"])
                writer.write(json.dumps(message).encode() + b"\r\n")
            await writer.drain()
            await reader.read()
        except (ConnectionError, json.JSONDecodeError):
            pass  # the client has left
        finally:
            writer.close()

    async with await asyncio.start_unix_server(speak, path):
        yield
