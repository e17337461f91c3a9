"""The main job: a guest moves between two real daemons, and nothing of it is lost."""

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from tests.integration.fleet import BUSY, Fleet, fleet

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]


async def test_a_guest_moves_and_its_count_and_memory_go_on(
    short_tmp_path: Path, qemu_binary: Path
) -> None:
    async with fleet(short_tmp_path, (qemu_binary, qemu_binary), tls=True) as two:
        await two.start_guest("alpha")
        migration = await two.migrate("alpha", "beta")
        seen = await two.ended("alpha", migration)
        assert seen["phase"] == "succeeded", seen["cause"]
        assert seen["guest_runs_on"] == "destination"
        assert seen["blackout_ms"] > 0
        there = await two.migration("beta", migration)
        assert there["phase"] == "running"
        await two.prove(1, on="beta")
        assert (await two.vm("alpha"))["state"] == "departed"


async def test_a_guest_moves_from_qemu_7_2_to_10_and_back(
    short_tmp_path: Path, qemu_binaries: dict[str, Path]
) -> None:
    pair = (qemu_binaries["7.2"], qemu_binaries["10"])
    async with fleet(short_tmp_path, pair, image=BUSY) as two:
        await two.start_guest("alpha")
        for moves, (source, destination) in enumerate([("alpha", "beta"), ("beta", "alpha")], 1):
            migration = await two.migrate(
                source, destination, policy={"max_bandwidth_bytes_per_s": 40 << 20}
            )
            seen = await two.ended(source, migration)
            assert seen["phase"] == "succeeded", seen["cause"]
            # a guest that came by migration leaves like any other: copied while it runs
            assert seen["progress"]["rounds"] >= 2, seen["progress"]
            assert seen["blackout_ms"] < 1500, seen["blackout_ms"]
            await two.prove(moves, on=destination)


async def test_twenty_moves_in_a_row_leave_nothing_behind(
    short_tmp_path: Path, qemu_binaries: dict[str, Path]
) -> None:
    binary = qemu_binaries["10"]
    async with fleet(short_tmp_path, (binary, binary), tls=True) as two:
        await two.start_guest("alpha")
        names = ["alpha", "beta"]
        files: dict[str, int] = {}
        sockets: dict[str, int] = {}
        for move in range(1, 21):
            source, destination = names
            migration = await two.migrate(source, destination)
            seen = await two.ended(source, migration)
            assert seen["phase"] == "succeeded", (move, seen)
            names.reverse()
            if move == 4:
                files = await asyncio.to_thread(open_files, two, "other")
                sockets = await asyncio.to_thread(open_files, two, "socket")
        await two.prove(20, on=names[0])
        await two.only_qemus(1)
        for name, count in (await asyncio.to_thread(open_files, two, "other")).items():
            assert count <= files[name], name  # fewer: something was just being closed then
        for name, count in (await asyncio.to_thread(open_files, two, "socket")).items():
            # kept connections to the peer come and go within their bound; 16 moves would show
            assert count < sockets[name] + 8, name
        instances = await asyncio.to_thread(lambda: sorted(short_tmp_path.glob("*/run/vms/*/*")))
        assert len(instances) == 1


def open_files(two: Fleet, kind: str) -> dict[str, int]:
    """How many files each daemon holds open: "socket", or all others."""
    counts = {}
    for name, host in two.hosts.items():
        assert host.process is not None
        links = []
        for link in Path(f"/proc/{host.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                links.append(os.readlink(link))
        is_socket = [link.startswith("socket:") for link in links]
        counts[name] = sum(is_socket) if kind == "socket" else len(links) - sum(is_socket)
    return counts
