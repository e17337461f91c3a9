"""A VM that somebody else launched: adopted by its sockets, and moved once its profile is named."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from migrd.cli.client import Problem, path
from migrd.cli.seen import Json
from migrd.demo import hosts
from migrd.demo.proof import SerialTap
from migrd.qemu.profile import TCG_EXTRA_KIB
from tests.integration.fleet import VM, Fleet, fleet

pytestmark = [pytest.mark.real, pytest.mark.timeout(120)]

MEMORY_MIB = 96


@contextlib.asynccontextmanager
async def launched_by_hand(two: Fleet, binary: Path, adopt_dir: Path) -> AsyncIterator[None]:
    """The machine of the demo's profile, started without migrd; it counts."""
    serial = adopt_dir / "serial.log"
    rom = two.directory / "firmware" / "guest.rom"
    memory_kib = MEMORY_MIB * 1024 + TCG_EXTRA_KIB
    process = await asyncio.create_subprocess_exec(
        *(str(binary), "-nodefaults", "-no-user-config", "-display", "none"),
        *("-machine", "pc-i440fx-7.2", "-accel", "tcg", "-cpu", "qemu64"),
        *("-m", f"{memory_kib}K", "-bios", str(rom), "-serial", f"file:{serial}"),
        *("-qmp", f"unix:{adopt_dir / VM}.qmp,server=on,wait=off"),
        *("-qmp", f"unix:{adopt_dir / VM}.oob.qmp,server=on,wait=off"),
        start_new_session=True,
    )
    tap = SerialTap("alpha/by-hand")
    two.taps.append(tap)
    await asyncio.to_thread(serial.touch)
    following = asyncio.create_task(tap.follow(serial))
    try:
        yield
    finally:
        following.cancel()
        await asyncio.wait([following])
        if process.returncode is None:
            process.kill()
        await process.wait()


async def adopting(two: Fleet) -> Path:
    """Let alpha adopt VMs; the directory it looks into."""
    adopt_dir = two.directory / "theirs"
    await asyncio.to_thread(adopt_dir.mkdir)
    await two.kill_daemon("alpha")
    config = two.hosts["alpha"].config
    text = await asyncio.to_thread(config.read_text)
    text = text.replace("[host]\n", f'[host]\nadopt_dir = "{adopt_dir}"\n', 1)
    await asyncio.to_thread(config.write_text, text)
    await two.start_daemon("alpha")
    return adopt_dir


async def state_of(two: Fleet, vm: str, state: str) -> dict[str, Any]:
    """Wait until alpha shows the VM so; what it shows."""
    async with asyncio.timeout(20.0):
        while True:
            with contextlib.suppress(Problem):
                seen = (await two.call("alpha", "GET", path("vms", vm))).body
                assert isinstance(seen, dict)
                if seen["state"] == state:
                    return seen
            await asyncio.sleep(0.1)


async def test_a_vm_launched_by_hand_is_adopted_and_moves_by_the_profile_that_fits_it(
    short_tmp_path: Path, qemu_binary: Path
) -> None:
    async with fleet(short_tmp_path, (qemu_binary, qemu_binary), memory_mib=MEMORY_MIB) as two:
        adopt_dir = await adopting(two)
        async with launched_by_hand(two, qemu_binary, adopt_dir):
            await state_of(two, VM, "running")
            await two.counts_on("alpha")
            migration = await two.migrate("alpha", "beta")
            seen = await two.ended("alpha", migration)
            codes = [refusal["code"] for refusal in seen["refusals"]]
            assert (seen["phase"], codes) == ("refused", ["no_launch_profile"])
            with pytest.raises(Problem) as refused:  # it is not ours to stop
                await two.call("alpha", "POST", path("vms", VM, verb="stop"))
            assert refused.value.code == "vm_adopted"
            await two.call(
                "alpha",
                "PUT",
                path("vms", VM),
                body={
                    "profile": "demo",
                    "parameters": {"memory_mib": MEMORY_MIB, "firmware": "guest.rom"},
                },
            )
            migration = await two.migrate("alpha", "beta")
            seen = await two.ended("alpha", migration)
            assert seen["phase"] == "succeeded", seen["cause"]
            await two.prove(1, on="beta")


async def test_a_monitor_that_speaks_garbage_is_shown_unreachable_and_hurts_nobody_else(
    short_tmp_path: Path, qemu_binaries: dict[str, Path]
) -> None:
    binary = qemu_binaries["10"]
    async with fleet(short_tmp_path, (binary, binary)) as two:
        adopt_dir = await adopting(two)

        async def babble(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write(b'{"QMP": [}\x00\xff{{{{' * 1000 + b"\n")
                    await writer.drain()

        server = await asyncio.start_unix_server(babble, adopt_dir / "babbler.qmp")
        try:
            await two.start_guest("alpha")
            seen = await state_of(two, "babbler", "unreachable")
            assert seen["pid"] != (await two.vm("alpha"))["pid"]
            body: Json = {"vm": "babbler", "destination": "beta"}
            reply = await two.call("alpha", "POST", path("migrations"), body=body)
            assert isinstance(reply.body, dict)
            ended = await two.ended("alpha", str(reply.body["id"]))
            assert ended["phase"] == "refused"
            assert "source_unreachable" in [refusal["code"] for refusal in ended["refusals"]]
            migration = await two.migrate("alpha", "beta")
            assert (await two.ended("alpha", migration))["phase"] == "succeeded"
            await two.prove(1, on="beta")
        finally:
            server.close()
            await hosts.stop(two.hosts["alpha"])  # which ends the last connection
            await server.wait_closed()
