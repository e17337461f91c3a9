"""The demo without QEMU: it shows the main job, proves it, and leaves nothing behind."""

import asyncio
import signal
from pathlib import Path

import pytest

from migrd.demo import processes
from tests.integration.test_demo import DEMO_S, demo, left, said

pytestmark = pytest.mark.timeout(180)

SMALL = (
    *("--engine", "direct", "--qemu", "/nonexistent", "--memory", "64", "--working-set", "16"),
    *("--dirty", "4", "--bandwidth", "0"),
)


async def test_the_demo_needs_no_qemu_and_proves_the_move(short_tmp_path: Path) -> None:
    directory = short_tmp_path / "demo"
    process = await demo("--directory", str(directory), *SMALL)
    out = await said(process)
    assert process.returncode == 0, out
    for proof in ("no gap, no repeat", "compared byte for byte", "exactly one process runs"):
        assert proof in " ".join(out.split()), out
    assert await asyncio.to_thread(left, directory) == []
    assert await asyncio.to_thread(processes.guests_of, directory) == []


async def test_ctrl_c_in_the_middle_leaves_nothing(short_tmp_path: Path) -> None:
    directory = short_tmp_path / "demo"
    process = await demo(
        *("--directory", str(directory), "--engine", "direct", "--memory", "256"),
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
    assert await asyncio.to_thread(processes.guests_of, directory) == []
