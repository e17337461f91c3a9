"""The examples for authors of VMMs, moved between two daemons: launched by migrd, and adopted."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrd.cli.client import path
from migrd.cli.exits import CommandError
from migrd.cli.seen import Json
from migrd.demo import processes
from tests.integration.direct_fleet import DirectFleet, direct_fleet
from tests.integration.fleet import VM

pytestmark = pytest.mark.timeout(120)

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples" / "direct"
PROFILE = """
engine = "direct"
description = "the example"
kind = "counter-1"
command = [{command}, "{out}", "x", "{{memory_mib}}", "500"]
memory_mib = "{{memory_mib}}"
[parameters.memory_mib]
type = "integer"
description = "memory"
min = 1
max = 64
default = 16
"""


def command(kind: str, directory: Path) -> tuple[str, ...]:
    if kind == "python":
        return sys.executable, str(EXAMPLES / "counter.py")
    binary = directory / "counter"
    include = EXAMPLES.parents[2] / "migrd" / "direct" / "include"
    options = ("-O2", "-std=c11", f"-I{include}", "-pthread", "-o", str(binary))
    subprocess.run(["cc", str(EXAMPLES / "counter.c"), *options], check=True, timeout=60)
    return (str(binary),)


class Example:
    """Two hosts with a profile of the example, and what it has said."""

    def __init__(self, two: DirectFleet, words: tuple[str, ...]) -> None:
        self.two = two
        self.words = words
        self.out = two.directory / "out"

    def beats(self) -> list[int]:
        lines = self.out.read_text().splitlines() if self.out.exists() else []
        assert not [line for line in lines if line.startswith("LOST")]
        return [int(line.split()[1]) for line in lines if line.startswith("beat")]

    async def counts_on(self, more: int = 20) -> None:
        before, give_up_at = len(self.beats()), time.monotonic() + 20
        while len(self.beats()) < before + more:
            assert time.monotonic() < give_up_at, "it does not count"
            await asyncio.sleep(0.02)

    async def move(self, source: str, destination: str) -> None:
        migration = await self.two.migrate(source, destination)
        seen = await self.two.ended(source, migration)
        assert seen["phase"] == "succeeded", seen
        await self.counts_on()
        beats = self.beats()
        assert beats == list(range(beats[0], beats[0] + len(beats))), "a gap, or a repeat"
        assert len(await asyncio.to_thread(processes.guests_of, self.two.directory)) == 1


@contextlib.asynccontextmanager
async def example(directory: Path, kind: str) -> AsyncIterator[Example]:
    words = await asyncio.to_thread(command, kind, directory)
    quoted = ", ".join(f'"{word}"' for word in words)
    text = PROFILE.format(command=quoted, out=directory / "out")
    async with direct_fleet(directory, profiles={"counter": text}) as two:
        try:
            yield Example(two, words)
        finally:
            left = await asyncio.to_thread(processes.guests_of, directory)
            await asyncio.to_thread(processes.end, left)


@pytest.mark.parametrize("kind", ["python", "c"])
async def test_an_example_moves_there_and_back(short_tmp_path: Path, kind: str) -> None:
    async with example(short_tmp_path, kind) as shown:
        body: Json = {"profile": "counter", "parameters": {}}
        await shown.two.call("alpha", "PUT", path("vms", VM), body=body)
        await shown.two.call("alpha", "POST", path("vms", VM, verb="start"))
        await shown.counts_on()
        await shown.move("alpha", "beta")
        await shown.move("beta", "alpha")


async def test_a_process_that_hands_over_by_itself_is_adopted_and_moves(
    short_tmp_path: Path,
) -> None:
    """Known over a restart, never killed, and moved once somebody names a profile for it."""
    async with example(short_tmp_path, "python") as shown:
        two = shown.two
        socket = two.hosts["alpha"].directory / "run" / "direct.sock"
        child = await asyncio.create_subprocess_exec(
            *(*shown.words, str(shown.out), "x", "16", "500"),
            env={**os.environ, "MIGRD_VM": VM, "MIGRD_SOCKET": str(socket)},
        )
        try:
            await until_adopted(two)
            await two.kill_daemon("alpha")
            await two.start_daemon("alpha")
            seen = await until_adopted(two)
            assert seen["pid"] == child.pid
            body: Json = {"profile": "counter", "parameters": {}}
            await two.call("alpha", "PUT", path("vms", VM), body=body)
            await shown.counts_on()
            await shown.move("alpha", "beta")
            assert await child.wait() in (0, -signal.SIGTERM)
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()


async def until_adopted(two: DirectFleet) -> dict[str, object]:
    give_up_at = time.monotonic() + 20
    while time.monotonic() < give_up_at:
        with contextlib.suppress(CommandError):
            seen = await two.vm("alpha")
            if seen["state"] == "running":
                assert not seen["managed"]
                return seen
        await asyncio.sleep(0.05)
    raise AssertionError("it was not adopted")
