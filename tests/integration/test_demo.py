"""The demo, as a newcomer runs it: it shows the main job, proves it, and leaves nothing behind."""

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from migrd.demo import processes

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]

DEMO_S = 90.0
SMALL = ("--memory", "64", "--working-set", "16", "--dirty", "4", "--bandwidth", "0")


async def demo(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "migrd", "demo", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


async def said(process: asyncio.subprocess.Process) -> str:
    async with asyncio.timeout(DEMO_S):
        out, _ = await process.communicate()
    return out.decode()


def left(directory: Path) -> list[str]:
    """Whatever still names the directory, or lies in it."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(directory).encode() in command:
                found.append(command.replace(b"\0", b" ").decode(errors="replace"))
    return found + [str(path) for path in directory.rglob("*")]


@pytest.mark.parametrize("qemu", ["7.2", "10"])
async def test_the_demo_proves_the_move_and_leaves_nothing(
    short_tmp_path: Path, qemu_binaries: dict[str, Path], qemu: str
) -> None:
    directory = short_tmp_path / "demo"
    process = await demo("--directory", str(directory), "--qemu", str(qemu_binaries[qemu]), *SMALL)
    out = await said(process)
    assert process.returncode == 0, out
    for proof in ("no gap, no repeat", "compared byte for byte", "exactly one QEMU runs"):
        assert proof in " ".join(out.split()), out
    assert await asyncio.to_thread(left, directory) == []


async def test_ctrl_c_in_the_middle_leaves_nothing(
    short_tmp_path: Path, qemu_binaries: dict[str, Path]
) -> None:
    directory = short_tmp_path / "demo"
    process = await demo(
        *("--directory", str(directory), "--qemu", str(qemu_binaries["10"])),
        *("--bandwidth", "4", "--when-not-converging", "wait"),
    )
    assert process.stdout is not None
    async with asyncio.timeout(DEMO_S):
        while b"precopy" not in await process.stdout.readline():
            assert process.returncode is None
    process.send_signal(signal.SIGINT)
    out = await said(process)
    assert "Traceback" not in out
    assert process.returncode == 130, out
    assert await asyncio.to_thread(left, directory) == []


async def test_what_is_kept_can_be_used_and_ended(
    short_tmp_path: Path, qemu_binaries: dict[str, Path]
) -> None:
    directory = short_tmp_path / "demo"
    binary = str(qemu_binaries["10"])
    process = await demo("--keep", "--directory", str(directory), "--qemu", binary, *SMALL)
    out = await said(process)
    try:
        assert process.returncode == 0, out
        assert len(await asyncio.to_thread(processes.qemus_of, directory)) == 1
        back = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "migrd", "--socket", str(directory / "beta/run/api.sock")),
            *("migrate", "guest", "alpha", "--watch"),
            stdout=asyncio.subprocess.PIPE,
        )
        assert "guest runs on alpha" in await said(back)
        assert back.returncode == 0
    finally:
        ending = await demo("--end", str(directory))
        await said(ending)
    assert ending.returncode == 0
    assert await asyncio.to_thread(left, directory) == []


async def test_a_directory_that_is_in_use_is_left_alone(short_tmp_path: Path) -> None:
    precious = short_tmp_path / "precious"
    await asyncio.to_thread(precious.write_text, "mine")
    process = await demo("--directory", str(short_tmp_path))
    out = await said(process)
    assert process.returncode != 0
    assert "not empty" in out
    assert "Traceback" not in out
    assert await asyncio.to_thread(precious.read_text) == "mine"
    ending = await demo("--end", str(short_tmp_path))
    assert "not a demo" in await said(ending)
    assert await asyncio.to_thread(precious.read_text) == "mine"
