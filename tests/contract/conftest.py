"""Worlds for contract tests: each test body runs on fakes, real QEMUs and real processes."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrd.engine.ports import Vmm
from migrd.engine.threads import in_thread
from tests.contract.direct_world import DirectWorld
from tests.contract.vmm_world import FakeWorld, RealWorld, World, dirtying_guest

REAL = {"7.2": "7.2", "10.0": "10"}
"""Version -> key of `qemu_binaries`."""


@pytest.fixture(
    params=[
        "fake 7.2",
        "fake 10.0",
        "direct process",
        pytest.param("real 7.2", marks=pytest.mark.real),
        pytest.param("real 10.0", marks=pytest.mark.real),
    ]
)
async def world(request: pytest.FixtureRequest, short_tmp_path: Path) -> AsyncIterator[World[Vmm]]:
    kind, version = request.param.split()
    if kind == "fake":
        world: World[Vmm] = FakeWorld(version, short_tmp_path)
    elif kind == "direct":
        world = DirectWorld(short_tmp_path)
    else:
        binary = request.getfixturevalue("qemu_binaries")[REAL[version]]
        rom = await in_thread(dirtying_guest().write_rom, short_tmp_path / "guest.rom")
        world = RealWorld(version, binary, short_tmp_path, rom)
    try:
        yield world
    finally:
        await world.close()
